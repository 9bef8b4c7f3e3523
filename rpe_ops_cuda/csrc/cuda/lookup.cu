// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of rpe_index: a gather.
#include "rpe_index_kernels.cuh"

namespace irpe {
namespace {

// A thread owns one 16-byte piece of a plane (rows of 197 elements do not start at multiples of 16 bytes, so pieces
// run across row ends) and writes it for many planes with one 16-byte store each. Planes of odd size start at different
// alignments; every `period`-th plane starts at the same one, so a thread takes planes that are `period` apart and keeps
// its ids, already turned into offsets into a plane's table, in registers. A warp reads two or three rows of a table
// again and again: they are in L1, and copies in shared memory are hardly faster.

constexpr int kPlanesPerThread = 16;
constexpr int kAtOnce = 2;  // planes whose loads are in flight together

template <typename T>
constexpr int kPiece = 16 / sizeof(T);

template <typename T, typename Id>
__global__ void __launch_bounds__(kThreads)
    gather_pieces(View<T> input, const Id* __restrict__ index, int keys, T* __restrict__ out, int period,
                  unsigned chunks) {
  constexpr int V = kPiece<T>;
  const int buckets = static_cast<int>(input.columns), plane_size = static_cast<int>(input.rows) * keys;
  const unsigned group = blockIdx.x / chunks;
  const int planes = static_cast<int>(input.planes), heads = static_cast<int>(input.heads);
  const int first_plane = static_cast<int>(group / period * period * kPlanesPerThread + group % period);
  const int misaligned = static_cast<int>(int64_t{first_plane} * plane_size % V);
  const int begin = static_cast<int>((blockIdx.x % chunks * kThreads + threadIdx.x) * V) - misaligned;
  if (begin >= plane_size || first_plane >= planes) return;

  const int first = max(-begin, 0), last = min(plane_size - begin, V);  // the part of the piece inside the plane
  const int row = (begin + first) / keys;
  int offsets[V], column = begin + first - row * keys, below = 0;
  bool bad = false;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    offsets[e] = 0;
    if (e < first || e >= last) continue;
    offsets[e] = below + safe_id(index[begin + e], buckets, bad) * static_cast<int>(input.column_stride);
    if (++column == keys) column = 0, below += static_cast<int>(input.row_stride);
  }
  int head = first_plane % heads;
  const int64_t step = period / heads * input.batch_stride + period % heads * input.head_stride;
  const int64_t to_next_batch = input.batch_stride - heads * input.head_stride;
  const T* table = input.row(first_plane, row);
  T* target = out + int64_t{first_plane} * plane_size + begin;
  const int count = min(kPlanesPerThread, (planes - first_plane + period - 1) / period);
  for (int k = 0; k < count; k += kAtOnce) {
    union {
      uint4 whole;
      T parts[V];
    } pieces[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (k + u >= count) break;
#pragma unroll
      for (int e = 0; e < V; ++e) pieces[u].parts[e] = __ldg(table + offsets[e]);
      table += step;
      head += period % heads;
      if (head >= heads) head -= heads, table += to_next_batch;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (k + u >= count) break;
      if (first == 0 && last == V) {
        *reinterpret_cast<uint4*>(target) = pieces[u].whole;
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (e >= first && e < last) target[e] = pieces[u].parts[e];
        }
      }
      target += int64_t{period} * plane_size;
    }
  }
  stop_if(bad);
}

template <typename T, typename Id>
cudaError_t launch_gather(const Strided& tensor, const void* index, int64_t keys, void* out, cudaStream_t stream) {
  const View<T> input(tensor);
  constexpr int V = kPiece<T>, kBlock = kThreads * V;
  const int64_t plane_size = input.rows * keys;
  int period = 1;
  while (plane_size * period % V != 0) period *= 2;
  const int64_t lot = int64_t{period} * kPlanesPerThread, groups = (input.planes + lot - 1) / lot * period;
  const int64_t chunks = (plane_size + V - 1 + kBlock - 1) / kBlock;
  const int64_t reach = input.columns * input.column_stride + V * input.row_stride;
  if (std::max({input.planes, plane_size, groups * chunks, reach}) > kMost) return cudaErrorInvalidConfiguration;
  gather_pieces<T, Id><<<static_cast<unsigned>(groups * chunks), kThreads, 0, stream>>>(
      input, static_cast<const Id*>(index), static_cast<int>(keys), static_cast<T*>(out), period,
      static_cast<unsigned>(chunks));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_rpe_index(const Strided& input, ValueType value_type, const void* index, IdType id_type,
                             int64_t keys, void* out, cudaStream_t stream) {
  return with_id(id_type, [&](auto id) {
    using Id = decltype(id);
    switch (value_type) {  // only bits are moved: just the element size matters
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
  const bool found = cudaFuncGetAttributes(&attributes, gather_pieces<uint32_t, uint8_t>) == cudaSuccess;
  cudaGetLastError();  // clear it, or the next launch would report it
  return found;
}

}  // namespace irpe
