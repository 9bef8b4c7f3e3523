// SPDX-License-Identifier: Apache-2.0
// Backward of attention_forward.cu, in two kernels and for some heads at a time. Warps that own keys recompute the weights and
// write the gradients of the scores; warps that own queries read these. No atomics, so sums have a fixed order.
#include <cmath>

#include "attention_launch.cuh"

namespace irpe {
namespace {

template <bool on_q, bool on_v>
using KeyRoom = Room<1 + on_q + on_v, on_q, on_q, 2, true, true>;
using QueryRoom = Room<1, false, true, 1, false, false>;

// Gradients of the scores, in blocks of 16 keys x 16 queries as left operands, one word of four for each lane:
// (planes, M blocks of queries, M blocks of keys, 32 lanes).
__device__ __forceinline__ unsigned block_of(const Work& work, unsigned plane, unsigned queries, unsigned keys) {
  return ((plane * work.blocks + queries) * work.blocks + keys) * 32;
}

// Gradients of v, k and the lookups of k; and those of the scores.
template <typename T, bool on_q, bool on_v>
__global__ void __launch_bounds__(kMaxWarps * 32) differentiate_keys(const AttentionCall call, const Work work) {
  using R = KeyRoom<on_q, on_v>;
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
  float* const statistics = others + rows * kLookupStride;  // two turns of log_sums, then deltas
  float* const deltas = statistics + 2 * rows;
  const Place own_row = place_at(own) + lane / 4 * kLookupStride * 4, own_buckets = place_at(buckets) + lane * 4;
  const Place others_row = place_at(others) + lane % 4 * 2 * kLookupStride * 4;

  const auto fetch_tiles = [&](const Item& item, int tile, int turn) {
    T* const to = tiles + turn % 2 * 2 * rows * kHeadDim;
    const int first = tile * rows, left = length - first;
    fetch_tile(to, head_of<T>(call.q, item.batch, item.head) + first * call.q.row_stride, call.q.row_stride, rows, left);
    fetch_tile(to + rows * kHeadDim, head_of<T>(call.grad_out, item.batch, item.head) + first * call.grad_out.row_stride,
               call.grad_out.row_stride, rows, left);
    const float* const from = call.log_sums + static_cast<int64_t>(item.batch * call.heads + item.head) * length + first;
    for (int x = threadIdx.x; x < rows; x += blockDim.x) {
      float* const sum = statistics + turn % 2 * rows + x;
      if (x < left) {
        copy<4>(sum, from + x, true);
      } else {
        *sum = INFINITY;  // a query that weighs nothing
      }
    }
  };
  fetch_tiles(item_of(work, call, blockIdx.x), 0, 0);
  const float factor = call.scale * kLog2e;
  int turn = 0, tables_of = -1;
  for (int number = blockIdx.x; number < work.items; number += gridDim.x) {
    const Item item = item_of(work, call, number);
    const unsigned own_block = item.group * warps + warp, ids_before = own_block * work.blocks * 32 + lane;
    const bool active = own_block < work.blocks;
    const T* const results = head_of<T>(call.out, item.batch, item.head);
    uint32_t key[4][4], value[4][4];
    load_rows(key, head_of<T>(call.k, item.batch, item.head), call.k.row_stride, own_block * kRows, length, lane);
    load_rows(value, head_of<T>(call.v, item.batch, item.head), call.v.row_stride, own_block * kRows, length, lane);
    if (tables_of < 0 || (work.by_head && tables_of != item.head)) {
      __syncthreads();
      load_table(table_k, call.on_k, item.head, call.buckets);
      if (on_q) load_table(table_q, call.on_q, item.head, call.buckets);
      if (on_v) load_table(table_v, call.on_v, item.head, call.buckets);
      tables_of = item.head;
    }
    if (on_q) clear_buckets(buckets, lane);

    // Waits for a tile and prepares it. Apart from the loop: the first time, there are no sums yet to hold.
    const auto enter = [&](int tile) {
      const Place queries = place_at(tiles) + turn % 2 * 2 * rows * kRowBytes;
      const int columns = min(rows, length - tile * rows);
      wait_for_copies();
      __syncthreads();
      if ((tile + 1) * rows < length) {
        fetch_tiles(item, tile + 1, turn + 1);
      } else if (number + gridDim.x < work.items) {
        fetch_tiles(item_of(work, call, number + gridDim.x), 0, turn + 1);
      }
      if (tile == 0 && on_q) look_up_all<T, false>(reinterpret_cast<float*>(own), key, table_q, lane);
      for (int first = warp * kRows; first < columns; first += warps * kRows) {
        const Place here = queries + first * kRowBytes, grads_here = here + rows * kRowBytes;
        float delta[2] = {0.f, 0.f};  // products of the result and its gradient: what all gradients of a query's scores lack
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          uint32_t grad[4];
          load_matrices(grad, (grads_here + lanes.as_rows) ^ (32 * k));
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            const int row = min(tile * rows + first + lane / 4 + x % 2 * 8, length - 1);  // past the last, gradients are zero
            const T* const from = results + row * call.out.row_stride + k * 16 + x / 2 * 8 + lane % 4 * 2;
            const float2 a = unpacked(*reinterpret_cast<const uint32_t*>(from), T()), b = unpacked(grad[x], T());
            delta[x % 2] += a.x * b.x + a.y * b.y;
          }
        }
        delta[0] = quad_sum(delta[0]), delta[1] = quad_sum(delta[1]);
        if (lane % 4 == 0) deltas[first + lane / 4] = delta[0], deltas[first + lane / 4 + 8] = delta[1];
        uint32_t query[4][4], grad[4][4];
        load_rows(query, here, lanes);
        if (on_v) {
          load_rows(grad, grads_here, lanes);
          look_up_both(others + first * kLookupStride, query, grad, table_k, table_v, lane);
        } else {
          look_up_all<T, false>(others + first * kLookupStride, query, table_k, lane);
        }
      }
      __syncthreads();
    };
    enter(0);
    float grad_k[8][4] = {}, grad_v[8][4] = {};
    for (int tile = 0;;) {
      const Place queries = place_at(tiles) + turn % 2 * 2 * rows * kRowBytes;
      const Place log_sums = place_at(statistics) + turn % 2 * rows * 4 + lane % 4 * 8;
      const unsigned columns = min(rows, length - tile * rows);
      // One thing to count, the rest follows from it: registers are scarce here.
      const unsigned ids_at = ids_before + tile * rows * (32 / kRows);
      const unsigned scores_at = block_of(work, item.plane, tile * rows / kRows, own_block) + lane;
      for (unsigned first = active ? 0 : columns; first < columns; first += kRows) {
        const Place queries_here = queries + first * kRowBytes, grads_here = queries_here + rows * kRowBytes;
        float scores[2][4], grads[2][4] = {};
        const Place column = others_row + first * (kLookupStride * 4);
        const uint2 turned = load_kept(call.ids.by_key + (ids_at + first * (32 / kRows)));
        uint2 ids = {};
        if (on_q) {
          ids = load_kept(call.ids.by_query + (ids_at + first * (32 / kRows)));
          add_lookups<true>(scores[0], ids.x, own_row, true);
          add_lookups<true>(scores[1], ids.y, own_row, true);
        }
        if (on_v) {
          float found[2][4];
          take_lookups<T>(found[0], grads[0], turned.x, column);
          take_lookups<T>(found[1], grads[1], turned.y, column + 8 * kLookupStride * 4);
#pragma unroll
          for (int x = 0; x < 8; ++x) scores[x / 4][x % 4] += found[x / 4][x % 4];
        } else {
          add_lookups<false>(scores[0], turned.x, column, !on_q);
          add_lookups<false>(scores[1], turned.y, column + 8 * kLookupStride * 4, !on_q);
        }
        multiply_rows<T, 1>(scores, key, queries_here, lanes);
        multiply_rows<T, 1>(grads, value, grads_here, lanes);
#pragma unroll
        for (int x = 0; x < 8; x += 2) {
          const float2 sum = load_pair(log_sums + first * 4 + x / 4 * 32);
          const float2 delta = load_pair(place_at(deltas) + lane % 4 * 8 + first * 4 + x / 4 * 32);
          float *const score = &scores[x / 4][x % 4], *const grad = &grads[x / 4][x % 4];
          score[0] = power_of_two(fmaf(score[0], factor, -sum.x)), score[1] = power_of_two(fmaf(score[1], factor, -sum.y));
          grad[0] = score[0] * (grad[0] - delta.x), grad[1] = score[1] * (grad[1] - delta.y);
        }
        uint32_t weights[4];
        as_weights<T>(weights, scores[0], scores[1]);
        add_rows<T>(grad_v, weights, grads_here, lanes);
        as_weights<T>(weights, grads[0], grads[1]);
        static_cast<uint4*>(call.grad_scores)[scores_at + first * (work.blocks * 32 / kRows)] =
            make_uint4(weights[0], weights[1], weights[2], weights[3]);
        add_rows<T>(grad_k, weights, queries_here, lanes);
        if (on_q) add_to_buckets<T>(own_buckets, weights, ids, lane % 2);
      }
      ++turn;
      if (++tile * rows >= length) break;
      enter(tile);
    }
    if (!active) continue;
#pragma unroll
    for (int x = 0; x < 32; ++x) grad_k[x / 4][x % 4] *= call.scale;
    __syncwarp();
    if (on_q) {
      add_buckets(grad_k, room, buckets, call.scale, call.scale, table_q, call.grad_lookup_q, item.batch, item.head,
                  own_block * kRows, length, lanes);
    }
    store_rows(call.grad_k, item.batch, item.head, own_block * kRows, length, room, grad_k, lane);
    store_rows(call.grad_v, item.batch, item.head, own_block * kRows, length, room, grad_v, lane);
  }
}

// Gradients of q and of its lookups.
template <typename T>
__global__ void __launch_bounds__(kMaxWarps * 32) differentiate_queries(const AttentionCall call, const Work work) {
  using R = QueryRoom;
  constexpr int kAhead = 4;  // loads in flight
  if (!kAmpere) return;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Lane lanes(lane);
  const int length = call.length, rows = work.rows;
  T* const table = reinterpret_cast<T*>(shared);
  unsigned char* const own = shared + R::kTables + warp * R::kPerWarp;
  unsigned char* const buckets = own + R::kSums;
  T* const room = reinterpret_cast<T*>(own);
  T* const tiles = reinterpret_cast<T*>(shared + R::kTables + warps * R::kPerWarp);
  const Place own_buckets = place_at(buckets) + lane * 4;

  const auto fetch_keys = [&](const Item& item, int tile, int turn) {
    fetch_tile(tiles + turn % 2 * rows * kHeadDim, head_of<T>(call.k, item.batch, item.head) + tile * rows * call.k.row_stride,
               call.k.row_stride, rows, length - tile * rows);
  };
  fetch_keys(item_of(work, call, blockIdx.x), 0, 0);
  int turn = 0, tables_of = -1;
  for (int number = blockIdx.x; number < work.items; number += gridDim.x) {
    const Item item = item_of(work, call, number);
    const unsigned own_block = item.group * warps + warp, ids_before = own_block * work.blocks * 32 + lane;
    const bool active = own_block < work.blocks;
    if (tables_of < 0 || (work.by_head && tables_of != item.head)) {
      __syncthreads();
      load_table(table, call.on_k, item.head, call.buckets);
      tables_of = item.head;
    }
    clear_buckets(buckets, lane);
    float grad_q[8][4] = {};
    for (int tile = 0; tile * rows < length; ++tile, ++turn) {
      const Place keys = place_at(tiles) + turn % 2 * rows * kRowBytes;
      const int first_block = tile * rows / kRows, blocks = active ? (min(rows, length - tile * rows) + kRows - 1) / kRows : 0;
      const uint4* const from = static_cast<uint4*>(call.grad_scores) + block_of(work, item.plane, own_block, first_block) + lane;
      uint4 ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i < blocks) ahead[i] = from[i * 32];
      }
      wait_for_copies();
      __syncthreads();
      if ((tile + 1) * rows < length) {
        fetch_keys(item, tile + 1, turn + 1);
      } else if (number + gridDim.x < work.items) {
        fetch_keys(item_of(work, call, number + gridDim.x), 0, turn + 1);
      }
      for (int block = 0; block < blocks; block += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (block + i >= blocks) break;
          const uint4 x = ahead[i];
          if (block + i + kAhead < blocks) ahead[i] = from[(block + i + kAhead) * 32];
          const uint2 ids = load_kept(call.ids.by_query + (ids_before + (first_block + block + i) * 32));
          uint32_t weights[4] = {transposed(x.x), transposed(x.z), transposed(x.y), transposed(x.w)};
          if (first_block + block + i == work.blocks - 1) {  // keys past the last
            const int left = length - (work.blocks - 1) * kRows - lane % 4 * 2;
#pragma unroll
            for (int y = 0; y < 4; ++y) {
              const int here = left - y / 2 * 8;
              weights[y] &= here <= 0 ? 0u : here == 1 ? 0xffffu : ~0u;
            }
          }
          add_rows<T>(grad_q, weights, keys + (block + i) * kRows * kRowBytes, lanes);
          add_to_buckets<T>(own_buckets, weights, ids, lane % 2);
        }
      }
    }
    if (!active) continue;
#pragma unroll
    for (int x = 0; x < 32; ++x) grad_q[x / 4][x % 4] *= call.scale;
    __syncwarp();
    add_buckets(grad_q, room, buckets, call.scale, call.scale, table, call.grad_lookup_k, item.batch, item.head,
                own_block * kRows, length, lanes);
    store_rows(call.grad_q, item.batch, item.head, own_block * kRows, length, room, grad_q, lane);
  }
}

template <typename T>
cudaError_t launch_for(const AttentionCall& call, int first, int planes, cudaStream_t stream) {
  const auto keys = [&] {
    if (call.on_v.data) return launch<KeyRoom<true, true>>(differentiate_keys<T, true, true>, call, first, planes, stream);
    if (call.on_q.data) return launch<KeyRoom<true, false>>(differentiate_keys<T, true, false>, call, first, planes, stream);
    return launch<KeyRoom<false, false>>(differentiate_keys<T, false, false>, call, first, planes, stream);
  };
  if (const cudaError_t error = keys()) return error;
  return launch<QueryRoom>(differentiate_queries<T>, call, first, planes, stream);
}

}  // namespace

cudaError_t launch_attention_backward(const AttentionCall& call, cudaStream_t stream) {
  for (int first = 0; first < call.batch * call.heads; first += call.planes) {
    const int planes = std::min(call.planes, call.batch * call.heads - first);
    const cudaError_t error = call.is_bfloat16 ? launch_for<__nv_bfloat16>(call, first, planes, stream)
                                               : launch_for<__half>(call, first, planes, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace irpe
