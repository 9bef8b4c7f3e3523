// SPDX-License-Identifier: Apache-2.0
// Attention with relative position encodings inside it, for heads of 64 in half precision: no tensor of pairs of tokens.
//
// A query adds to its score of a key what its product with the table has for the bucket of their offset. These products, 56
// numbers a token, lie in shared memory, and each score starts as one of them: a load replaces the zero before the tensor
// cores add the products of query and key. Weights are summed by bucket the other way round. Backward recomputes
// all weights twice, once for warps that own queries and once for warps that own keys; no atomics, so sums have a
// fixed order.
#include <algorithm>
#include <cmath>
#include <utility>

#include "attention_tiles.cuh"

namespace irpe {
namespace {

constexpr int kMaxWarps = 16;
constexpr float kLog2e = 1.4426950408889634f;
constexpr int kStep = 2;       // times 16 columns at a time, in forward
constexpr float kLowest = -1e38f;  // where maxima begin: unlike -infinity, it can be subtracted from a score of -infinity
constexpr float kSlack = 8;  // weights are divided by a maximum that may be too small by this power of two

template <int n>
using Count = std::integral_constant<int, n>;

// The items of a launch, a group of own tokens of one head each, and how a block meets the other tokens: `rows` at a time.
struct Work {
  int blocks, groups, items, rows;  // blocks of 16 tokens in a head
  bool by_head;                     // consecutive items are of one head: its tables stay loaded
};

struct Item {
  unsigned batch, head, group;
};

__device__ __forceinline__ Item item_of(const Work& work, const AttentionCall& call, unsigned number) {
  const unsigned groups = work.groups, fast = work.by_head ? call.batch : call.heads, plane = number / groups;
  const unsigned slow = plane / fast, rest = plane - slow * fast, group = number - plane * groups;
  return work.by_head ? Item{rest, slow, group} : Item{slow, rest, group};
}

// How a kernel divides its shared memory, in bytes: tables, then what each warp has for itself, then two turns of a pair of
// tiles, then what belongs to each of the tile's tokens.
template <int tables, bool others, bool owns, bool has_sums, bool has_statistics>
struct Room {
  static constexpr int kTables = tables * kTableRows * kRowBytes;
  static constexpr int kSums = owns ? kLookupBytes : kRows * kRowBytes;
  static constexpr int kPerWarp = kSums + (has_sums ? kSumBytes : 0);
  static constexpr int kPerRow = 4 * kRowBytes + (others ? kLookupStride * 4 : 0) + (has_statistics ? 2 * 2 * 4 : 0);
  static constexpr int bytes(int warps, int rows) { return kTables + warps * kPerWarp + rows * kPerRow; }
};

template <bool on_q, bool on_v>
using ForwardRoom = Room<1 + on_q + on_v, on_q, true, on_v, false>;

template <bool owns_queries, bool on_q, bool on_v>
using BackwardRoom = Room<1 + on_q + on_v, !owns_queries || on_q, owns_queries || on_q, owns_queries || on_q, !owns_queries>;

__device__ __forceinline__ void clear(unsigned char* sums, int lane) {
#pragma unroll
  for (int x = 0; x < kSumBytes; x += 512) *reinterpret_cast<uint4*>(sums + x + lane * 16) = make_uint4(0, 0, 0, 0);
}

template <typename T, bool on_q, bool on_v>
__global__ void __launch_bounds__(kMaxWarps * 32) attend(const AttentionCall call, const Work work) {
  using R = ForwardRoom<on_q, on_v>;
  if (!kAmpere) return;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Lane lanes(lane);
  const int length = call.length, rows = work.rows;
  T *const table_k = reinterpret_cast<T*>(shared), *const table_q = table_k + kTableRows * kHeadDim;
  T* const table_v = table_q + kTableRows * kHeadDim;
  unsigned char* const own = shared + R::kTables + warp * R::kPerWarp;
  unsigned char* const buckets = own + R::kSums;
  T* const room = reinterpret_cast<T*>(own);  // after the last lookup
  T* const tiles = reinterpret_cast<T*>(shared + R::kTables + warps * R::kPerWarp);
  float* const others = reinterpret_cast<float*>(tiles + 4 * rows * kHeadDim);
  const Place own_row = place_at(own) + lane / 4 * kLookupStride * 4, others_row = place_at(others) + lane % 4 * 2 * kLookupStride * 4;
  const Place own_buckets = place_at(buckets) + lane * 4;

  const auto fetch_tiles = [&](const Item& item, int tile, int turn) {
    T* const to = tiles + turn % 2 * 2 * rows * kHeadDim;
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
      load_table(table_k, call.on_k, item.head, call.buckets);
      if (on_q) load_table(table_q, call.on_q, item.head, call.buckets);
      if (on_v) load_table(table_v, call.on_v, item.head, call.buckets);
      tables_of = item.head;
    }
    if (on_v) clear(buckets, lane);

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
        look_up_all<T, on_v>(reinterpret_cast<float*>(own), query, table_k, lane);  // backward rounds too
        __syncwarp();
      }
      if (on_q) {
        for (int first = warp * kRows; first < min(rows, length - tile * rows); first += warps * kRows) {
          uint32_t key[4][4];
          load_rows(key, place_at(tiles) + (turn % 2 * 2 * rows + first) * kRowBytes, lanes);
          look_up_all<T, false>(others + first * kLookupStride, key, table_q, lane);
        }
        __syncthreads();
      }
    };
    enter(0);
    float out[8][4] = {}, total[4] = {}, peak[2] = {kLowest, kLowest};
    for (int tile = 0;;) {
      const Place keys = place_at(tiles) + turn % 2 * 2 * rows * kRowBytes, values = keys + rows * kRowBytes;
      const int columns = min(rows, length - tile * rows);
      const auto step = [&](auto count, int first) {
        constexpr int n = decltype(count)::value;
        const int column = tile * rows + first, ids_at = ids_before + column * (32 / kRows);
        float scores[2 * n][4];
        uint2 ids[n];
#pragma unroll
        for (int b = 0; b < n; ++b) {
          ids[b] = load_kept(call.ids.by_query + ids_at + b * 32);
          add_lookups<true>(scores[2 * b], ids[b].x, own_row, true);
          add_lookups<true>(scores[2 * b + 1], ids[b].y, own_row, true);
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
        most[0] = quad_max(most[0]), most[1] = quad_max(most[1]);
        if (__any_sync(~0u, most[0] > peak[0] + slack || most[1] > peak[1] + slack)) {
          float change[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float next = fmaxf(peak[r], most[r]);
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
          add_rows<T>(out, weights, values + (first + 16 * b) * kRowBytes, lanes);
          const uint32_t one = packed(1.f, 1.f, T());
          multiply(total, weights[0], weights[1], weights[2], weights[3], one, one, T());
          if (on_v) add_to_buckets<T>(own_buckets, weights, ids[b], lane % 2);
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
      gather_buckets(room, buckets, upper, lower, lane);
      __syncwarp();
      uint32_t sums[4][4];
      load_rows(sums, place_at(room), lanes);
      if (call.sums.data) store_rows<kMostBuckets / 8>(call.sums, item.batch, item.head, own_block * kRows, length, room, lane);
#pragma unroll
      for (int k = 0; k < 4; ++k) add_rows<T>(out, sums[k], place_at(table_v) + k * 16 * kRowBytes, lanes);
    }
    store_rows(call.out, item.batch, item.head, own_block * kRows, length, room, out, lane);
  }
}

// One of the two kernels of backward. Warps that own queries: gradients of q and of its lookups, and the sums over
// keys that all gradients need (deltas). Warps that own keys, afterwards: gradients of k, its lookups, and v.
template <typename T, bool owns_queries, bool on_q, bool on_v>
__global__ void __launch_bounds__(kMaxWarps * 32) differentiate(const AttentionCall call, const Work work) {
  using R = BackwardRoom<owns_queries, on_q, on_v>;
  constexpr bool has_own = owns_queries || on_q, has_other = !owns_queries || on_q;
  if (!kAmpere) return;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Lane lanes(lane);
  const int length = call.length, rows = work.rows;
  T* const table_own = reinterpret_cast<T*>(shared);
  T* const table_other = table_own + (has_own ? kTableRows * kHeadDim : 0);
  T* const table_values = table_other + (has_other ? kTableRows * kHeadDim : 0);
  unsigned char* const own = shared + R::kTables + warp * R::kPerWarp;
  unsigned char* const buckets = own + R::kSums;
  T* const room = reinterpret_cast<T*>(own);  // after the last lookup
  T* const tiles = reinterpret_cast<T*>(shared + R::kTables + warps * R::kPerWarp);
  float* const others = reinterpret_cast<float*>(tiles + 4 * rows * kHeadDim);
  float* const statistics = others + (has_other ? rows * kLookupStride : 0);  // [2][log_sums, deltas][rows]
  const Place own_row = place_at(own) + lane / 4 * kLookupStride * 4, own_buckets = place_at(buckets) + lane * 4;
  const Place others_row = place_at(others) + lane % 4 * 2 * kLookupStride * 4;

  // Scores are products of the first pair, gradients of weights of the second.
  const Heads &first_own = owns_queries ? call.q : call.k, &second_own = owns_queries ? call.grad_out : call.v;
  const Heads &first_other = owns_queries ? call.k : call.q, &second_other = owns_queries ? call.v : call.grad_out;
  const auto fetch_tiles = [&](const Item& item, int tile, int turn) {
    T* const to = tiles + turn % 2 * 2 * rows * kHeadDim;
    const int first = tile * rows;
    const int left = length - tile * rows;
    fetch_tile(to, head_of<T>(first_other, item.batch, item.head) + first * first_other.row_stride,
               first_other.row_stride, rows, left);
    fetch_tile(to + rows * kHeadDim, head_of<T>(second_other, item.batch, item.head) + first * second_other.row_stride,
               second_other.row_stride, rows, left);
    if (!owns_queries) {
      const int64_t before = static_cast<int64_t>(item.batch * call.heads + item.head) * length + first;
      for (int x = threadIdx.x; x < 2 * rows; x += blockDim.x) {
        const int token = x < rows ? x : x - rows;
        float* const to = statistics + turn % 2 * 2 * rows + x;
        if (token < left) {
          copy<4>(to, (x < rows ? call.log_sums : call.deltas) + before + token, true);
        } else {
          *to = x < rows ? INFINITY : 0.f;  // a token that weighs nothing
        }
      }
    }
  };
  fetch_tiles(item_of(work, call, blockIdx.x), 0, 0);
  const auto own_block_of = [&](const Item& item) { return item.group * warps + warp; };
  uint32_t one[4][4], two[4][4];
  const auto load_own = [&](const Item& item) {
    const int first = own_block_of(item) * kRows;
    load_rows(one, head_of<T>(first_own, item.batch, item.head), first_own.row_stride, first, length, lane);
    load_rows(two, head_of<T>(second_own, item.batch, item.head), second_own.row_stride, first, length, lane);
  };
  if (owns_queries) load_own(item_of(work, call, blockIdx.x));
  const float factor = call.scale * kLog2e;
  int turn = 0, tables_of = -1;
  for (int number = blockIdx.x; number < work.items; number += gridDim.x) {
    const Item item = item_of(work, call, number);
    if (!owns_queries) load_own(item);  // no registers to have it earlier
    const unsigned own_block = own_block_of(item), ids_before = own_block * work.blocks * 32 + lane;
    const bool active = own_block < work.blocks;
    float log_sum[2] = {0.f, 0.f}, delta[2] = {0.f, 0.f};
    if (owns_queries) {
      uint32_t results[4][4];
      load_rows(results, head_of<T>(call.out, item.batch, item.head), call.out.row_stride, own_block * kRows, length, lane);
#pragma unroll
      for (int x = 0; x < 16; ++x) {
        const float2 a = unpacked(results[x / 4][x % 4], T()), b = unpacked(two[x / 4][x % 4], T());
        delta[x % 2] += a.x * b.x + a.y * b.y;
      }
      const int64_t before = static_cast<int64_t>(item.batch * call.heads + item.head) * length;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        delta[r] = quad_sum(delta[r]);
        const int row = own_block * kRows + lane / 4 + 8 * r;
        if (row < length) {
          log_sum[r] = call.log_sums[before + row];
          if (lane % 4 == 0) call.deltas[before + row] = delta[r];
        }
      }
    }
    if (tables_of < 0 || (work.by_head && tables_of != item.head)) {
      __syncthreads();
      if (has_own) load_table(table_own, owns_queries ? call.on_k : call.on_q, item.head, call.buckets);
      if (has_other) load_table(table_other, owns_queries ? call.on_q : call.on_k, item.head, call.buckets);
      if (on_v) load_table(table_values, call.on_v, item.head, call.buckets);
      tables_of = item.head;
    }
    if (has_own) clear(buckets, lane);

    const auto enter = [&](int tile) {  // as above
      const Place firsts = place_at(tiles) + turn % 2 * 2 * rows * kRowBytes;
      wait_for_copies();
      __syncthreads();
      if ((tile + 1) * rows < length) {
        fetch_tiles(item, tile + 1, turn + 1);
      } else if (number + gridDim.x < work.items) {
        fetch_tiles(item_of(work, call, number + gridDim.x), 0, turn + 1);
      }
      if (tile == 0 && has_own) {
        float* const lookups = reinterpret_cast<float*>(own);
        if (owns_queries && on_v) {
          look_up_both(lookups, one, two, table_own, table_values, lane);
        } else {
          look_up_all<T, false>(lookups, one, table_own, lane);
        }
        __syncwarp();
      }
      if (has_other) {
        for (int first = warp * kRows; first < min(rows, length - tile * rows); first += warps * kRows) {
          uint32_t left[4][4], right[4][4];
          load_rows(left, firsts + first * kRowBytes, lanes);
          if (!owns_queries && on_v) {
            load_rows(right, firsts + (rows + first) * kRowBytes, lanes);
            look_up_both(others + first * kLookupStride, left, right, table_other, table_values, lane);
          } else {
            look_up_all<T, false>(others + first * kLookupStride, left, table_other, lane);
          }
        }
        __syncthreads();
      }
    };
    enter(0);
    float grad_first[8][4] = {}, grad_second[8][4] = {};  // of q, nothing; of k, v
    for (int tile = 0;;) {
      const Place firsts = place_at(tiles) + turn % 2 * 2 * rows * kRowBytes;
      const Place log_sums = place_at(statistics) + turn % 2 * 2 * rows * 4 + lane % 4 * 8;
      const unsigned columns = min(rows, length - tile * rows);
      // One thing to count, the rest follows from it: registers are scarce here.
      const unsigned ids_at = ids_before + tile * rows * (32 / kRows);
      for (unsigned first = active ? 0 : columns; first < columns; first += kRows) {
        const Place firsts_here = firsts + first * kRowBytes, seconds_here = firsts_here + rows * kRowBytes;
        float scores[2][4], grads[2][4] = {};
        uint2 ids = {}, turned = {};
        const Place column = others_row + first * (kLookupStride * 4);
        if (has_own) ids = load_kept(call.ids.by_query + (ids_at + first * (32 / kRows)));
        if (has_other) turned = load_kept(call.ids.by_key + (ids_at + first * (32 / kRows)));
        if (owns_queries && on_v) {
          take_lookups<T, true>(scores[0], grads[0], ids.x, own_row);
          take_lookups<T, true>(scores[1], grads[1], ids.y, own_row);
        } else if (has_own) {
          add_lookups<true>(scores[0], ids.x, own_row, true);
          add_lookups<true>(scores[1], ids.y, own_row, true);
        }
        if (!owns_queries && on_v) {
          float found[2][4];
          take_lookups<T, false>(found[0], grads[0], turned.x, column);
          take_lookups<T, false>(found[1], grads[1], turned.y, column + 8 * kLookupStride * 4);
#pragma unroll
          for (int x = 0; x < 8; ++x) scores[x / 4][x % 4] += found[x / 4][x % 4];
        } else if (has_other) {
          add_lookups<false>(scores[0], turned.x, column, !has_own);
          add_lookups<false>(scores[1], turned.y, column + 8 * kLookupStride * 4, !has_own);
        }
        multiply_rows<T, 1>(scores, one, firsts_here, lanes);
        multiply_rows<T, 1>(grads, two, seconds_here, lanes);
#pragma unroll
        for (int x = 0; x < 8; x += 2) {
          float2 sum = make_float2(log_sum[x % 4 / 2], log_sum[x % 4 / 2]), offset = make_float2(delta[x % 4 / 2], delta[x % 4 / 2]);
          if (!owns_queries) {
            sum = load_pair(log_sums + first * 4 + x / 4 * 32);
            offset = load_pair(log_sums + (rows + first) * 4 + x / 4 * 32);
          }
          float *const score = &scores[x / 4][x % 4], *const grad = &grads[x / 4][x % 4];
          score[0] = power_of_two(fmaf(score[0], factor, -sum.x)), score[1] = power_of_two(fmaf(score[1], factor, -sum.y));
          grad[0] = score[0] * (grad[0] - offset.x), grad[1] = score[1] * (grad[1] - offset.y);
        }
        if (owns_queries && first + kRows > columns) {  // keys past the last; past the last query log_sums are infinite
#pragma unroll
          for (int x = 0; x < 8; ++x) {
            if (first + x / 4 * 8 + lane % 4 * 2 + x % 2 >= columns) grads[x / 4][x % 4] = 0.f;
          }
        }
        uint32_t weights[4];
        if (!owns_queries) {
          as_weights<T>(weights, scores[0], scores[1]);
          add_rows<T>(grad_second, weights, seconds_here, lanes);
        }
        as_weights<T>(weights, grads[0], grads[1]);
        add_rows<T>(grad_first, weights, firsts_here, lanes);
        if (has_own) add_to_buckets<T>(own_buckets, weights, ids, lane % 2);
      }
      ++turn;
      if (++tile * rows >= length) break;
      enter(tile);
    }
    if (owns_queries && number + gridDim.x < work.items) load_own(item_of(work, call, number + gridDim.x));
    if (!active) continue;
#pragma unroll
    for (int x = 0; x < 32; ++x) grad_first[x / 4][x % 4] *= call.scale;
    __syncwarp();
    if (has_own) {
      gather_buckets(room, buckets, call.scale, call.scale, lane);
      __syncwarp();
      uint32_t sums[4][4];
      load_rows(sums, place_at(room), lanes);
      store_rows<kMostBuckets / 8>(owns_queries ? call.grad_lookup_k : call.grad_lookup_q, item.batch, item.head, own_block * kRows, length,
                                   room, lane);
#pragma unroll
      for (int k = 0; k < 4; ++k) add_rows<T>(grad_first, sums[k], place_at(table_own) + k * 16 * kRowBytes, lanes);
    }
    store_rows(owns_queries ? call.grad_q : call.grad_k, item.batch, item.head, own_block * kRows, length, room, grad_first, lane);
    if (!owns_queries) store_rows(call.grad_v, item.batch, item.head, own_block * kRows, length, room, grad_second, lane);
  }
}

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

struct Device {
  int major = 0, processors = 0, block_bytes = 0, bytes = 0;
};

cudaError_t describe(Device& device) {
  int number = 0;
  if (const cudaError_t error = cudaGetDevice(&number)) return error;
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&device.major, cudaDevAttrComputeCapabilityMajor},
      {&device.processors, cudaDevAttrMultiProcessorCount},
      {&device.block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&device.bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
  };
  for (const auto& [value, attribute] : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, number)) return error;
  }
  return cudaSuccess;
}

int divided(int n, int by) { return (n + by - 1) / by; }

template <typename R>
cudaError_t launch(void (*kernel)(AttentionCall, Work), const AttentionCall& call, cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = describe(device)) return error;
  if (device.major < 8) return cudaErrorInvalidConfiguration;
  // As many warps as let the most heads run at once, each in tiles as large as fit: between tiles warps wait for each other,
  // within one they drift apart, so that one multiplies while another looks up.
  Work work{};
  int warps = 0, at_once = 0;
  const int blocks = divided(call.length, kRows);
  for (int w = 1; w <= std::min(kMaxWarps, blocks); ++w) {
    int tiles = 1;
    const auto rows = [&] { return divided(blocks, tiles) * kRows; };
    while (tiles < blocks && R::bytes(w, rows()) > device.block_bytes) ++tiles;
    if (R::bytes(w, rows()) > device.block_bytes) break;
    const int groups = divided(blocks, w), together = std::max(1, std::min(kMaxWarps / w, device.bytes / (R::bytes(w, rows()) + 1024)));
    const int ours = together * work.groups, best = at_once * groups;
    if (warps == 0 || ours > best || (ours == best && groups < work.groups)) {
      work = {blocks, groups, call.batch * call.heads * groups, rows(), false}, warps = w, at_once = together;
    }
  }
  if (warps == 0) return cudaErrorInvalidConfiguration;
  work.by_head = call.on_k.head_stride || call.on_q.head_stride || call.on_v.head_stride;
  const int bytes = R::bytes(warps, work.rows);
  const void* const code = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  kernel<<<static_cast<unsigned>(std::min(work.items, device.processors * at_once)), warps * 32, bytes, stream>>>(call, work);
  return cudaGetLastError();
}

template <typename T, bool on_q, bool on_v>
cudaError_t launch_forward(const AttentionCall& call, cudaStream_t stream) {
  return launch<ForwardRoom<on_q, on_v>>(attend<T, on_q, on_v>, call, stream);
}

template <typename T, bool on_q, bool on_v>
cudaError_t launch_backward(const AttentionCall& call, cudaStream_t stream) {
  const cudaError_t error =
      launch<BackwardRoom<true, on_q, on_v>>(differentiate<T, true, on_q, on_v>, call, stream);
  if (error != cudaSuccess) return error;
  return launch<BackwardRoom<false, on_q, on_v>>(differentiate<T, false, on_q, on_v>, call, stream);
}

template <typename T>
cudaError_t launch_for(const AttentionCall& call, bool backward, cudaStream_t stream) {
  if (call.on_v.data) return backward ? launch_backward<T, true, true>(call, stream) : launch_forward<T, true, true>(call, stream);
  if (call.on_q.data) return backward ? launch_backward<T, true, false>(call, stream) : launch_forward<T, true, false>(call, stream);
  return backward ? launch_backward<T, false, false>(call, stream) : launch_forward<T, false, false>(call, stream);
}

}  // namespace

cudaError_t launch_attention(const AttentionCall& call, cudaStream_t stream) {
  return call.is_bfloat16 ? launch_for<__nv_bfloat16>(call, false, stream) : launch_for<__half>(call, false, stream);
}

cudaError_t launch_attention_backward(const AttentionCall& call, cudaStream_t stream) {
  return call.is_bfloat16 ? launch_for<__nv_bfloat16>(call, true, stream) : launch_for<__half>(call, true, stream);
}

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
