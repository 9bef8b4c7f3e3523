// SPDX-License-Identifier: Apache-2.0
// Attention with relative position encodings inside it, for heads of 64 in half precision: no tensor of pairs of tokens.
//
// A query adds to its score of a key what its product with the table has for the bucket of their offset. These products, 56
// numbers a token, lie in shared memory, and each score starts as one of them: a load replaces the zero before the tensor
// cores add the products of query and key. Weights are summed by bucket the other way round, without atomics.
#include <cmath>

#include "attention_launch.cuh"

namespace irpe {
namespace {

constexpr int kStep = 2;           // times 16 columns at a time
constexpr float kSlack = 8;        // weights are divided by a maximum that may be too small by this power of two
constexpr float kLowest = -1e38f;  // where maxima begin: unlike -infinity, it can be subtracted from a score of -infinity

template <int n>
using Count = std::integral_constant<int, n>;

template <bool on_q, bool on_v>
using ForwardRoom = Room<1 + on_q + on_v, on_v ? 2 : 4, on_v, 2, on_q, false>;

template <typename T, bool on_q, bool on_v>
__global__ void __launch_bounds__(kMaxWarps * 32) attend(const AttentionCall call, const Work work) {
  using R = ForwardRoom<on_q, on_v>;
  using Lookup = std::conditional_t<on_v, T, float>;  // backward rounds too
  if (!kAmpere) return;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Lane lanes(lane);
  const int length = call.length, rows = work.rows;
  const Parts<R, T> at(shared, warps, warp, rows);
  float* const others = static_cast<float*>(at.others);
  const Place own_row = place_at(at.own) + lane / 4 * kLookupStride * sizeof(Lookup);
  const Place others_row = place_at(others) + lane % 4 * 2 * kLookupStride * 4;
  const Place own_buckets = place_at(at.buckets) + lane * 4;

  const auto fetch_tiles = [&](const Item& item, int tile, int turn) {
    T* const to = at.tiles + turn % 2 * 2 * rows * kHeadDim;
    const int first = tile * rows;
    fetch_tile(to, head_of<T>(call.k, item.batch, item.head) + first * call.k.row_stride, call.k.row_stride, rows,
               length - tile * rows);
    fetch_tile(to + rows * kHeadDim, head_of<T>(call.v, item.batch, item.head) + first * call.v.row_stride,
               call.v.row_stride, rows, length - tile * rows);
  };
  fetch_tiles(item_of(work, call, blockIdx.x), 0, 0);
  const auto own_block_of = [&](const Item& item) { return item.group * warps + warp; };
  uint32_t query[4][4];
  const auto load_own = [&](const Item& item) {
    load_rows(query, head_of<T>(call.q, item.batch, item.head), call.q.row_stride, own_block_of(item) * kRows, length, lane);
  };
  load_own(item_of(work, call, blockIdx.x));
  const float factor = call.scale * kLog2e, slack = kSlack / factor;
  int turn = 0, tables_of = -1;
  for (int number = blockIdx.x; number < work.items; number += gridDim.x) {
    const Item item = item_of(work, call, number);
    const int own_block = own_block_of(item), ids_before = own_block * work.blocks * 32 + lane;
    const bool active = own_block < work.blocks;
    if (tables_of < 0 || (work.by_head && tables_of != item.head)) {
      __syncthreads();
      load_table<R::kTableRows>(at.table_k, call.on_k, item.head, call.buckets);
      if (on_q) load_table<R::kTableRows>(at.table_q, call.on_q, item.head, call.buckets);
      if (on_v) load_table<R::kTableRows>(at.table_v, call.on_v, item.head, call.buckets);
      tables_of = item.head;
    }
    if (on_v) clear_buckets(at.buckets, lane);

    // Waits for a tile and prepares it. Apart from the loop: the first time, there are no sums yet to hold.
    const auto enter = [&](int tile) {
      wait_for_copies();
      __syncthreads();
      if ((tile + 1) * rows < length) {
        fetch_tiles(item, tile + 1, turn + 1);
      } else if (number + gridDim.x < work.items) {
        fetch_tiles(item_of(work, call, number + gridDim.x), 0, turn + 1);
      }
      if (tile == 0) {
        look_up_all<T>(reinterpret_cast<Lookup*>(at.own), query, at.table_k, lane);
        __syncwarp();
      }
      if (on_q) {
        for (int first = warp * kRows; first < min(rows, length - tile * rows); first += warps * kRows) {
          uint32_t key[4][4];
          load_rows(key, place_at(at.tiles) + (turn % 2 * 2 * rows + first) * kRowBytes, lanes);
          look_up_all<T>(others + first * kLookupStride, key, at.table_q, lane);
        }
        __syncthreads();
      }
    };
    enter(0);
    float out[8][4] = {}, total[4] = {}, peak[2] = {kLowest, kLowest};
    for (int tile = 0;;) {
      const Place keys = place_at(at.tiles) + turn % 2 * 2 * rows * kRowBytes, values = keys + rows * kRowBytes;
      const int columns = min(rows, length - tile * rows);
      const auto step = [&](auto count, int first) {
        constexpr int n = decltype(count)::value;
        const int column = tile * rows + first, ids_at = ids_before + column * (32 / kRows);
        float scores[2 * n][4];
        uint2 ids[n];
#pragma unroll
        for (int b = 0; b < n; ++b) {
          ids[b] = load_kept(call.ids.by_query + ids_at + b * 32);
          add_lookups<true, Lookup>(scores[2 * b], ids[b].x, own_row, true);
          add_lookups<true, Lookup>(scores[2 * b + 1], ids[b].y, own_row, true);
          if (on_q) {
            const uint2 turned = load_kept(call.ids.by_key + ids_at + b * 32);
            add_lookups<false>(scores[2 * b], turned.x, others_row + (first + 16 * b) * (kLookupStride * 4));
            add_lookups<false>(scores[2 * b + 1], turned.y, others_row + (first + 16 * b + 8) * (kLookupStride * 4));
          }
        }
        multiply_rows<T, n>(scores, query, keys + first * kRowBytes, lanes);
        if (n == 1 && column + kRows > length) {  // larger steps are full
#pragma unroll
          for (int x = 0; x < 8; ++x) {
            if (column + x / 4 * 8 + lane % 4 * 2 + x % 2 >= length) scores[x / 4][x % 4] = -INFINITY;
          }
        }
        float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int x = 0; x < 8 * n; ++x) most[x % 4 / 2] = fmaxf(most[x % 4 / 2], scores[x / 4][x % 4]);
        if (__any_sync(~0u, most[0] > peak[0] + slack || most[1] > peak[1] + slack)) {
          float change[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float next = fmaxf(peak[r], quad_max(most[r]));
            change[r] = power_of_two((peak[r] - next) * factor);
            peak[r] = next;
          }
          if (column > 0) {
#pragma unroll
            for (int x = 0; x < 32; ++x) out[x / 4][x % 4] *= change[x % 4 / 2];
#pragma unroll
            for (int x = 0; x < 4; ++x) total[x] *= change[x / 2];
            if (on_v) {
              for (int x = 0; x < kMostBuckets * 128; x += 128) store(own_buckets + x, load(own_buckets + x) * change[lane % 2]);
            }
          }
        }
        const float below[2] = {-peak[0] * factor, -peak[1] * factor};
#pragma unroll
        for (int x = 0; x < 8 * n; ++x) {
          scores[x / 4][x % 4] = power_of_two(fmaf(scores[x / 4][x % 4], factor, below[x % 4 / 2]));
        }
#pragma unroll
        for (int b = 0; b < n; ++b) {
          uint32_t weights[4];
          as_weights<T>(weights, scores[2 * b], scores[2 * b + 1]);
          const Place values_here = values + (first + 16 * b) * kRowBytes;
          if (on_v) {
            add_rows_and_buckets<T>(out, own_buckets, weights, ids[b], values_here, lanes);
          } else {
            add_rows<T>(out, weights, values_here, lanes);
          }
          const uint32_t one = packed(1.f, 1.f, T());
          multiply(total, weights[0], weights[1], weights[2], weights[3], one, one, T());
        }
      };
      int first = 0;
      for (; active && first + kStep * kRows <= columns; first += kStep * kRows) step(Count<kStep>(), first);
      for (; active && first < columns; first += kRows) step(Count<1>(), first);
      ++turn;
      if (++tile * rows >= length) break;
      enter(tile);
    }
    if (number + gridDim.x < work.items) load_own(item_of(work, call, number + gridDim.x));
    if (!active) continue;
    const float inverse[2] = {1.f / total[0], 1.f / total[2]};
#pragma unroll
    for (int x = 0; x < 32; ++x) out[x / 4][x % 4] *= inverse[x % 4 / 2];
    const int row = own_block * kRows + lane / 4;
    for (int r = 0; r < 2; ++r) {
      if (lane % 4 == 0 && row + 8 * r < length) {
        call.log_sums[static_cast<int64_t>(item.batch * call.heads + item.head) * length + row + 8 * r] =
            peak[r] * factor + log2f(total[2 * r]);
      }
    }
    __syncwarp();
    if (on_v) {
      const float upper = __shfl_sync(~0u, inverse[0], lane % 8 * 4), lower = __shfl_sync(~0u, inverse[1], lane % 8 * 4);
      add_buckets(out, at.room, at.buckets, upper, lower, at.table_v, call.sums, item.batch, item.head, own_block * kRows, length,
                  lanes);
    }
    store_rows(call.out, item.batch, item.head, own_block * kRows, length, at.room, out, lane);
  }
}

template <typename T>
cudaError_t launch_for(const AttentionCall& call, cudaStream_t stream) {
  const int planes = call.batch * call.heads;
  if (call.on_v.data) return launch<ForwardRoom<true, true>>(attend<T, true, true>, call, 0, planes, stream);
  if (call.on_q.data) return launch<ForwardRoom<true, false>>(attend<T, true, false>, call, 0, planes, stream);
  return launch<ForwardRoom<false, false>>(attend<T, false, false>, call, 0, planes, stream);
}

}  // namespace

cudaError_t launch_attention(const AttentionCall& call, cudaStream_t stream) {
  return call.is_bfloat16 ? launch_for<__nv_bfloat16>(call, stream) : launch_for<__half>(call, stream);
}

}  // namespace irpe
