// Runs CUDA kernels on the CPU, slowly, so that their logic is tested where there is no GPU: every thread of a block
// is a fiber that runs until it meets a barrier. Blocks run one after another; the lanes of a warp, and the warps between
// barriers of their block, in random orders. Asynchronous copies destroy what they replace at once and bring the new at the
// latest moment. Shared memory ends at a page that nobody may touch. Not a model of memory ordering within a warp, or speed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __launch_bounds__(...)
using std::isfinite;
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  enum { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone } state = kReady;
  std::vector<Copy> copies;  // started and not waited for
  bool turn = false;         // of `exchange`
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static int current;
static std::function<void()> body;
static struct {
  int processors = 3, block_bytes = 232448, bytes = 233472, major = 9;
} device;
constexpr int kRoom = 256 * 1024;
// Of a block, up to the page that nobody may touch.
static unsigned char* const last_page = [] {
  void* const room = mmap(nullptr, kRoom + 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED || mprotect(static_cast<char*>(room) + kRoom, 65536, PROT_NONE)) std::abort();
  return static_cast<unsigned char*>(room) + kRoom;
}();
static unsigned char* shared_memory;
static unsigned char exchange[2][1024][32];
static std::mt19937 numbers;

static void enter() {
  body();
  fibers[current].state = Fiber::kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

static void wait(decltype(Fiber::state) state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

// What each lane of a warp gives to the others; it may be read until the lane gives again.
template <typename T>
const unsigned char (*give(const T& value))[32] {
  unsigned char(*const all)[32] = exchange[fibers[current].turn ^= true];
  static_assert(sizeof(T) <= sizeof(*all), "too large for an exchange");
  std::memcpy(all[current], &value, sizeof(value));
  wait(Fiber::kAtWarpBarrier);
  return all + current / 32 * 32;
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
  if (threads % 32) std::abort();
  fibers.resize(threads);
  std::memset(shared_memory, 0xff, last_page - shared_memory);  // NaN: kernels must not count on zeros
  for (Fiber& fiber : fibers) {
    fiber.state = Fiber::kReady;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<int> warps(threads / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  do {
    std::shuffle(warps.begin(), warps.end(), numbers);
    for (int warp : warps) {
      do {
        std::shuffle(lanes.begin(), lanes.end(), numbers);
        for (int lane : lanes) {
          current = warp * 32 + lane;
          threadIdx = dim3(current, 0, 0);
          if (fibers[current].state == Fiber::kReady) swapcontext(&scheduler, &fibers[current].context);
        }
      } while (release(warp * 32, warp * 32 + 32, Fiber::kAtWarpBarrier));
    }
  } while (release(0, threads, Fiber::kAtBlockBarrier));
  for (const Fiber& fiber : fibers) {
    if (fiber.state == Fiber::kDone) continue;
    std::fprintf(stderr, "deadlock: the threads of a block wait at different barriers\n");
    std::abort();
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
  if (shared_bytes > device.block_bytes) std::abort();
  shared_memory = last_page - (shared_bytes + 15) / 16 * 16;
  return {kernel, grid, block};
}

}  // namespace emulator

static void __syncthreads() { emulator::wait(emulator::Fiber::kAtBlockBarrier); }
static void __syncwarp() { emulator::wait(emulator::Fiber::kAtWarpBarrier); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  T other;
  std::memcpy(&other, emulator::give(value)[lane], sizeof(T));
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
template <typename T>
T load(Place place, T) { return *reinterpret_cast<T*>(emulator::shared_memory + place); }
static float2 load_pair(Place place) { return *reinterpret_cast<float2*>(emulator::shared_memory + place); }
static void store(Place place, float value) { *reinterpret_cast<float*>(emulator::shared_memory + place) = value; }

// ldmatrix: the four 8 x 8 matrices whose rows the lanes point to.
static void load_matrices(uint32_t (&to)[4], Place place, bool transposed = false) {
  const int lane = emulator::current % 32;
  if (place % 16) std::abort();
  const auto* const places = emulator::give(place);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int x = 0; x < 2; ++x) {
      const int r = transposed ? lane % 4 * 2 + x : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + x;
      std::memcpy(&place, places[matrix * 8 + r], sizeof(place));
      std::memcpy(&pair[x], emulator::shared_memory + place + column * 2, 2);
    }
    std::memcpy(&to[matrix], pair, 4);
  }
}
static void load_matrices_transposed(uint32_t (&to)[4], Place row) { load_matrices(to, row, true); }

template <int bytes>
void copy(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) std::abort();
  std::memset(to, 0xff, bytes);
  emulator::fibers[emulator::current].copies.push_back({to, valid ? from : nullptr, bytes});
}
static void wait_for_copies() {
  for (const emulator::Copy& x : emulator::fibers[emulator::current].copies) {
    x.from ? std::memcpy(x.to, x.from, x.bytes) : std::memset(x.to, 0, x.bytes);
  }
  emulator::fibers[emulator::current].copies.clear();
}

static uint2 load_kept(const uint2* from) { return *from; }

static unsigned __float_as_uint(float x) { unsigned y; return std::memcpy(&y, &x, 4), y; }
static uint32_t transposed(uint32_t matrix) {
  const auto all = emulator::give(matrix);
  const int lane = emulator::current % 32;
  uint16_t pair[2];
  for (int x = 0; x < 2; ++x) std::memcpy(&pair[x], all[(lane % 4 * 2 + x) * 4 + lane / 8] + lane / 4 % 2 * 2, 2);
  std::memcpy(&matrix, pair, 4);
  return matrix;
}

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
  const auto* const values = emulator::give(value);
  for (int lane = 0, other; lane < 32; ++lane) {
    std::memcpy(&other, values[lane], sizeof(other));
    value |= other;
  }
  return value;
}

// mma.m16n8k16: `sums` (16, 8) += `a` (16, 16) times `b` (16, 8), each lane with its part of each.
template <typename T>
void multiply(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, T) {
  struct Operands {
    T a[8], b[4];
  };
  struct Words {
    uint32_t of_a[4], of_b[2];
  };
  const int lane = emulator::current % 32;
  const auto* const operands = emulator::give(Words{{a0, a1, a2, a3}, {b0, b1}});
  for (int x = 0; x < 4; ++x) {
    const int row = lane / 4 + x / 2 * 8, column = lane % 4 * 2 + x % 2;
    for (int k = 0; k < 16; ++k) {
      const auto* left = reinterpret_cast<const Operands*>(operands[row % 8 * 4 + k % 8 / 2]);
      const auto* right = reinterpret_cast<const Operands*>(operands[column * 4 + k % 8 / 2]);
      const T a = left->a[k / 8 * 4 + row / 8 * 2 + k % 2], b = right->b[k / 8 * 2 + k % 2];
      sums[x] += static_cast<float>(a) * static_cast<float>(b);
    }
  }
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
  const auto& d = emulator::device;
  switch (which) {
    case cudaDevAttrMultiProcessorCount: return *value = d.processors, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *value = d.major, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = d.block_bytes, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return *value = d.bytes, cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
void emulate_device(int processors, int block_bytes, int bytes, int major) {
  emulator::device = {processors, block_bytes, bytes, major};
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
