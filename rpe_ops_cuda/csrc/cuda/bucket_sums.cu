// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of rpe_index_adjoint: sums by bucket.
#include "rpe_index_kernels.cuh"
#include "warp.cuh"

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

// The ids of row i, `stride` apart.
template <typename Id>
struct Ids {
  const Id* index;
  int64_t row_stride, stride;

  __device__ const Id* row(int64_t i) const { return index + i * row_stride; }
};

template <typename T, typename Id>
__device__ typename Sum<T>::type sum_of(View<T> grad, Ids<Id> ids, int64_t plane, int64_t i, int bucket, int buckets,
                                        bool& bad) {
  typename Sum<T>::type sum = 0;
  for (int64_t j = 0; j < grad.columns; ++j) {
    const int id = safe_id(ids.row(i)[j * ids.stride], buckets, bad);
    if (id == bucket) sum += widen(grad.row(plane, i)[j * grad.column_stride]);
  }
  return sum;
}

template <typename T, typename Id>
__global__ void sum_by_scanning(View<T> grad, Ids<Id> ids, int buckets, T* __restrict__ out) {
  const int64_t total = grad.planes * grad.rows * buckets;
  bool bad = false;
  for (int64_t x = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; x < total; x += int64_t{gridDim.x} * blockDim.x) {
    const int64_t i = x / buckets % grad.rows;
    narrow(sum_of(grad, ids, x / buckets / grad.rows, i, static_cast<int>(x % buckets), buckets, bad), out[x]);
  }
  stop_if(bad);
}

// ------------------------------------------------------------------------------------------ rpe_index_adjoint, fast
//
// A lane owns one row of grad and one column of a (buckets, 32) histogram in shared memory, so lanes share nothing and
// bank conflicts are rare. The 32 rows of a warp are the same i in 32 planes: all lanes meet the same id at the same
// time, and neighbouring keys often share a bucket, so a lane adds in a register until the id changes.
// Rows with adjacent columns are staged through shared memory, 128 bytes of each row at a time, in aligned 16-byte
// loads. A transposed grad (from rpe_q) has adjacent rows instead: its warps take 32 neighbouring i of one plane, whose
// loads are coalesced anyway. If rows are few, `splits` warps share 32 rows and their histograms are added in order.

constexpr int kSumWarps = 4;
constexpr int kStagedBytes = 128;                    // of each row, per step
constexpr int kPiecesPerRow = kStagedBytes / 16 + 1;  // one more, as the row may start inside a piece
constexpr int kHistogramStride = kWarp + 1;          // 33: neither a lane's buckets nor a bucket's lanes share a bank
constexpr int kUnroll = 8;

template <typename T>
constexpr int kTileWords = sizeof(T) == 8 ? 38 : 37;  // 36 are used; 37 is odd, 38 keeps doubles aligned

template <typename T>
constexpr int64_t kTileBytes = kWarp * kTileWords<T> * 4;

template <typename T, typename Id, bool staged>
__global__ void __launch_bounds__(kSumWarps * kWarp, 5)
    sum_by_rows(View<T> grad, Ids<Id> all_ids, int buckets, T* __restrict__ out, int splits) {
  using S = typename Sum<T>::type;
  constexpr int kStep = kStagedBytes / sizeof(T);
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
  const Id* const ids = all_ids.row(i);
  const int64_t id_stride = staged ? 1 : all_ids.stride;
  const uintptr_t row_begin = reinterpret_cast<uintptr_t>(values);
  const T* const mine = reinterpret_cast<const T*>(tile + lane * kTileWords<T>) + row_begin % 16 / sizeof(T);

  // Which pieces of which rows this lane copies at each step: the first, and how many follow.
  const uint4* from[kPiecesPerRow];
  int left[kPiecesPerRow];
#pragma unroll
  for (int k = 0; staged && k < kPiecesPerRow; ++k) {
    const int row = (lane + k * kWarp) / kPiecesPerRow, part = (lane + k * kWarp) % kPiecesPerRow;
    const uintptr_t begin = __shfl_sync(~0u, row_begin, row);
    from[k] = reinterpret_cast<const uint4*>(begin / 16 * 16) + part;  // 16 aligned bytes never leave the allocation
    left[k] = static_cast<int>((begin % 16 + grad.columns * sizeof(T) + 15) / 16) - part;
  }

  S* const column = histogram + lane;
  bool bad = false;
  int bucket = 0;
  S sum = 0;
  for (int64_t begin = int64_t{split} * kStep; begin < grad.columns; begin += int64_t{splits} * kStep) {
    if constexpr (staged) {
      __syncwarp();
#pragma unroll
      for (int k = 0; k < kPiecesPerRow; ++k) {
        const int row = (lane + k * kWarp) / kPiecesPerRow, part = (lane + k * kWarp) % kPiecesPerRow;
        const int done = static_cast<int>(begin * sizeof(T) / 16);
        uint32_t* const target = tile + row * kTileWords<T> + part * 4;
        if (done < left[k]) {
          const uint4 piece = __ldg(from[k] + done);
          target[0] = piece.x, target[1] = piece.y, target[2] = piece.z, target[3] = piece.w;
        }
      }
      __syncwarp();
    }
    const auto add = [&](auto many, int c) {
      constexpr int n = decltype(many)::value;
      int next_bucket[n];
      S next[n];
#pragma unroll
      for (int u = 0; u < n; ++u) {
        next_bucket[u] = safe_id(__ldg(ids + (begin + c + u) * id_stride), buckets, bad);
        next[u] = widen(staged ? mine[c + u] : values[(begin + c + u) * grad.column_stride]);
      }
#pragma unroll
      for (int u = 0; u < n; ++u) {
        if (next_bucket[u] != bucket) {
          column[bucket * kHistogramStride] = sum;
          bucket = next_bucket[u];
          sum = column[bucket * kHistogramStride];
        }
        sum += next[u];
      }
    };
    const int count = active ? static_cast<int>(min(int64_t{kStep}, grad.columns - begin)) : 0;
    int c = 0;
#pragma unroll 1
    for (; c + kUnroll <= count; c += kUnroll) add(std::integral_constant<int, kUnroll>{}, c);
  #pragma unroll 1
    for (; c < count; ++c) add(std::integral_constant<int, 1>{}, c);
  }
  column[bucket * kHistogramStride] = sum;
  __syncthreads();

  // Lanes switch from rows to buckets, so that a row of `out` is written in one piece.
  const S* const first_histogram = histogram - split * buckets * kHistogramStride;
  const int64_t out_row = active ? plane * grad.rows + i : -1;
  for (int row = split; row < kWarp; row += splits) {
    const int64_t target = __shfl_sync(~0u, out_row, row);
    if (target < 0) break;  // so are all later rows
    for (int n = lane; n < buckets; n += kWarp) {
      S total = 0;
#pragma unroll 1
      for (int s = 0; s < splits; ++s) total += first_histogram[(s * buckets + n) * kHistogramStride + row];
      narrow(total, out[target * buckets + n]);
    }
  }
  stop_if(bad);
}

template <typename T, typename Id, bool staged>
cudaError_t launch_sum_by_rows(const View<T>& grad, Ids<Id> ids, int buckets, T* out, int64_t shared_bytes,
                               cudaStream_t stream) {
  const auto kernel = sum_by_rows<T, Id, staged>;
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const int64_t groups = (grad.planes * grad.rows + kWarp - 1) / kWarp;
  // About 16 warps for each of some 130 multiprocessors hide the latency; fewer groups than that are split.
  // The number depends only on the shape, and so do the bits of the sums.
  const int splits = groups >= 2048 ? 1 : groups >= 1024 ? 2 : 4;
  const int64_t blocks = (groups * splits + kSumWarps - 1) / kSumWarps;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), kSumWarps * kWarp, shared_bytes, stream>>>(grad, ids, buckets, out, splits);
  return cudaGetLastError();
}

// ------------------------------------------------------------------------------------------ halves, on tensor cores
//
// For one i, the sums of all planes are a product, (buckets, keys) by (keys, planes), whose first factor is the one-hot
// matrix of the ids. A warp takes 32 planes and 64 buckets and makes that factor in registers. The order of the keys in a
// product is free, so a lane takes eight adjacent ones, one aligned 16-byte load of each row; the planes of a warp are
// `period` apart, so that their rows have the same alignment.

constexpr int kPlanesPerWarp = 32;
constexpr int kTiles = 4;  // of 16 buckets

template <typename T>
union Piece {
  uint4 whole;
  uint32_t words[4];
  T parts[8];
};

template <typename T, typename Id>
__global__ void __launch_bounds__(kSumWarps * kWarp, 3)
    sum_by_products(View<T> grad, Ids<Id> all_ids, int buckets, T* __restrict__ out, int period, int slices) {
  const int lane = threadIdx.x % kWarp, group = lane / 4, part = lane % 4;
  const int rows = static_cast<int>(grad.rows), planes = static_cast<int>(grad.planes);
  const int keys = static_cast<int>(grad.columns);
  const unsigned task = blockIdx.x * kSumWarps + threadIdx.x / kWarp;
  const int first_bucket = static_cast<int>(task % slices) * kTiles * 16;
  const int i = static_cast<int>(task / slices % rows), lot = static_cast<int>(task / slices / rows);
  const int first_plane = lot / period * period * kPlanesPerWarp + lot % period;
  if (first_plane >= planes) return;

  const auto row_of = [&](int number) {
    const int plane = first_plane + period * number;
    return reinterpret_cast<const char*>(grad.row(plane < planes ? plane : first_plane, i));
  };
  for (int byte = 0; byte < keys * 2; byte += 128) fetch(row_of(lane) + byte);
  const uint4* pieces[4];
  int skew = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(row_of(group + 8 * r));
    pieces[r] = reinterpret_cast<const uint4*>(begin / 16 * 16) + part;  // 16 aligned bytes never leave the allocation
    skew = static_cast<int>(begin % 16 / sizeof(T));
  }
  const Id* const ids = all_ids.row(i);
  T one;
  narrow(1.0f, one);
  const uint32_t ones = *reinterpret_cast<const uint16_t*>(&one) * 0x10001u;

  float sums[4][kTiles][4] = {};
  Piece<T> next[4];
  bool bad = false;
#pragma unroll
  for (int r = 0; r < 4; ++r) next[r].whole = part * 8 - skew < keys ? __ldg(pieces[r]) : make_uint4(0, 0, 0, 0);
#pragma unroll 2
  for (int begin = -skew; begin < keys; begin += kWarp) {
    const int j = begin + part * 8;
    Piece<T> values[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      values[r] = next[r];
      pieces[r] += 4;
      if (j + kWarp < keys) next[r].whole = __ldg(pieces[r]);
    }
    int places[8];  // of eight keys, counted from the first bucket of this lane
    if (j >= 0 && j + 8 <= keys) {
#pragma unroll
      for (int e = 0; e < 8; ++e) places[e] = safe_id(__ldg(ids + j + e), buckets, bad) - first_bucket - group;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        places[e] = -1;
        if (j + e >= 0 && j + e < keys) {
          places[e] = safe_id(__ldg(ids + j + e), buckets, bad) - first_bucket - group;
        } else {
#pragma unroll
          for (int r = 0; r < 4; ++r) narrow(0.0f, values[r].parts[e]);  // it may be NaN, and NaN times zero is NaN
        }
      }
    }
#pragma unroll
    for (int w = 0; w < 4; w += 2) {
      const __half2 front = __floats2half2_rn(places[2 * w], places[2 * w + 1]);  // small integers are exact
      const __half2 back = __floats2half2_rn(places[2 * w + 2], places[2 * w + 3]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const __half2 low = __float2half2_rn(16.0f * n), high = __float2half2_rn(16.0f * n + 8);
        const uint32_t a0 = __heq2_mask(front, low) & ones, a1 = __heq2_mask(front, high) & ones;
        const uint32_t a2 = __heq2_mask(back, low) & ones, a3 = __heq2_mask(back, high) & ones;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          multiply(sums[r][n], a0, a1, a2, a3, values[r].words[w], values[r].words[w + 1], one);
        }
      }
    }
  }

  bool finite = true;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int plane = first_plane + period * (8 * r + part * 2 + x % 2);
      T* const target = out + (int64_t{plane} * rows + i) * buckets;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int bucket = first_bucket + n * 16 + x / 2 * 8 + group;
        finite = finite && isfinite(sums[r][n][x]);
        if (plane < planes && bucket < buckets) narrow(sums[r][n][x], target[bucket]);
      }
    }
  }
  // A NaN or infinity, times zero, has spread NaN to all buckets of its row: sum such rows again, one by one.
  if (__any_sync(~0u, !finite)) {
    const int end = min(buckets, first_bucket + kTiles * 16);
    for (int plane = first_plane; plane < min(planes, first_plane + period * kPlanesPerWarp); plane += period) {
      T* const target = out + (int64_t{plane} * rows + i) * buckets;
      for (int n = first_bucket + lane; n < end; n += kWarp) {
        narrow(sum_of(grad, all_ids, plane, i, n, buckets, bad), target[n]);
      }
    }
  }
  stop_if(bad);
}

// After how many planes rows have the same alignment to 16 bytes again; 0 if they never do.
template <typename T>
int period_of(const View<T>& grad) {
  const int64_t batch = grad.planes > grad.heads ? grad.batch_stride : grad.heads * grad.head_stride;
  const int64_t head = grad.heads > 1 ? grad.head_stride : batch;
  if (grad.column_stride != 1 || (batch != grad.heads * head && (batch % 8 != 0 || head % 8 != 0))) return 0;
  int period = 1;
  while (head * period % 8 != 0) period *= 2;
  return period;
}

template <typename T, typename Id>
cudaError_t launch_sum(const Strided& tensor, const void* index, int64_t buckets_, void* out, cudaStream_t stream) {
  const View<T> grad(tensor);
  const bool turned = ids_are_transposed(tensor);
  const Ids<Id> ids{static_cast<const Id*>(index), turned ? 1 : grad.columns, turned ? grad.rows : 1};
  T* const result = static_cast<T*>(out);
  if (std::max({grad.planes, grad.rows, grad.columns, buckets_}) > kMost) return cudaErrorInvalidConfiguration;
  const int buckets = static_cast<int>(buckets_);
  int device = 0, most_shared = 0, generation = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(T) == 2) {
    const int64_t period = period_of(grad), slices = (buckets + kTiles * 16 - 1) / (kTiles * 16);
    const int64_t lot = std::max<int64_t>(period, 1) * kPlanesPerWarp, lots = (grad.planes + lot - 1) / lot * period;
    const int64_t blocks = (lots * grad.rows * slices + kSumWarps - 1) / kSumWarps;
    if (generation >= 8 && period > 0 && blocks < kMost / kSumWarps) {
      sum_by_products<T, Id><<<static_cast<unsigned>(blocks), kSumWarps * kWarp, 0, stream>>>(
          grad, ids, buckets, result, static_cast<int>(period), static_cast<int>(slices));
      return cudaGetLastError();
    }
  }
  const int64_t histogram_bytes = kSumWarps * buckets * kHistogramStride * sizeof(typename Sum<T>::type);
  const int64_t shared_bytes = histogram_bytes + (turned ? 0 : kSumWarps * kTileBytes<T>);
  if (shared_bytes > most_shared) {
    const int64_t blocks = (grad.planes * grad.rows * buckets + kThreads - 1) / kThreads;
    sum_by_scanning<T, Id><<<static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)), kThreads, 0, stream>>>(
        grad, ids, buckets, result);
    return cudaGetLastError();
  }
  return turned ? launch_sum_by_rows<T, Id, false>(grad, ids, buckets, result, shared_bytes, stream)
                : launch_sum_by_rows<T, Id, true>(grad, ids, buckets, result, shared_bytes, stream);
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
