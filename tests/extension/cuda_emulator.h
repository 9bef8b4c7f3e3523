// Runs CUDA kernels on the CPU, slowly, so that their logic is tested where there is no GPU: every thread of a block
// is a fiber that runs until it meets a barrier. Blocks run one after another. Not a model of memory ordering or speed.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __launch_bounds__(...)
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
alignas(16) static unsigned char shared_memory[232448];
static unsigned char exchange[1024][16];

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
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 232448, cudaSuccess; }
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
