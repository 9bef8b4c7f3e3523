// SPDX-License-Identifier: Apache-2.0
// Backward of attention_forward.cu, for some heads at a time. Warps that own keys recompute the weights and write the gradients
// of the scores; those that own queries, and in a third kernel keys, read and sum these. No atomics, so sums have a fixed order.
#include <cmath>

#include "attention_rows.cuh"

namespace irpe {
namespace {

template <bool on_q, bool on_v>
using ScoreRoom = Room<1 + on_q + on_v, 4 * on_q, false, 2, true, true>;

// Gradients of the scores and of v.
template <typename T, bool on_q, bool on_v>
__global__ void __launch_bounds__(kMaxWarps * 32) differentiate_scores(const AttentionCall call, const Work work) {
  using R = ScoreRoom<on_q, on_v>;
  if (!kAmpere) return;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Lane lanes(lane);
  const int length = call.length, rows = work.rows;
  const Parts<R, T> at(shared, warps, warp, rows);
  float* const others = static_cast<float*>(at.others);
  float* const statistics = others + rows * kLookupStride;  // two turns of log_sums, then deltas
  float* const deltas = statistics + 2 * rows;
  const Place own_row = place_at(at.own) + lane / 4 * kLookupStride * 4;
  const Place others_row = place_at(others) + lane % 4 * 2 * kLookupStride * 4;

  const auto fetch_tiles = [&](const Item& item, int tile, int turn) {
    T* const to = at.tiles + turn % 2 * 2 * rows * kHeadDim;
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
    const unsigned own_block = item.group * warps + warp, last_block = work.blocks - 1;
    const unsigned ids_before = min(own_block, last_block) * work.blocks * 32 + lane;
    const bool active = own_block < work.blocks;
    uint2 ids_ahead = {}, turned_ahead;
    const auto load_ids = [&](unsigned block) {
      const unsigned at = ids_before + min(block, last_block) * 32;
      turned_ahead = load_kept(call.ids.by_key + at);
      if (on_q) ids_ahead = load_kept(call.ids.by_query + at);
    };
    load_ids(0);
    uint32_t key[4][4], value[4][4];
    load_rows(key, head_of<T>(call.k, item.batch, item.head), call.k.row_stride, own_block * kRows, length, lane);
    load_rows(value, head_of<T>(call.v, item.batch, item.head), call.v.row_stride, own_block * kRows, length, lane);
    if (tables_of < 0 || (work.by_head && tables_of != item.head)) {
      __syncthreads();
      load_table<R::kTableRows>(at.table_k, call.on_k, item.head, call.buckets);
      if (on_q) load_table<R::kTableRows>(at.table_q, call.on_q, item.head, call.buckets);
      if (on_v) load_table<R::kTableRows>(at.table_v, call.on_v, item.head, call.buckets);
      tables_of = item.head;
    }

    // Waits for a tile and prepares it. Apart from the loop: the first time, there are no sums yet to hold.
    const auto enter = [&](int tile) {
      const T* const queries = at.tiles + turn % 2 * 2 * rows * kHeadDim;
      const int columns = min(rows, length - tile * rows);
      wait_for_copies();
      __syncthreads();
      if ((tile + 1) * rows < length) {
        fetch_tiles(item, tile + 1, turn + 1);
      } else if (number + gridDim.x < work.items) {
        fetch_tiles(item_of(work, call, number + gridDim.x), 0, turn + 1);
      }
      if (tile == 0 && on_q) look_up_all<T>(reinterpret_cast<float*>(at.own), key, at.table_q, lane);
      for (int first = warp * kRows; first < columns; first += warps * kRows) {
        const T *const here = queries + first * kHeadDim, *const grads_here = here + rows * kHeadDim;
        // Products of results and their gradients: what all gradients of a query's scores lack.
        const int row = tile * rows + first + lane / 8;
        const T* const from = head_of<T>(call.out, item.batch, item.head) + row * call.out.row_stride + lane % 8 * 8;
        uint4 results[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool valid = row + 4 * i < length;
          results[i] = valid ? *reinterpret_cast<const uint4*>(from + 4 * i * call.out.row_stride) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint4 grad = *reinterpret_cast<const uint4*>(chunk_of(grads_here, lane / 8 + 4 * i, lane % 8));
          float delta = product(results[i].x, grad.x, T()) + product(results[i].y, grad.y, T()) +
                        product(results[i].z, grad.z, T()) + product(results[i].w, grad.w, T());
          delta = quad_sum(delta);
          delta += __shfl_xor_sync(~0u, delta, 4);
          if (lane % 8 == 0) deltas[first + lane / 8 + 4 * i] = delta;
        }
        uint32_t query[4][4], grad[4][4];
        load_rows(query, place_at(here), lanes);
        if (on_v) {
          load_rows(grad, place_at(grads_here), lanes);
          look_up_both(others + first * kLookupStride, query, grad, at.table_k, at.table_v, lane);
        } else {
          look_up_all<T>(others + first * kLookupStride, query, at.table_k, lane);
        }
      }
      __syncthreads();
    };
    enter(0);
    float grad_v[8][4] = {};
    for (int tile = 0;;) {
      const Place queries = place_at(at.tiles) + turn % 2 * 2 * rows * kRowBytes;
      const Place log_sums = place_at(statistics) + turn % 2 * rows * 4 + lane % 4 * 8;
      const unsigned columns = min(rows, length - tile * rows);
      const unsigned scores_at = block_of(work, item.plane, tile * rows / kRows, own_block) + lane;
      for (unsigned first = active ? 0 : columns; first < columns; first += kRows) {
        const Place queries_here = queries + first * kRowBytes, grads_here = queries_here + rows * kRowBytes;
        float scores[2][4], grads[2][4] = {};
        const Place column = others_row + first * (kLookupStride * 4);
        if (on_q) {
          add_lookups<true>(scores[0], ids_ahead.x, own_row, true);
          add_lookups<true>(scores[1], ids_ahead.y, own_row, true);
        }
        if (on_v) {
          float found[2][4];
          take_lookups<T>(found[0], grads[0], turned_ahead.x, column);
          take_lookups<T>(found[1], grads[1], turned_ahead.y, column + 8 * kLookupStride * 4);
#pragma unroll
          for (int x = 0; x < 8; ++x) scores[x / 4][x % 4] += found[x / 4][x % 4];
        } else {
          add_lookups<false>(scores[0], turned_ahead.x, column, !on_q);
          add_lookups<false>(scores[1], turned_ahead.y, column + 8 * kLookupStride * 4, !on_q);
        }
        load_ids((tile * rows + first) / kRows + 1);
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
      }
      ++turn;
      if (++tile * rows >= length) break;
      enter(tile);
    }
    if (active) store_rows(call.grad_v, item.batch, item.head, own_block * kRows, length, at.room, grad_v, lane);
  }
}

template <typename T>
cudaError_t launch_for(const AttentionCall& call, int first, int planes, cudaStream_t stream) {
  const auto scores = [&] {
    if (call.on_v.data) return launch<ScoreRoom<true, true>>(differentiate_scores<T, true, true>, call, first, planes, stream);
    if (call.on_q.data) return launch<ScoreRoom<true, false>>(differentiate_scores<T, true, false>, call, first, planes, stream);
    return launch<ScoreRoom<false, false>>(differentiate_scores<T, false, false>, call, first, planes, stream);
  };
  if (const cudaError_t error = scores()) return error;
  const auto of_keys = [&] {
    if (call.on_q.data) return launch<SumRoom<true>>(differentiate_rows<T, true, true>, call, first, planes, stream);
    return launch<SumRoom<false>>(differentiate_rows<T, true, false>, call, first, planes, stream);
  };
  if (const cudaError_t error = of_keys()) return error;
  return launch<SumRoom<true>>(differentiate_rows<T, false, true>, call, first, planes, stream);
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
