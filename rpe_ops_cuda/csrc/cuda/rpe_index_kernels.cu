// CUDA kernels of rpe_index (a gather) and of its adjoint (bucket sums): each is the gradient of the other.
//
// Both move far more bytes than they compute, and the id map is the same for every (batch, head) pair, called a
// plane below. So one block, or warp, works on the same ids for several planes. No atomics: sums have a fixed order.
// Every kernel comes as an obvious version, which serves odd sizes, and a fast one.

#undef NDEBUG  // an id outside the table must stop the kernel in release builds too
#include "rpe_index_kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cassert>

namespace irpe {
namespace {

constexpr int kWarp = 32;
constexpr int64_t kDefaultSharedBytes = 48 * 1024;  // more needs an opt-in
constexpr int64_t kMaxGridY = 65535;

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
    return data + plane / heads * batch_stride + plane % heads * head_stride + i * row_stride;
  }
};

// The id, or 0 and a note in `bad` if the table has no such row: the kernel goes on inside its own memory and stops at
// its end, where the call behind assert() costs no registers.
template <typename Id>
__device__ __forceinline__ int safe_id(Id id, int64_t buckets, bool& bad) {
  const bool good = static_cast<int64_t>(id) >= 0 && static_cast<int64_t>(id) < buckets;
  bad |= !good;
  return good ? static_cast<int>(id) : 0;
}

__device__ __forceinline__ void stop_if(bool bad) { assert(!bad && "rpe_index: an id lies outside the table"); }

// ---------------------------------------------------------------------------------------------- rpe_index, obvious

template <typename T, typename Id>
__global__ void gather_elements(View<T> input, const Id* __restrict__ index, int64_t keys, T* __restrict__ out) {
  const int64_t plane_size = input.rows * keys;
  const int64_t total = input.planes * plane_size;
  bool bad = false;
  for (int64_t x = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; x < total; x += int64_t{gridDim.x} * blockDim.x) {
    const int64_t place = x % plane_size;
    const int id = safe_id(index[place], input.columns, bad);
    out[x] = input.row(x / plane_size, place / keys)[id * input.column_stride];
  }
  stop_if(bad);
}

// ------------------------------------------------------------------------------------------------- rpe_index, fast
//
// A thread owns one 16-byte piece of a plane (rows of 197 elements do not start at multiples of 16 bytes, so pieces
// run on over row ends) and writes it for up to kPlanesPerBlock planes with one 16-byte store each. Planes of odd
// size start at different alignments; every `period`-th plane starts at the same one, so a block takes planes that
// are `period` apart and each thread keeps its ids, already turned into offsets into shared memory, in registers.

constexpr int kGatherThreads = 256;
constexpr int kPlanesPerBlock = 4;

template <typename T>
constexpr int kPiece = 16 / sizeof(T);

__host__ __device__ inline int64_t most_rows(int64_t elements, int64_t keys, int64_t rows) {
  const int64_t touched = (elements - 1) / keys + 2;
  return touched < rows ? touched : rows;
}

template <typename T, typename Id>
__global__ void __launch_bounds__(kGatherThreads)
    gather_pieces(View<T> input, const Id* __restrict__ index, int64_t keys, T* __restrict__ out, int period,
                  int planes_per_block) {
  constexpr int V = kPiece<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const tables = reinterpret_cast<T*>(shared);  // (planes_per_block, most_rows, buckets)

  const int64_t plane_size = input.rows * keys;
  const int buckets = static_cast<int>(input.columns);
  const int table_stride = static_cast<int>(most_rows(kGatherThreads * V, keys, input.rows)) * buckets;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t lots = (input.planes + period - 1) / period;
  const int64_t groups = (lots + planes_per_block - 1) / planes_per_block * period;
  bool bad = false;

  for (int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
    const int64_t first_plane = group / period * planes_per_block * period + group % period;
    const int misaligned = static_cast<int>(first_plane * plane_size % V);
    const int64_t block_begin = int64_t{blockIdx.x} * kGatherThreads * V - misaligned;
    const int64_t block_end = min(block_begin + kGatherThreads * V, plane_size);
    if (block_end <= 0) continue;  // the same for all threads of the block
    const int64_t first_row = max(block_begin, int64_t{0}) / keys;
    const int rows = static_cast<int>((block_end - 1) / keys - first_row) + 1;

    __syncthreads();  // the tables of the group before have been read
    for (int pair = warp; pair < planes_per_block * rows; pair += kGatherThreads / kWarp) {
      const int64_t plane = first_plane + int64_t{pair / rows} * period;
      if (plane >= input.planes) break;
      const T* const source = input.row(plane, first_row + pair % rows);
      T* const target = tables + pair / rows * table_stride + pair % rows * buckets;
      for (int n = lane; n < buckets; n += kWarp) target[n] = source[n * input.column_stride];
    }

    const int64_t begin = block_begin + threadIdx.x * V;
    int offsets[V];
    if (begin < block_end) {
      int64_t row = max(begin, int64_t{0}) / keys;
      int64_t row_end = (row + 1) * keys;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int64_t place = begin + e;
        if (place == row_end) ++row, row_end += keys;
        const bool inside = place >= 0 && place < plane_size;
        offsets[e] = inside ? static_cast<int>(row - first_row) * buckets + safe_id(index[place], buckets, bad) : 0;
      }
    }
    __syncthreads();
    if (begin >= block_end) continue;

    for (int k = 0; k < planes_per_block; ++k) {
      const int64_t plane = first_plane + int64_t{k} * period;
      if (plane >= input.planes) break;
      union {
        uint4 whole;
        T parts[V];
      } piece;
#pragma unroll
      for (int e = 0; e < V; ++e) piece.parts[e] = tables[k * table_stride + offsets[e]];
      T* const target = out + plane * plane_size + begin;
      if (begin >= 0 && begin + V <= plane_size) {
        *reinterpret_cast<uint4*>(target) = piece.whole;
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (begin + e >= 0 && begin + e < plane_size) target[e] = piece.parts[e];
        }
      }
    }
  }
  stop_if(bad);
}

template <typename T, typename Id>
cudaError_t launch_gather(const Strided& tensor, const void* index, int64_t keys, void* out, cudaStream_t stream) {
  const View<T> input(tensor);
  const Id* const ids = static_cast<const Id*>(index);
  T* const result = static_cast<T*>(out);
  const int64_t plane_size = input.rows * keys;
  constexpr int V = kPiece<T>;
  constexpr int64_t kBlockElements = kGatherThreads * V;

  const int64_t table_bytes = most_rows(kBlockElements, keys, input.rows) * input.columns * sizeof(T);
  if (table_bytes > kDefaultSharedBytes) {
    const int64_t blocks = (input.planes * plane_size + kGatherThreads - 1) / kGatherThreads;
    gather_elements<T, Id><<<static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)), kGatherThreads, 0, stream>>>(
        input, ids, keys, result);
    return cudaGetLastError();
  }
  int period = 1;
  while (plane_size * period % V != 0) period *= 2;
  const int64_t lots = (input.planes + period - 1) / period;
  const int planes_per_block =
      static_cast<int>(std::min({int64_t{kPlanesPerBlock}, kDefaultSharedBytes / table_bytes, lots}));
  const int64_t groups = (lots + planes_per_block - 1) / planes_per_block * period;
  const dim3 grid(static_cast<unsigned>((plane_size + V - 1 + kBlockElements - 1) / kBlockElements),
                  static_cast<unsigned>(std::min(groups, kMaxGridY)));
  gather_pieces<T, Id><<<grid, kGatherThreads, planes_per_block * table_bytes, stream>>>(input, ids, keys, result,
                                                                                        period, planes_per_block);
  return cudaGetLastError();
}

// --------------------------------------------------------------------------------------- rpe_index_adjoint, obvious

template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(double x, double& y) { y = x; }
__device__ __forceinline__ void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

template <typename T, typename Id>
__global__ void sum_by_scanning(View<T> grad, const Id* __restrict__ index, int64_t buckets, T* __restrict__ out) {
  const int64_t total = grad.planes * grad.rows * buckets;
  bool bad = false;
  for (int64_t x = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; x < total; x += int64_t{gridDim.x} * blockDim.x) {
    const int64_t i = x / buckets % grad.rows;
    const T* const values = grad.row(x / buckets / grad.rows, i);
    typename Sum<T>::type sum = 0;
    for (int64_t j = 0; j < grad.columns; ++j) {
      const int id = safe_id(index[i * grad.columns + j], buckets, bad);
      if (id == x % buckets) sum += widen(values[j * grad.column_stride]);
    }
    narrow(sum, out[x]);
  }
  stop_if(bad);
}

// ------------------------------------------------------------------------------------------ rpe_index_adjoint, fast
//
// A lane owns one row of grad and one column of a (buckets, 32) histogram in shared memory, so nothing is shared and
// bank conflicts are rare. The 32 rows of a warp are the same i in 32 planes: all lanes meet the same id at the same
// time, and neighbouring keys often share a bucket, so a lane adds in a register until the id changes.
// Rows with adjacent columns are staged through shared memory, 128 bytes of each row at a time, in aligned 16-byte
// loads. A transposed grad (from rpe_q) has adjacent rows instead: its warps take 32 neighbouring i of one plane and
// read coalesced as they are. Where rows are few, `splits` warps share 32 rows and their histograms are added in order.

constexpr int kSumWarps = 4;
constexpr int kStagedBytes = 128;             // of each row and step
constexpr int kHistogramStride = kWarp + 1;   // 33: neither a lane's bucket nor a bucket's lanes meet in one bank
constexpr int kUnroll = 8;

template <typename T>
constexpr int kTileWords = sizeof(T) == 8 ? 38 : 37;  // 36 are used; 37 is odd, 38 keeps doubles aligned

template <typename T>
constexpr int64_t kTileBytes = kWarp * kTileWords<T> * 4;

template <typename T, typename Id, bool staged>
__global__ void __launch_bounds__(kSumWarps * kWarp)
    sum_by_rows(View<T> grad, const Id* __restrict__ index, int buckets, T* __restrict__ out, int splits) {
  using S = typename Sum<T>::type;
  constexpr int kStep = kStagedBytes / sizeof(T);
  constexpr int kPiecesPerRow = kStagedBytes / 16 + 1;  // one more, as the row may start inside a piece
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  S* const histogram = reinterpret_cast<S*>(shared) + warp * buckets * kHistogramStride;
  uint32_t* const tile = reinterpret_cast<uint32_t*>(
      reinterpret_cast<S*>(shared) + kSumWarps * buckets * kHistogramStride) + warp * kWarp * kTileWords<T>;
  for (int x = lane; x < buckets * kHistogramStride; x += kWarp) histogram[x] = 0;
  __syncwarp();

  const int split = warp % splits;
  const int64_t number = (int64_t{blockIdx.x} * (kSumWarps / splits) + warp / splits) * kWarp + lane;
  const bool active = number < grad.planes * grad.rows;
  const int64_t i = !active ? 0 : staged ? number / grad.planes : number % grad.rows;
  const int64_t plane = !active ? 0 : staged ? number % grad.planes : number / grad.rows;
  const T* const values = grad.row(plane, i);
  const Id* const ids = index + i * grad.columns;
  const uintptr_t row_begin = reinterpret_cast<uintptr_t>(values);
  const uintptr_t row_end = active ? row_begin + grad.columns * sizeof(T) : 0;
  const T* const mine = reinterpret_cast<const T*>(tile + lane * kTileWords<T>) + row_begin % 16 / sizeof(T);

  bool bad = false;
  int bucket = 0;
  S sum = 0;
  for (int64_t begin = int64_t{split} * kStep; begin < grad.columns; begin += int64_t{splits} * kStep) {
    if constexpr (staged) {
      __syncwarp();
#pragma unroll
      for (int x = lane; x < kWarp * kPiecesPerRow; x += kWarp) {
        const int row = x / kPiecesPerRow, part = x % kPiecesPerRow;
        const uintptr_t from = __shfl_sync(~0u, row_begin, row) + begin * sizeof(T);
        const uintptr_t end = __shfl_sync(~0u, row_end, row);
        const uintptr_t address = from / 16 * 16 + part * 16;  // 16 aligned bytes never leave the allocation
        uint32_t* const target = tile + row * kTileWords<T> + part * 4;
        if (address < end) {
          const uint4 piece = *reinterpret_cast<const uint4*>(address);
          target[0] = piece.x, target[1] = piece.y, target[2] = piece.z, target[3] = piece.w;
        }
      }
      __syncwarp();
    }
    const int count = active ? static_cast<int>(min(int64_t{kStep}, grad.columns - begin)) : 0;
    for (int c = 0; c < count; c += kUnroll) {
      int next_bucket[kUnroll];
      S next[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (c + u >= count) {
          next_bucket[u] = -1;
          continue;
        }
        next_bucket[u] = safe_id(ids[begin + c + u], buckets, bad);
        next[u] = widen(staged ? mine[c + u] : values[(begin + c + u) * grad.column_stride]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (next_bucket[u] < 0) break;
        if (next_bucket[u] != bucket) {
          histogram[bucket * kHistogramStride + lane] += sum;
          bucket = next_bucket[u];
          sum = 0;
        }
        sum += next[u];
      }
    }
  }
  histogram[bucket * kHistogramStride + lane] += sum;
  __syncthreads();

  // Lanes change from rows to buckets, so that a row of `out` is written as a whole.
  const S* const first_histogram = histogram - split * buckets * kHistogramStride;
  const int64_t out_row = active ? plane * grad.rows + i : -1;
  for (int row = split; row < kWarp; row += splits) {
    const int64_t target = __shfl_sync(~0u, out_row, row);
    if (target < 0) break;  // the rows after it are missing too
    for (int n = lane; n < buckets; n += kWarp) {
      S total = 0;
      for (int s = 0; s < splits; ++s) total += first_histogram[(s * buckets + n) * kHistogramStride + row];
      narrow(total, out[target * buckets + n]);
    }
  }
  stop_if(bad);
}

template <typename T, typename Id, bool staged>
cudaError_t launch_sum_by_rows(const View<T>& grad, const Id* ids, int buckets, T* out, int64_t shared_bytes,
                               cudaStream_t stream) {
  const auto kernel = sum_by_rows<T, Id, staged>;
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const int64_t groups = (grad.planes * grad.rows + kWarp - 1) / kWarp;
  // About 16 warps for each of some 130 multiprocessors hide the latency; fewer groups than that are shared out.
  // The number depends on the shape alone, hence so do the bits.
  const int splits = groups >= 2048 ? 1 : groups >= 1024 ? 2 : 4;
  const int64_t blocks = (groups * splits + kSumWarps - 1) / kSumWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), kSumWarps * kWarp, shared_bytes, stream>>>(grad, ids, buckets, out, splits);
  return cudaGetLastError();
}

template <typename T, typename Id>
cudaError_t launch_sum(const Strided& tensor, const void* index, int64_t buckets, void* out, cudaStream_t stream) {
  const View<T> grad(tensor);
  const Id* const ids = static_cast<const Id*>(index);
  T* const result = static_cast<T*>(out);
  int device = 0, most_shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  const int64_t histogram_bytes = kSumWarps * buckets * kHistogramStride * sizeof(typename Sum<T>::type);
  const bool staged = grad.column_stride == 1 || grad.columns == 1;
  const int64_t shared_bytes = histogram_bytes + (staged ? kSumWarps * kTileBytes<T> : 0);
  if (shared_bytes > most_shared) {
    const int64_t blocks = (grad.planes * grad.rows * buckets + kGatherThreads - 1) / kGatherThreads;
    sum_by_scanning<T, Id><<<static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)), kGatherThreads, 0, stream>>>(
        grad, ids, buckets, result);
    return cudaGetLastError();
  }
  return staged ? launch_sum_by_rows<T, Id, true>(grad, ids, static_cast<int>(buckets), result, shared_bytes, stream)
                : launch_sum_by_rows<T, Id, false>(grad, ids, static_cast<int>(buckets), result, shared_bytes, stream);
}

// ---------------------------------------------------------------------------------------------------------- dispatch

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

cudaError_t launch_rpe_index(const Strided& input, ValueType value_type, const void* index, IdType id_type,
                             int64_t keys, void* out, cudaStream_t stream) {
  return with_id(id_type, [&](auto id) {
    using Id = decltype(id);
    switch (value_type) {  // only bits are moved: the size of an element is all that matters
      case ValueType::kDouble: return launch_gather<uint64_t, Id>(input, index, keys, out, stream);
      case ValueType::kFloat: return launch_gather<uint32_t, Id>(input, index, keys, out, stream);
      case ValueType::kHalf:
      case ValueType::kBFloat16: return launch_gather<uint16_t, Id>(input, index, keys, out, stream);
    }
    return cudaErrorInvalidValue;
  });
}

cudaError_t launch_rpe_index_adjoint(const Strided& grad, ValueType value_type, const void* index, IdType id_type,
                                     int64_t buckets, void* out, cudaStream_t stream) {
  return with_id(id_type, [&](auto id) {
    using Id = decltype(id);
    switch (value_type) {
      case ValueType::kDouble: return launch_sum<double, Id>(grad, index, buckets, out, stream);
      case ValueType::kFloat: return launch_sum<float, Id>(grad, index, buckets, out, stream);
      case ValueType::kHalf: return launch_sum<__half, Id>(grad, index, buckets, out, stream);
      case ValueType::kBFloat16: return launch_sum<__nv_bfloat16, Id>(grad, index, buckets, out, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace irpe
