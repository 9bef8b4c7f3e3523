// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of rpe_index_adjoint: sums by bucket.
#include "rpe_index_kernels.cuh"

namespace irpe {
namespace {

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
      const int id = safe_id(index[i * grad.columns + j], static_cast<int>(buckets), bad);
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
    const int64_t blocks = (grad.planes * grad.rows * buckets + kThreads - 1) / kThreads;
    sum_by_scanning<T, Id><<<static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)), kThreads, 0, stream>>>(
        grad, ids, buckets, result);
    return cudaGetLastError();
  }
  return staged ? launch_sum_by_rows<T, Id, true>(grad, ids, static_cast<int>(buckets), result, shared_bytes, stream)
                : launch_sum_by_rows<T, Id, false>(grad, ids, static_cast<int>(buckets), result, shared_bytes, stream);
}

}  // namespace

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
