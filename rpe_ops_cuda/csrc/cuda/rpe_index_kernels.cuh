// Shared by the two kernel files: views of tensors, and ids checked on the device.
//
// Lookup and sums move far more bytes than they compute, and the id map is the same for every (batch, head) pair, called a
// plane below. So a block, or warp, uses the same ids for several planes. No atomics: sums have a fixed order.
#pragma once

#undef NDEBUG  // an id outside the table must stop the kernel in release builds too
#include "rpe_index_kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cassert>
#include <type_traits>

namespace irpe {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kDefaultSharedBytes = 48 * 1024;  // more needs an opt-in
constexpr int kThreads = 256;
constexpr int64_t kMost = INT32_MAX - (1 << 16);  // planes, rows or blocks: they are counted in 32 bits

template <typename T>
struct View {
  const T* data;
  int64_t heads, rows, columns, planes;
  int64_t batch_stride, head_stride, row_stride, column_stride;

  explicit View(const Strided& s)
      : data(static_cast<const T*>(s.data)), heads(s.heads), rows(s.rows), columns(s.columns),
        planes(s.batch * s.heads), batch_stride(s.batch_stride), head_stride(s.head_stride),
        row_stride(s.row_stride), column_stride(s.column_stride) {}

  __device__ const T* row(int64_t plane, int64_t i) const {
    const int p = static_cast<int>(plane), count = static_cast<int>(heads);  // a 64-bit division takes a hundred instructions
    return data + p / count * batch_stride + p % count * head_stride + i * row_stride;
  }
};

// The id, or 0 with `bad` set if it is out of range: the kernel stays inside its memory and fails only at its end, where
// the call behind assert() costs no registers.
template <typename Id>
__device__ __forceinline__ int safe_id(Id id, int buckets, bool& bad) {
  const bool good = static_cast<std::make_unsigned_t<Id>>(id) < static_cast<unsigned>(buckets);
  bad |= !good;
  return good ? static_cast<int>(id) : 0;
}

__device__ __forceinline__ void stop_if(bool bad) { assert(!bad && "rpe_index: an id lies outside the table"); }

template <typename Body>
cudaError_t with_id(IdType type, Body body) {
  switch (type) {
    case IdType::kUInt8: return body(uint8_t{});
    case IdType::kInt32: return body(int32_t{});
    case IdType::kInt64: return body(int64_t{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace irpe
