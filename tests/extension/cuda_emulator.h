// Runs CUDA kernels on the CPU, slowly, so that their logic is tested where there is no GPU: every thread of a block
// is a fiber that runs until it meets a barrier. Blocks run one after another. Not a model of memory ordering or speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __launch_bounds__(...)
using std::isfinite;
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  enum { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone } state = kReady;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static std::function<void()> body;
alignas(128) static unsigned char shared_memory[232448];
static unsigned char exchange[1024][32];

static void enter() {
  body();
  fibers[current].state = Fiber::kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

static void wait(decltype(Fiber::state) state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

// Frees the fibers in [begin, end) if each of them waits at `barrier` or is done.
static bool release(int begin, int end, decltype(Fiber::state) barrier) {
  bool any = false;
  for (int x = begin; x < end; ++x) {
    if (fibers[x].state != barrier && fibers[x].state != Fiber::kDone) return false;
    any |= fibers[x].state == barrier;
  }
  for (int x = begin; x < end; ++x) {
    if (fibers[x].state == barrier) fibers[x].state = Fiber::kReady;
  }
  return any;
}

static void run_block(int threads) {
  fibers.resize(threads);
  for (unsigned char& byte : shared_memory) byte = 0xff;  // NaN: kernels must not count on zeros
  for (Fiber& fiber : fibers) {
    fiber.state = Fiber::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    bool progress = false, alive = false;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].state == Fiber::kReady) {
        threadIdx = dim3(current, 0, 0);
        swapcontext(&scheduler, &fibers[current].context);
        progress = true;
      }
      alive |= fibers[current].state != Fiber::kDone;
    }
    if (!alive) return;
    for (int warp = 0; warp < threads; warp += 32) progress |= release(warp, warp + 32, Fiber::kAtWarpBarrier);
    progress |= release(0, threads, Fiber::kAtBlockBarrier);
    if (!progress) {
      std::fprintf(stderr, "deadlock: the threads of a block wait at different barriers\n");
      std::abort();
    }
  }
}

template <typename Kernel>
struct Launch {
  Kernel kernel;
  dim3 grid, block;
  template <typename... Args>
  void operator()(Args... args) const {
    gridDim = grid;
    blockDim = block;
    body = [&] { kernel(args...); };
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, 0);
        run_block(block.x);
      }
    }
  }
};

template <typename Kernel>
Launch<Kernel> launch(Kernel kernel, dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t) {
  if (shared_bytes > static_cast<int64_t>(sizeof(shared_memory))) std::abort();
  return {kernel, grid, block};
}

}  // namespace emulator

static void __syncthreads() { emulator::wait(emulator::Fiber::kAtBlockBarrier); }
static void __syncwarp() { emulator::wait(emulator::Fiber::kAtWarpBarrier); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  const int me = emulator::current;
  *reinterpret_cast<T*>(emulator::exchange[me]) = value;
  __syncwarp();
  const T other = *reinterpret_cast<T*>(emulator::exchange[me / 32 * 32 + lane]);
  __syncwarp();
  return other;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return __shfl_sync(~0u, value, emulator::current % 32 ^ mask);
}

static void fetch(const char*) {}

using Place = uint32_t;
static Place place_at(const void* p) { return static_cast<const unsigned char*>(p) - emulator::shared_memory; }
static float load(Place place) { return *reinterpret_cast<float*>(emulator::shared_memory + place); }
static void store(Place place, float value) { *reinterpret_cast<float*>(emulator::shared_memory + place) = value; }

// ldmatrix: the four 8 x 8 matrices whose rows the lanes point to.
static void load_matrices(uint32_t (&to)[4], Place place, bool transposed = false) {
  const unsigned char* row = emulator::shared_memory + place;
  const int me = emulator::current, warp = me / 32 * 32, lane = me % 32;
  std::memcpy(emulator::exchange[me], &row, sizeof(row));
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  __syncwarp();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int x = 0; x < 2; ++x) {
      const int r = transposed ? lane % 4 * 2 + x : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + x;
      const uint16_t* place;
      std::memcpy(&place, emulator::exchange[warp + matrix * 8 + r], sizeof(place));
      pair[x] = place[column];
    }
    std::memcpy(&to[matrix], pair, 4);
  }
  __syncwarp();
}
static void load_matrices_transposed(uint32_t (&to)[4], Place row) { load_matrices(to, row, true); }

// At once, while a GPU may take until wait_for_copies().
template <int bytes>
void copy(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) std::abort();
  valid ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes);
}
static void wait_for_copies() {}

static uint2 load_kept(const uint2* from) { return *from; }

static float power_of_two(float x) { return std::exp2(x); }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned out = 0;
  for (int x = 0; x < 4; ++x) out |= static_cast<unsigned>(both >> (which >> 4 * x & 7) * 8 & 255) << 8 * x;
  return out;
}
static unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int x = 0; x < 32; x += 8) sum += (a >> x & 255) * (b >> x & 255);
  return sum;
}

static int __any_sync(unsigned, int value) {
  for (int lane = 0; lane < 32; ++lane) value |= __shfl_sync(~0u, value, lane);  // a copy of each, of any lane by then
  return value;
}

// mma.m16n8k16: `sums` (16, 8) += `a` (16, 16) times `b` (16, 8), each lane with its part of each.
template <typename T>
void multiply(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, T) {
  struct Operands {
    T a[8], b[4];
  };
  const int me = emulator::current, warp = me / 32 * 32, lane = me % 32;
  const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(emulator::exchange[me], words, sizeof(words));
  __syncwarp();
  for (int x = 0; x < 4; ++x) {
    const int row = lane / 4 + x / 2 * 8, column = lane % 4 * 2 + x % 2;
    for (int k = 0; k < 16; ++k) {
      const auto* left = reinterpret_cast<Operands*>(emulator::exchange[warp + row % 8 * 4 + k % 8 / 2]);
      const auto* right = reinterpret_cast<Operands*>(emulator::exchange[warp + column * 4 + k % 8 / 2]);
      const T a = left->a[k / 8 * 4 + row / 8 * 2 + k % 2], b = right->b[k / 8 * 2 + k % 2];
      sums[x] += static_cast<float>(a) * static_cast<float>(b);
    }
  }
  __syncwarp();
}

template <typename T>
T __ldg(const T* place) {
  return *place;
}

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  if (which == cudaDevAttrMultiProcessorCount) return *value = 3, cudaSuccess;
  return *value = which == cudaDevAttrComputeCapabilityMajor ? 9 : 232448, cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
}
template <typename... Args>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Args...)) {
  return cudaSuccess;
}
template <typename... Args>
cudaError_t cudaFuncSetAttribute(void (*)(Args...), cudaFuncAttribute, int) {
  return cudaSuccess;
}
