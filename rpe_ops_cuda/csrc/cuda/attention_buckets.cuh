// SPDX-License-Identifier: Apache-2.0
// Sums by bucket over the columns that a warp's 16 rows meet, in shared memory and without atomics.
#pragma once

#include "attention_tiles.cuh"

namespace irpe {
namespace {

constexpr int kSumBytes = kMostBuckets * 32 * 4;  // of a warp: for each bucket a float per lane

__device__ __forceinline__ void clear_buckets(unsigned char* sums, int lane) {
#pragma unroll
  for (int x = 0; x < kSumBytes; x += 512) *reinterpret_cast<uint4*>(sums + x + lane * 16) = make_uint4(0, 0, 0, 0);
}

// rows (16, 64) += weights (16, 16) times 16 rows of a tile; and each weight is added to the sum of its bucket, whose loads
// take their time while the tensor cores multiply. Lanes 2 p and 2 p + 1 exchange halves of the weights: one takes row g, the
// other row g + 8, so that no two lanes ever add to one place. `sums`: the lane's.
template <typename T>
__device__ __forceinline__ void add_rows_and_buckets(float (&rows)[8][4], Place sums, const uint32_t (&weights)[4], uint2 ids,
                                                     Place tile_rows, const Lane& lanes) {
  const bool odd = lanes.lane % 2;
  // Of a word of ids the lower half is for row g, the upper one for row g + 8.
  const uint32_t upper_ids = __byte_perm(ids.x, ids.y, 0x5410), lower_ids = __byte_perm(ids.x, ids.y, 0x7632);
  const uint32_t kept_ids = odd ? lower_ids : upper_ids, got_ids = __shfl_xor_sync(~0u, odd ? upper_ids : lower_ids, 1);
  uint32_t pairs[4];
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    pairs[2 * b] = odd ? weights[2 * b + 1] : weights[2 * b];
    pairs[2 * b + 1] = __shfl_xor_sync(~0u, odd ? weights[2 * b] : weights[2 * b + 1], 1);
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const uint32_t here = c % 2 ? got_ids : kept_ids;
    const Place first = place_of(here, c / 2 * 2, 128, sums), second = place_of(here, c / 2 * 2 + 1, 128, sums);
    const float one = load(first), two = load(second);
    add_columns<T>(rows, weights, tile_rows, lanes, c);
    const float2 terms = unpacked(pairs[c], T());
    store(first, one + terms.x);
    store(second, two + terms.y + (first == second ? terms.x : 0.f));
  }
}

// A warp's bucket sums, times a factor for rows g and one for rows g + 8 of g = lane % 8, as 16 rows of a tile.
template <typename T>
__device__ __forceinline__ void gather_buckets(T* rows, const unsigned char* sums, float upper, float lower, int lane) {
  const int g = lane % 8;
#pragma unroll
  for (int n = 0; n < kMostBuckets / 8; ++n) {
    float4 both[2];
    for (int x = 0; x < 2; ++x) {
      both[x] = *reinterpret_cast<const float4*>(sums + (8 * n + lane / 8 * 2 + x) * 128 + g * 16);
    }
    const int within = lane / 8 * 2;
    *reinterpret_cast<uint32_t*>(chunk_of(rows, g, n) + within) =
        packed((both[0].x + both[0].z) * upper, (both[1].x + both[1].z) * upper, T());
    *reinterpret_cast<uint32_t*>(chunk_of(rows, g + 8, n) + within) =
        packed((both[0].y + both[0].w) * lower, (both[1].y + both[1].w) * lower, T());
  }
  if (lane < kRows) *reinterpret_cast<uint4*>(chunk_of(rows, lane, 7)) = make_uint4(0, 0, 0, 0);
}

// rows (16, 64) += the warp's bucket sums, times the factors of `gather_buckets`, times the table. The sums are also written to
// `to`, from row `first` of a head on, if it has data. `room`: 16 rows of a tile.
template <typename T>
__device__ __forceinline__ void add_buckets(float (&rows)[8][4], T* room, const unsigned char* sums, float upper, float lower,
                                            const T* table, const Heads& to, int batch, int head, int first, int length,
                                            const Lane& lanes) {
  gather_buckets(room, sums, upper, lower, lanes.lane);
  __syncwarp();
  uint32_t left[4][4];
  load_rows(left, place_at(room), lanes);
  if (to.data) store_rows<kMostBuckets / 8>(to, batch, head, first, length, room, lanes.lane);
#pragma unroll
  for (int k = 0; k < 4; ++k) add_rows<T>(rows, left[k], place_at(table) + k * 16 * kRowBytes, lanes);
}

}  // namespace
}  // namespace irpe
