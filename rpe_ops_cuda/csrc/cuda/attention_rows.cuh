// SPDX-License-Identifier: Apache-2.0
// The second half of attention_backward.cu: from the gradients of the scores to those of queries and keys.
#pragma once

#include "attention_launch.cuh"

namespace irpe {
namespace {

template <bool with_table>
using SumRoom = Room<with_table, 0, with_table, 1, false, false>;

// Gradients of the scores, in blocks of 16 keys x 16 queries as left operands, one word of four for each lane:
// (planes, M blocks of queries, M blocks of keys, 32 lanes).
__device__ __forceinline__ unsigned block_of(const Work& work, unsigned plane, unsigned queries, unsigned keys) {
  return ((plane * work.blocks + queries) * work.blocks + keys) * 32;
}

// Gradients of q or of k, and of their lookups if they have a table, from those of the scores.
template <typename T, bool of_keys, bool with_table>
__global__ void __launch_bounds__(kMaxWarps * 32) differentiate_rows(const AttentionCall call, const Work work) {
  using R = SumRoom<with_table>;
  constexpr int kAhead = with_table ? 4 : 8;  // loads in flight
  if (!kAmpere) return;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Lane lanes(lane);
  const int length = call.length, rows = work.rows;
  const Heads& others = of_keys ? call.q : call.k;
  const Parts<R, T> at(shared, warps, warp, rows);
  const Place own_buckets = place_at(at.buckets) + lane * 4;

  const auto fetch_others = [&](const Item& item, int tile, int turn) {
    fetch_tile(at.tiles + turn % 2 * rows * kHeadDim, head_of<T>(others, item.batch, item.head) + tile * rows * others.row_stride,
               others.row_stride, rows, length - tile * rows);
  };
  uint4 ahead[kAhead];
  uint2 ids_ahead[kAhead];
  const auto load_blocks = [&](const Item& item, unsigned first) {
    const unsigned own_block = item.group * warps + warp;
    if (own_block >= work.blocks) return;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= work.blocks) break;
      const unsigned queries = of_keys ? first + i : own_block, keys = of_keys ? own_block : first + i;
      ahead[i] = static_cast<uint4*>(call.grad_scores)[block_of(work, item.plane, queries, keys) + lane];
      if (with_table) ids_ahead[i] = load_kept(call.ids.by_query + ((own_block * work.blocks + first + i) * 32 + lane));
    }
  };
  fetch_others(item_of(work, call, blockIdx.x), 0, 0);
  load_blocks(item_of(work, call, blockIdx.x), 0);
  int turn = 0, tables_of = -1;
  for (int number = blockIdx.x; number < work.items; number += gridDim.x) {
    const Item item = item_of(work, call, number);
    const unsigned own_block = item.group * warps + warp, ids_before = own_block * work.blocks * 32 + lane;
    const bool active = own_block < work.blocks;
    if (with_table && (tables_of < 0 || (work.by_head && tables_of != item.head))) {
      __syncthreads();
      load_table<R::kTableRows>(at.table_k, of_keys ? call.on_q : call.on_k, item.head, call.buckets);
      tables_of = item.head;
    }
    if (with_table) clear_buckets(at.buckets, lane);
    float sums[8][4] = {};
    for (int tile = 0; tile * rows < length; ++tile, ++turn) {
      const Place tile_rows = place_at(at.tiles) + turn % 2 * rows * kRowBytes;
      const int first_block = tile * rows / kRows, blocks = active ? (min(rows, length - tile * rows) + kRows - 1) / kRows : 0;
      const unsigned queries = of_keys ? first_block : own_block, keys = of_keys ? own_block : first_block;
      const uint4* const from = static_cast<uint4*>(call.grad_scores) + block_of(work, item.plane, queries, keys) + lane;
      const unsigned stride = of_keys ? work.blocks * 32 : 32;
      const uint2* const ids = call.ids.by_query + (ids_before + first_block * 32);
      const int next_tile = (tile + 1) * rows < length ? tile + 1 : 0, next_number = next_tile ? number : number + gridDim.x;
      const Item next = item_of(work, call, next_number);
      wait_for_copies();
      __syncthreads();
      if (next_number < work.items) fetch_others(next, next_tile, turn + 1);
      for (int block = 0; block < blocks; block += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (block + i >= blocks) break;
          const uint4 x = ahead[i];
          uint32_t weights[4] = {x.x, x.y, x.z, x.w};
          if (!of_keys) {
            weights[0] = transposed(x.x), weights[1] = transposed(x.z);
            weights[2] = transposed(x.y), weights[3] = transposed(x.w);
          }
          if (!of_keys && first_block + block + i == work.blocks - 1) {  // keys past the last
            const int left = length - (work.blocks - 1) * kRows - lane % 4 * 2;
#pragma unroll
            for (int y = 0; y < 4; ++y) {
              const int valid = left - y / 2 * 8;
              weights[y] &= valid <= 0 ? 0u : valid == 1 ? 0xffffu : ~0u;
            }
          }
          const Place here = tile_rows + (block + i) * kRows * kRowBytes;
          if (with_table) {
            add_rows_and_buckets<T>(sums, own_buckets, weights, ids_ahead[i], here, lanes);
          } else {
            add_rows<T>(sums, weights, here, lanes);
          }
          // Only now, so that what is loaded needs no move, which would wait for it.
          const int then = min(block + i + kAhead, blocks - 1);
          ahead[i] = from[then * stride];
          if (with_table) ids_ahead[i] = load_kept(ids + then * 32);
        }
      }
      if (next_number < work.items) load_blocks(next, next_tile * rows / kRows);
    }
    if (!active) continue;
#pragma unroll
    for (int x = 0; x < 32; ++x) sums[x / 4][x % 4] *= call.scale;
    __syncwarp();
    if (with_table) {
      add_buckets(sums, at.room, at.buckets, call.scale, call.scale, at.table_k,
                  of_keys ? call.grad_lookup_q : call.grad_lookup_k, item.batch, item.head, own_block * kRows, length, lanes);
    }
    store_rows(of_keys ? call.grad_k : call.grad_q, item.batch, item.head, own_block * kRows, length, at.room, sums, lane);
  }
}

}  // namespace
}  // namespace irpe
