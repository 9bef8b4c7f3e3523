// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of rpe_index: a gather.
#include "rpe_index_kernels.cuh"

namespace irpe {
namespace {

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

constexpr int64_t kMaxGridY = 65535;
constexpr int kPlanesPerBlock = 4;

template <typename T>
constexpr int kPiece = 16 / sizeof(T);

__host__ __device__ inline int64_t most_rows(int64_t elements, int64_t keys, int64_t rows) {
  const int64_t touched = (elements - 1) / keys + 2;
  return touched < rows ? touched : rows;
}

template <typename T, typename Id>
__global__ void __launch_bounds__(kThreads)
    gather_pieces(View<T> input, const Id* __restrict__ index, int64_t keys, T* __restrict__ out, int period,
                  int planes_per_block) {
  constexpr int V = kPiece<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const tables = reinterpret_cast<T*>(shared);  // (planes_per_block, most_rows, buckets)

  const int64_t plane_size = input.rows * keys;
  const int buckets = static_cast<int>(input.columns);
  const int table_stride = static_cast<int>(most_rows(kThreads * V, keys, input.rows)) * buckets;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t lots = (input.planes + period - 1) / period;
  const int64_t groups = (lots + planes_per_block - 1) / planes_per_block * period;
  bool bad = false;

  for (int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
    const int64_t first_plane = group / period * planes_per_block * period + group % period;
    const int misaligned = static_cast<int>(first_plane * plane_size % V);
    const int64_t block_begin = int64_t{blockIdx.x} * kThreads * V - misaligned;
    const int64_t block_end = min(block_begin + kThreads * V, plane_size);
    if (block_end <= 0) continue;  // the same for all threads of the block
    const int64_t first_row = max(block_begin, int64_t{0}) / keys;
    const int rows = static_cast<int>((block_end - 1) / keys - first_row) + 1;

    __syncthreads();  // the tables of the group before have been read
    for (int pair = warp; pair < planes_per_block * rows; pair += kThreads / kWarp) {
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
  constexpr int64_t kBlockElements = kThreads * V;

  const int64_t table_bytes = most_rows(kBlockElements, keys, input.rows) * input.columns * sizeof(T);
  if (table_bytes > kDefaultSharedBytes) {
    const int64_t blocks = (input.planes * plane_size + kThreads - 1) / kThreads;
    gather_elements<T, Id><<<static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)), kThreads, 0, stream>>>(
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
  gather_pieces<T, Id><<<grid, kThreads, planes_per_block * table_bytes, stream>>>(input, ids, keys, result,
                                                                                        period, planes_per_block);
  return cudaGetLastError();
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

bool has_code_for_this_device() {
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, gather_elements<uint32_t, uint8_t>) == cudaSuccess;
  cudaGetLastError();  // else the next launch would be told of it
  return found;
}

}  // namespace irpe
