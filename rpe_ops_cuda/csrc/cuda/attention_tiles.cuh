// SPDX-License-Identifier: Apache-2.0
// Pieces of the attention kernels. A warp owns 16 tokens (rows) and meets the others (columns) in tiles, which all warps of its
// block share. Lane 4 g + t holds rows g and g + 8 of a block, and of each 8 columns 2 t and 2 t + 1.
#pragma once

#include <cstdint>

#include "attention_kernels.h"
#include "warp.cuh"

namespace irpe {
namespace {

constexpr int kRows = 16;
constexpr int kLookupStride = 60;  // numbers between the lookups of two tokens: lanes then seldom meet in a bank
constexpr int kRowBytes = kHeadDim * 2;

// Eight elements of a row of 64 halves in shared memory; chunks are permuted so that eight rows lie in different banks.
template <typename T>
__device__ __forceinline__ T* chunk_of(T* tile, int row, int chunk) {
  return tile + row * kHeadDim + ((chunk ^ (row & 7)) << 3);
}

// Where a lane's row of `load_matrices` begins in 16 rows of such a tile; ^ 32 k is two chunks k further on.
struct Lane {
  int lane;
  Place as_columns;  // tokens 0-7 and 8-15, chunks 0 and 1 of each: a right operand that is not transposed
  Place as_rows;     // tokens 0-15 of chunk 0, then of chunk 1: a left operand, or a right one that is transposed

  __device__ explicit Lane(int number)
      : lane(number),
        as_columns((number % 8 + number / 16 * 8) * kRowBytes + ((number / 8 % 2) ^ (number % 8)) * 16),
        as_rows(number % 16 * kRowBytes + ((number / 16) ^ (number % 8)) * 16) {}
};

template <typename T>
__device__ __forceinline__ T* head_of(const Heads& x, int batch, int head) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride;
}

// Starts copying the first `rows` rows of a head; zeros from `length` on.
template <typename T>
__device__ __forceinline__ void fetch_tile(T* tile, const T* head, int row_stride, int rows, int length) {
  const int chunk = threadIdx.x % 8, step = blockDim.x / 8;
  const T* from = head + threadIdx.x / 8 * row_stride + chunk * 8;
  for (int row = threadIdx.x / 8; row < rows; row += step, from += step * row_stride) {
    copy<16>(chunk_of(tile, row, chunk), from, row < length);
  }
}

// Vectors of one head's table as `count` rows; zeros past the last bucket.
template <int count, typename T>
__device__ __forceinline__ void load_table(T* rows, const Table& table, int head, int buckets) {
  constexpr int kPairs = count * kHeadDim / 2, kAtOnce = 5;  // loads in flight
  for (int first = threadIdx.x; first < kPairs; first += kAtOnce * blockDim.x) {
    float pairs[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < 2 * kAtOnce; ++i) {
      const int x = first + i / 2 * blockDim.x, bucket = x % 8 + x / 256 * 8, dim = x / 8 % 32 * 2 + i % 2;
      const int64_t place = head * table.head_stride + bucket * table.bucket_stride + dim * table.dim_stride;
      const bool valid = bucket < buckets && x < kPairs;
      pairs[i / 2][i % 2] = !valid          ? 0.f
                            : table.is_float ? static_cast<const float*>(table.data)[place]
                                             : widened(static_cast<const T*>(table.data)[place]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int x = first + i * blockDim.x, bucket = x % 8 + x / 256 * 8, dim = x / 8 % 32 * 2;
      if (x >= kPairs) break;
      *reinterpret_cast<uint32_t*>(chunk_of(rows, bucket, dim / 8) + dim % 8) = packed(pairs[i][0], pairs[i][1], T());
    }
  }
}

// 16 rows of 64 elements as left operands, from global memory; zeros past the last row.
template <typename T>
__device__ __forceinline__ void load_rows(uint32_t (&rows)[4][4], const T* head, int row_stride, int first,
                                          int length, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + half * 8;
    const T* const from = head + row * row_stride + lane % 4 * 2;
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      rows[x / 2][x % 2 * 2 + half] = row < length ? *reinterpret_cast<const uint32_t*>(from + x * 8) : 0u;
    }
  }
}

// The same from 16 rows of a tile.
__device__ __forceinline__ void load_rows(uint32_t (&rows)[4][4], Place tile_rows, const Lane& lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) load_matrices(rows[k], (tile_rows + lane.as_rows) ^ (32 * k));
}

// scores (16, 16 n) += rows (16, 64) times the transpose of 16 n rows of a tile.
template <typename T, int n>
__device__ __forceinline__ void multiply_rows(float (&scores)[2 * n][4], const uint32_t (&rows)[4][4], Place tile_rows,
                                              const Lane& lane) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
#pragma unroll
    for (int b = 0; b < n; ++b) {
      uint32_t m[4];
      load_matrices(m, ((tile_rows + lane.as_columns) ^ (32 * k)) + 16 * kRowBytes * b);
      multiply(scores[2 * b], rows[k][0], rows[k][1], rows[k][2], rows[k][3], m[0], m[1], T());
      multiply(scores[2 * b + 1], rows[k][0], rows[k][1], rows[k][2], rows[k][3], m[2], m[3], T());
    }
  }
}

// Columns 16 c to 16 c + 15 of sums (16, 64) += weights (16, 16) times 16 rows of a tile.
template <typename T>
__device__ __forceinline__ void add_columns(float (&sums)[8][4], const uint32_t (&weights)[4], Place tile_rows,
                                            const Lane& lane, int c) {
  uint32_t m[4];
  load_matrices_transposed(m, (tile_rows + lane.as_rows) ^ (32 * c));
  multiply(sums[2 * c], weights[0], weights[1], weights[2], weights[3], m[0], m[1], T());
  multiply(sums[2 * c + 1], weights[0], weights[1], weights[2], weights[3], m[2], m[3], T());
}

// All columns.
template <typename T>
__device__ __forceinline__ void add_rows(float (&sums)[8][4], const uint32_t (&weights)[4], Place tile_rows,
                                         const Lane& lane) {
#pragma unroll
  for (int c = 0; c < 4; ++c) add_columns<T>(sums, weights, tile_rows, lane, c);
}

// Two neighbouring blocks of 8 columns as the left operand of the next product.
template <typename T>
__device__ __forceinline__ void as_weights(uint32_t (&weights)[4], const float (&left)[4], const float (&right)[4]) {
  weights[0] = packed(left[0], left[1], T());
  weights[1] = packed(left[2], left[3], T());
  weights[2] = packed(right[0], right[1], T());
  weights[3] = packed(right[2], right[3], T());
}

// found (16, 8) = rows times eight vectors of a table, of which `vectors` is the lane's place.
template <typename T>
__device__ __forceinline__ void look_up(float (&found)[4], const uint32_t (&rows)[4][4], Place vectors) {
#pragma unroll
  for (int k = 0; k < 4; k += 2) {
    uint32_t m[4];
    load_matrices(m, vectors ^ (32 * k));
    multiply(found, rows[k][0], rows[k][1], rows[k][2], rows[k][3], m[0], m[1], T());
    multiply(found, rows[k + 1][0], rows[k + 1][1], rows[k + 1][2], rows[k + 1][3], m[2], m[3], T());
  }
}

// The lane's place of a table's first eight vectors.
__device__ __forceinline__ Place eight_vectors(const void* table, int lane) {
  return place_at(table) + lane % 8 * kRowBytes + ((lane / 8) ^ (lane % 8)) * 16;
}

// Two lookups, in floats or in T.
template <typename T>
__device__ __forceinline__ void store_pair(float* to, float x, float y, T) {
  *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float x, float y, T) {
  *reinterpret_cast<uint32_t*>(to) = packed(x, y, T());
}

// What every bucket adds to the scores of 16 tokens: lookups (16, kMostBuckets) = rows times the table.
template <typename T, typename Lookup>
__device__ __forceinline__ void look_up_all(Lookup* lookups, const uint32_t (&rows)[4][4], const T* table, int lane) {
  Lookup* const place = lookups + lane / 4 * kLookupStride + lane % 4 * 2;
  const Place vectors = eight_vectors(table, lane);
#pragma unroll
  for (int n = 0; n < kMostBuckets / 8; ++n) {
    float found[4] = {};
    look_up<T>(found, rows, vectors + n * 8 * kRowBytes);
    store_pair(place + n * 8, found[0], found[1], T());
    store_pair(place + n * 8 + 8 * kLookupStride, found[2], found[3], T());
  }
}

// The same for scores and for gradients of weights; a word holds a bucket's two numbers, rounded to T.
template <typename T>
__device__ __forceinline__ void look_up_both(float* lookups, const uint32_t (&first)[4][4], const uint32_t (&second)[4][4],
                                             const T* first_table, const T* second_table, int lane) {
  float* const place = lookups + lane / 4 * kLookupStride + lane % 4 * 2;
  const Place firsts = eight_vectors(first_table, lane), seconds = eight_vectors(second_table, lane);
#pragma unroll
  for (int n = 0; n < kMostBuckets / 8; ++n) {
    float one[4] = {}, two[4] = {};
    look_up<T>(one, first, firsts + n * 8 * kRowBytes);
    look_up<T>(two, second, seconds + n * 8 * kRowBytes);
    *reinterpret_cast<uint2*>(place + n * 8) = make_uint2(packed(one[0], two[0], T()), packed(one[1], two[1], T()));
    *reinterpret_cast<uint2*>(place + n * 8 + 8 * kLookupStride) =
        make_uint2(packed(one[2], two[2], T()), packed(one[3], two[3], T()));
  }
}

// The place of what belongs to the id in byte x of `ids`, `factor` bytes for each id: one instruction, a product of bytes.
__device__ __forceinline__ Place place_of(uint32_t ids, int x, uint32_t factor, Place first) {
  return __dp4a(ids, factor << (8 * x), first);
}

// The lookup of an id: among those of the rows' own tokens, `row` being that of row g; or among those of the columns' tokens,
// `row` being that of column 2 t.
template <bool own, typename Lookup>
__device__ __forceinline__ Lookup lookup_of(uint32_t ids, int x, Place row, Lookup) {
  constexpr int size = sizeof(Lookup);
  return load(place_of(ids, x, size, row) + (own ? x / 2 * 8 : x % 2) * kLookupStride * size, Lookup());
}

// scores (16, 8) += lookups. `fresh`: = instead of +=.
template <bool own, typename Lookup = float>
__device__ __forceinline__ void add_lookups(float (&scores)[4], uint32_t ids, Place row, bool fresh = false) {
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    const float found = widened(lookup_of<own>(ids, x, row, Lookup()));
    scores[x] = fresh ? found : scores[x] + found;
  }
}

// What `look_up_both` found, for the columns' tokens: = instead of +=.
template <typename T>
__device__ __forceinline__ void take_lookups(float (&scores)[4], float (&grads)[4], uint32_t ids, Place row) {
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    const float2 both = unpacked(__float_as_uint(lookup_of<false>(ids, x, row, 0.f)), T());
    scores[x] = both.x, grads[x] = both.y;
  }
}

// Writes 16 rows of a tile, the first `chunks` pieces of 8 elements of each, to the rows of a head from `first` on.
template <int chunks, typename T>
__device__ __forceinline__ void store_rows(const Heads& to, int batch, int head, int first, int length, const T* rows, int lane) {
  const int chunk = lane % 8, row = first + lane / 8;
  T* const place = head_of<T>(to, batch, head) + row * to.row_stride + chunk * 8;
#pragma unroll
  for (int x = 0; x < kRows; x += 4) {
    if (row + x < length && chunk < chunks) {
      *reinterpret_cast<uint4*>(place + x * to.row_stride) =
          *reinterpret_cast<const uint4*>(chunk_of(rows, lane / 8 + x, chunk));
    }
  }
}

// The same from registers, through 16 rows of a tile.
template <typename T>
__device__ __forceinline__ void store_rows(const Heads& to, int batch, int head, int first, int length, T* room,
                                           const float (&sums)[8][4], int lane) {
  __syncwarp();
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    *reinterpret_cast<uint32_t*>(chunk_of(room, lane / 4, n) + lane % 4 * 2) = packed(sums[n][0], sums[n][1], T());
    *reinterpret_cast<uint32_t*>(chunk_of(room, lane / 4 + 8, n) + lane % 4 * 2) = packed(sums[n][2], sums[n][3], T());
  }
  __syncwarp();
  store_rows<8>(to, batch, head, first, length, room, lane);
}

}  // namespace
}  // namespace irpe
