// SPDX-License-Identifier: Apache-2.0
// Arguments of the fused attention kernels. Plain data, for the reason given in plan.h.
#pragma once
#include "plan.h"

namespace irpe {

// One encoding: on queries, keys or values. `cross` has two parts, whose tables lie side by side. Tables hold only the buckets
// from the least id to the greatest: a distance is never negative, so `euc` and `quant` use half of theirs.
struct Encoding {
  int32_t parts;                // 0: absent
  const PlanView* plan[2];      // on queries: by columns
  int64_t offset[2];            // position of id 0 of each part, which may be before the first bucket
  int64_t buckets, padded;      // of all parts; rounded up to a multiple of 16
  bool bias;
  const float* table;           // q, k: (heads or 1, D, padded); bias: (heads or 1, padded); v: (heads or 1, buckets, D padded)
  const float* transposed;      // q, k: (heads or 1, buckets, D padded); v: (heads or 1, D, padded); for backward
  bool shared;                  // one table for all heads
  float* grad;                  // one for each (b, h): (buckets, D padded); bias: (padded)
};

struct Rows {  // (B, H, L, D) with stride 1 in D
  float* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionArgs {
  int64_t batch, heads, length, head_dim;
  Rows q, k, v, out;
  float scale;
  Encoding on_q, on_k, on_v;    // on_q.table and on_q.transposed already carry `scale`
  const float* key_mask;        // (B, length padded) 0 or -inf; null: none
  const float* mask;            // added to the scores; null: none
  int64_t mask_stride[4];       // b, h, query, key; 0 where it broadcasts
  float dropout_p;
  uint64_t seed;
  int64_t tile;                 // queries per tile
  int64_t padded;               // row stride of `probs`, a multiple of 16
  int64_t width;                // row stride of scores, with room for the buckets of a table behind the keys
  // Kept by forward for backward; null in inference.
  float* stats;                 // (B, H, L, 2) greatest score and 1 / sum of exp(score - greatest); 0, 0 where all is masked
  float* probs;                 // (B, H, L, padded) exp(score - greatest); null: computed again
  float* sums;                  // (B, H, L, on_v.padded) of these, after dropout, in buckets; null without on_v
  // Backward.
  Rows grad_out, grad_q, grad_k, grad_v;
};

}  // namespace irpe
