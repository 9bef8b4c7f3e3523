// SPDX-License-Identifier: Apache-2.0
// Gradients of tables: products of tokens with the gradients of their lookups, over all tokens.
#include <algorithm>

#include "attention_tiles.cuh"

namespace irpe {
namespace {

constexpr int kMostBlocks = 528, kTile = 64, kElements = kHeadDim * kMostBuckets;

// What table `number` of all gradients' is.
struct Which {
  int gradient, table;
};

__device__ __forceinline__ Which find_table(const TableGradients& gradients, int number) {
  int gradient = 0;
  while (number >= gradients.all[gradient].tables) number -= gradients.all[gradient++].tables;
  return {gradient, number};
}

// parts of the gradients: the transpose of x times grad. A warp has 16 of the 64 dimensions.
template <typename T>
__global__ void __launch_bounds__(128)
    multiply_tokens(const TableGradients gradients, int batch, int heads, int length, float* parts) {
  if (!kAmpere) return;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = (length + kTile - 1) / kTile;
  const Lane lanes(lane);
  const Which here = find_table(gradients, blockIdx.y);
  const Heads x = gradients.all[here.gradient].x, grad = gradients.all[here.gradient].grad;
  const int heads_here = heads / gradients.all[here.gradient].tables, planes = batch * heads_here, items = planes * tiles;
  const auto fetch_item = [&](int item, int buffer) {
    T* const to = reinterpret_cast<T*>(shared) + buffer * 2 * kTile * kHeadDim;
    const int first = item / planes * kTile, plane = item % planes, b = plane / heads_here, h = here.table + plane % heads_here;
    const T *const rows = head_of<T>(x, b, h), *const grads = head_of<T>(grad, b, h);
    fetch_tile(to, rows + first * x.row_stride, x.row_stride, kTile, length - first);
    for (int piece = threadIdx.x; piece < kTile * (kMostBuckets / 8); piece += blockDim.x) {
      const int row = piece / (kMostBuckets / 8), chunk = piece % (kMostBuckets / 8), token = first + row;
      const bool valid = token < length;
      copy<16>(chunk_of(to + kTile * kHeadDim, row, chunk), grads + (valid ? token : 0) * grad.row_stride + chunk * 8, valid);
    }
  };
  float sums[8][4] = {};
  if (blockIdx.x < items) fetch_item(blockIdx.x, 0);
  for (int item = blockIdx.x, buffer = 0; item < items; item += gridDim.x, buffer ^= 1) {
    const Place rows = place_at(shared) + buffer * 2 * kTile * kRowBytes;
    wait_for_copies();
    __syncthreads();
    if (item + static_cast<int>(gridDim.x) < items) fetch_item(item + gridDim.x, buffer ^ 1);
    const int count = min(kTile, length - item / planes * kTile);
    for (int first = 0; first < count; first += 16) {
      uint32_t left[4];
      load_matrices_transposed(left, ((rows + lanes.as_columns) ^ (32 * warp)) + first * kRowBytes);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        uint32_t m[4];
        load_matrices_transposed(m, ((rows + lanes.as_rows) ^ (32 * c)) + (kTile + first) * kRowBytes);
        multiply(sums[2 * c], left[0], left[1], left[2], left[3], m[0], m[1], T());
        if (c < 3) multiply(sums[2 * c + 1], left[0], left[1], left[2], left[3], m[2], m[3], T());
      }
    }
  }
  float* const place = parts + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kElements;
#pragma unroll
  for (int n = 0; n < kMostBuckets / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int dim = warp * 16 + lane / 4 + c / 2 * 8;
      place[dim * kMostBuckets + n * 8 + lane % 4 * 2 + c % 2] = sums[n][c];
    }
  }
}

// Sums of the parts, always in the same order. A block has 32 elements, and eight warps a share of the parts each.
__global__ void __launch_bounds__(256)
    add_parts(const TableGradients gradients, int buckets, int parts_of_each, const float* parts) {
  extern __shared__ __align__(128) unsigned char shared[];
  float* const sums = reinterpret_cast<float*>(shared);  // (8, 32)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, element = blockIdx.x * 32 + lane;
  float sum = 0;
#pragma unroll 4
  for (int part = warp; part < parts_of_each; part += 8) {
    sum += parts[(static_cast<int64_t>(part) * gridDim.y + blockIdx.y) * kElements + element];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  const int dim = element / kMostBuckets, bucket = element % kMostBuckets;
  if (warp > 0 || bucket >= buckets) return;
#pragma unroll
  for (int x = 1; x < 8; ++x) sum += sums[x * 32 + lane];
  const Which here = find_table(gradients, blockIdx.y);
  const TableGradient& gradient = gradients.all[here.gradient];
  const int place = gradient.of_values ? bucket * kHeadDim + dim : dim * buckets + bucket;
  gradient.out[here.table * kHeadDim * buckets + place] = sum;
}

int tables_of(const TableGradients& gradients) {
  int tables = 0;
  for (int x = 0; x < gradients.count; ++x) tables += gradients.all[x].tables;
  return tables;
}

int parts_of_each(const TableGradients& gradients) { return std::max(1, kMostBlocks / tables_of(gradients)); }

}  // namespace

int64_t floats_of_parts(const TableGradients& gradients) {
  return static_cast<int64_t>(parts_of_each(gradients)) * tables_of(gradients) * kElements;
}

cudaError_t launch_table_gradients(const TableGradients& gradients, int batch, int heads, int length, int buckets,
                                   bool is_bfloat16, float* parts, cudaStream_t stream) {
  const auto kernel = is_bfloat16 ? multiply_tokens<__nv_bfloat16> : multiply_tokens<__half>;
  const int tables = tables_of(gradients), each = parts_of_each(gradients);
  kernel<<<dim3(each, tables), 128, 4 * kTile * kRowBytes, stream>>>(gradients, batch, heads, length, parts);
  if (const cudaError_t error = cudaGetLastError()) return error;
  add_parts<<<dim3(kElements / 32, tables), 256, 256 * sizeof(float), stream>>>(gradients, buckets, each, parts);
  return cudaGetLastError();
}

}  // namespace irpe
