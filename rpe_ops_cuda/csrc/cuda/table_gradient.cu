// SPDX-License-Identifier: Apache-2.0
// Gradients of tables: products of tokens with the gradients of their lookups, over all tokens.
#include <algorithm>

#include "attention_tiles.cuh"

namespace irpe {
namespace {

constexpr int kMostParts = 528, kTile = 64;

// parts of the gradient of a table: the transpose of x times grad. A warp has 16 of the 64 dimensions.
template <typename T>
__global__ void __launch_bounds__(128) multiply_tokens(Heads x, Heads grad, int batch, int heads, int length, bool shared_table,
                                                       float* parts) {
  if (!kAmpere) return;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = (length + kTile - 1) / kTile;
  const Lane lanes(lane);
  const int table = shared_table ? 0 : blockIdx.y, heads_here = shared_table ? heads : 1;
  const int items = batch * heads_here * tiles;
  const auto fetch_item = [&](int item, int buffer) {
    T* const to = reinterpret_cast<T*>(shared) + buffer * 2 * kTile * kHeadDim;
    const int first = item % tiles * kTile, plane = item / tiles, b = plane / heads_here, h = table + plane % heads_here;
    const T *const rows = head_of<T>(x, b, h), *const grads = head_of<T>(grad, b, h);
    fetch_tile(to, rows + first * x.row_stride, x.row_stride, kTile, length - first);
    for (int piece = threadIdx.x; piece < kTile * (kMostBuckets / 8); piece += blockDim.x) {
      const int row = piece / (kMostBuckets / 8), chunk = piece % (kMostBuckets / 8), token = first + row;
      const bool valid = token < length;
      copy<16>(chunk_of(to + kTile * kHeadDim, row, chunk), grads + (valid ? token : 0) * grad.row_stride + chunk * 8, valid);
    }
  };
  float sums[8][4] = {};
  fetch_item(blockIdx.x, 0);
  for (int item = blockIdx.x, buffer = 0; item < items; item += gridDim.x, buffer ^= 1) {
    const Place rows = place_at(shared) + buffer * 2 * kTile * kRowBytes;
    wait_for_copies();
    __syncthreads();
    if (item + static_cast<int>(gridDim.x) < items) fetch_item(item + gridDim.x, buffer ^ 1);
    const int count = min(kTile, length - item % tiles * kTile);
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
  float* const place = parts + (static_cast<int64_t>(blockIdx.x) * gridDim.y + table) * kHeadDim * kMostBuckets;
#pragma unroll
  for (int n = 0; n < kMostBuckets / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int dim = warp * 16 + lane / 4 + c / 2 * 8;
      place[dim * kMostBuckets + n * 8 + lane % 4 * 2 + c % 2] = sums[n][c];
    }
  }
}

}  // namespace

int table_gradient_parts(int batch, int length) {
  return std::min(kMostParts, batch * ((length + kTile - 1) / kTile));
}

cudaError_t launch_table_gradient(const Heads& x, const Heads& grad, int batch, int heads, int length, bool shared,
                                  bool is_bfloat16, float* parts, cudaStream_t stream) {
  const auto kernel = is_bfloat16 ? multiply_tokens<__nv_bfloat16> : multiply_tokens<__half>;
  const dim3 grid(table_gradient_parts(batch, length), shared ? 1 : heads);
  kernel<<<grid, 128, 4 * kTile * kRowBytes, stream>>>(x, grad, batch, heads, length, shared, parts);
  return cudaGetLastError();
}

}  // namespace irpe
