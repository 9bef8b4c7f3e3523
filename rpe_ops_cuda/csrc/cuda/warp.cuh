// SPDX-License-Identifier: Apache-2.0
// What a warp does at once: products on tensor cores, reading 8 x 8 matrices from shared memory, copies that run on their own.
// Tests that run the kernels on a CPU bring their own versions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace irpe {
namespace {

// Products of this size and copies that run on their own began with Ampere: kernels that need them are empty before.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAmpere = false;
#else
constexpr bool kAmpere = true;
#endif

#ifdef __CUDACC__

// sums (16, 8) += a (16, 16) times b (16, 8), each lane with its part of each (mma.m16n8k16).
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1, T) {
#if __CUDA_ARCH__ >= 800
#define MULTIPLY(type)                                                                                       \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "    \
      "{%8, %9}, {%0, %1, %2, %3};"                                                                          \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                           \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __half>) {
    MULTIPLY("f16");
  } else {
    MULTIPLY("bf16");
  }
#undef MULTIPLY
#endif
}

__device__ __forceinline__ void fetch(const char* place) { asm volatile("prefetch.global.L2 [%0];" ::"l"(place)); }

// A place in shared memory. Compilers spend more instructions on pointers there than on these.
using Place = uint32_t;
__device__ __forceinline__ Place place_at(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ float load(Place place) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(place));
  return value;
}
template <typename T>
__device__ __forceinline__ T load(Place place, T) {
  if constexpr (std::is_same_v<T, float>) {
    return load(place);
  } else {
    uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(place));
    return *reinterpret_cast<const T*>(&bits);
  }
}
__device__ __forceinline__ float2 load_pair(Place place) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(place));
  return value;
}
__device__ __forceinline__ void store(Place place, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(place), "f"(value));
}

// Four 8 x 8 matrices of halves; lane 8 i + r names the place of row r of matrix i. Of each matrix a lane gets elements
// 2 t, 2 t + 1 of row g, lane = 4 g + t; transposed: of column g.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], Place row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], Place row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// Of an 8 x 8 matrix of halves, of which a lane has elements 2 t, 2 t + 1 of row g.
__device__ __forceinline__ uint32_t transposed(uint32_t matrix) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

// Starts a copy of `bytes` (4 or 16) from global to shared memory; zeros instead if not `valid`.
template <int bytes>
__device__ __forceinline__ void copy(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const Place place = place_at(to);
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(valid ? 16 : 0) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(place), "l"(from), "r"(valid ? 4 : 0) : "memory");
  }
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// From global memory that all blocks read again and again.
__device__ __forceinline__ uint2 load_kept(const uint2* from) {
  uint2 value;
  asm("ld.global.nc.L1::evict_last.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
  return value;
}

__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#endif

__device__ __forceinline__ uint32_t packed(float x, float y, __half) {
  const __half2 both = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t packed(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ float2 unpacked(uint32_t word, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
__device__ __forceinline__ float2 unpacked(uint32_t word, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}

// The scalar product of two pairs.
template <typename T>
__device__ __forceinline__ float product(uint32_t x, uint32_t y, T type) {
  const float2 a = unpacked(x, type), b = unpacked(y, type);
  return a.x * b.x + a.y * b.y;
}

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

// Over the four lanes that share the rows of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace
}  // namespace irpe
