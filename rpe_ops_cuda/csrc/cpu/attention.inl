// SPDX-License-Identifier: Apache-2.0
// Attention with relative position encoding, tile by tile. A tile is a few queries of one head with all their keys: its
// scores stay in the second-level cache, and no (L, L) matrix is ever needed.
//
//   scores = scale q k^T + lookup(scale q table_k) + lookup(scale k table_q)^T + masks
//   out    = P v + bucket_sums(P) table_v,   P = dropout(softmax(scores))
//
// The buckets of a table act as extra keys: one product gives q k^T and q table_k side by side, in rows of `width`, and one
// turns P and its bucket sums into `out`. The gradients work the same way.

struct Scratch {  // a stack of arrays for one thread; with a null `base` it only counts bytes
  char* base;
  int64_t used;
  float* floats(int64_t count) {
    float* result = base ? reinterpret_cast<float*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
    return result;
  }
};

struct Buffers {
  float *k_panels, *v_panels;            // keys and buckets, transposed, in panels: B of q k^T and grad_out v^T
  float *k_rows, *v_rows;                // (L + buckets, D padded)
  float *q_tile, *out_tile, *grad_tile;  // (tile, D padded)
  float *scores, *grad_scores, *dropped; // (tile, width)
  float *lookup_q, *sums_q;              // (on_q.buckets, padded) and its gradient
  float *grad_k, *grad_v;                // (L + buckets, D padded), (L, D padded)
  float *row, *spare;                    // one row of scores, or of their gradients, between two steps
  float *factors;                        // (tile) 1 / sum of exp(score - greatest)
  float *bucket_scratch;
};

// Buckets stored behind the keys. A bias has none: it is looked up in its table.
INLINE int64_t behind_keys(const Encoding& e) { return e.parts && !e.bias ? e.buckets : 0; }

INLINE void zero(float* x, int64_t count) { __builtin_memset(x, 0, count * sizeof(float)); }

INLINE int64_t column_room(const AttentionArgs& a) { return a.on_q.parts ? a.on_q.buckets * a.padded + LANES : 0; }

static Buffers carve(const AttentionArgs& a, bool backward, Scratch& s) {
  Buffers b = {};
  const int64_t d = rounded_up(a.head_dim), panel_room = (a.width + kPanel) * a.head_dim + kPanel;
  const int64_t row_room = (a.length + behind_keys(a.on_k)) * d, tile_room = a.tile * a.width + LANES;
  const bool recompute = !backward || a.probs == nullptr;
  if (recompute) b.k_panels = s.floats(panel_room);
  if (backward) b.v_panels = s.floats(panel_room), b.k_rows = s.floats(row_room);
  if (!backward) b.v_rows = s.floats((a.length + behind_keys(a.on_v)) * d);
  b.q_tile = s.floats(a.tile * d);
  b.out_tile = s.floats(a.tile * d);
  if (recompute) b.scores = s.floats(tile_room), b.lookup_q = s.floats(column_room(a));
  if (a.dropout_p > 0) b.dropped = s.floats(tile_room);
  b.factors = s.floats(a.tile);
  b.row = s.floats(a.padded + LANES);
  b.spare = s.floats(a.padded + LANES);
  int64_t most = 0;
  const Encoding* by_rows[2] = {&a.on_k, &a.on_v};
  for (const Encoding* e : by_rows)
    for (int32_t p = 0; p < e->parts; ++p) {
      const int64_t needed = lookups::bucket_scratch(*e->plan[p]);
      most = needed > most ? needed : most;
    }
  b.bucket_scratch = s.floats(most);
  if (backward) {
    b.grad_tile = s.floats(a.tile * d);
    b.grad_scores = s.floats(tile_room);
    b.sums_q = s.floats(column_room(a));
    b.grad_k = s.floats(row_room);
    b.grad_v = s.floats(a.length * d);
  }
  // Columns that nothing fills are still multiplied.
  if (b.k_panels) zero(b.k_panels, panel_room);
  if (b.v_panels) zero(b.v_panels, panel_room);
  return b;
}

static int64_t attention_scratch(const AttentionArgs& a, bool backward) {
  Scratch measure = {nullptr, 0};
  carve(a, backward, measure);
  return measure.used;
}

INLINE float* rows_of(const Rows& r, int64_t b, int64_t h) { return r.data + b * r.batch_stride + h * r.head_stride; }

// The hardware prefetcher follows consecutive addresses, but not rows that lie far apart.
INLINE void prefetch_row(const AttentionArgs& a, const Rows& r, int64_t matrix, int64_t i) {
  if (matrix >= a.batch * a.heads) return;
  const float* row = rows_of(r, matrix / a.heads, matrix % a.heads) + i * r.row_stride;
  for (int64_t x = 0; x < a.head_dim; x += 16) __builtin_prefetch(row + x, 0, 2);
}

// dest (count, d padded) = factor * rows; the padding is zero.
static void pack_rows(const float* from, int64_t stride, int64_t count, int64_t d, float factor, float* dest) {
  const int64_t padded = rounded_up(d);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t x = 0; x < d; ++x) dest[i * padded + x] = factor * from[i * stride + x];
    for (int64_t x = d; x < padded; ++x) dest[i * padded + x] = 0;
  }
}

static void unpack_rows(const float* from, int64_t count, int64_t d, float factor, float* dest, int64_t stride) {
  const int64_t padded = rounded_up(d);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t x = 0; x < d; ++x) dest[i * stride + x] = factor * from[i * padded + x];
}

// dest: panels of kPanel rows, each (d, kPanel).
static void pack_panels(const float* from, int64_t stride, int64_t count, int64_t d, float* dest) {
  for (int64_t j = 0; j < count; j += LANES) {
    float* panel = dest + j / kPanel * kPanel * d + j % kPanel;
    int64_t x = 0;
    for (; j + LANES <= count && x + LANES <= d; x += LANES) {
      vf block[LANES];
      for (int r = 0; r < LANES; ++r) block[r] = load(from + (j + r) * stride + x);
      transpose(block);
      for (int r = 0; r < LANES; ++r) store(panel + (x + r) * kPanel, block[r]);
    }
    for (; x < d; ++x)
      for (int64_t r = 0; r < LANES && j + r < count; ++r) panel[x * kPanel + r] = from[(j + r) * stride + x];
  }
}

// Appends a table (d, padded) to such panels, behind their `keys` rows.
static void append_panels(const Encoding& e, const float* table, int64_t keys, int64_t d, float* dest) {
  for (int64_t n = 0, here; n < e.buckets; n += here) {
    const int64_t first = (keys + n) % kPanel, left = e.buckets - n;
    here = left < kPanel - first ? left : kPanel - first;
    float* panel = dest + (keys + n) / kPanel * kPanel * d + first;
    for (int64_t x = 0; x < d; ++x)
      for (int64_t c = 0; c < here; ++c) panel[x * kPanel + c] = table[x * e.padded + n + c];
  }
}

INLINE const float* table_of(const Encoding& e, const float* tables, int64_t entries, int64_t head) {
  return tables + (e.shared ? 0 : head * entries);
}

// x[j] + the lookups of every part, for every key j. The result is in b.row or b.spare, whichever x is not.
static float* plus_lookups(const Encoding& e, const Buffers& b, int64_t i, const float* lookup, float* x) {
  for (int32_t p = 0; p < e.parts; ++p) {
    float* dest = x == b.row ? b.spare : b.row;
    lookups::add_lookup_row(*e.plan[p], i, lookup + e.offset[p], x, dest);
    x = dest;
  }
  return x;
}

// The same for the encoding on queries, whose lookups (buckets, padded) are by key.
static float* plus_query_lookups(const AttentionArgs& a, const Buffers& b, int64_t i, float* x) {
  for (int32_t p = 0; p < a.on_q.parts; ++p) {
    if (a.on_q.plan[p]->separable) continue;  // done by grouped_queries
    float* dest = x == b.row ? b.spare : b.row;
    lookups::add_lookup_column(*a.on_q.plan[p], i, b.lookup_q + a.on_q.offset[p] * a.padded, a.padded, x, dest);
    x = dest;
  }
  return x;
}

// The same for separable maps, for a group of at most `left` queries from i on: adds to their rows of x in place or, if BACK,
// sums these rows into the lookups' gradient. Returns the size of the group.
template <bool BACK>
static int64_t grouped_queries(const AttentionArgs& a, float* lookup, int64_t i, int64_t left, float* x) {
  if (a.on_q.parts == 0) return left;
  const int64_t count = lookups::column_group(*a.on_q.plan[0], i, left);
  for (int32_t p = 0; p < a.on_q.parts; ++p)
    if (a.on_q.plan[p]->separable)
      lookups::columns<BACK>(*a.on_q.plan[p], i, count, lookup + a.on_q.offset[p] * a.padded, a.padded, x, a.width);
  return count;
}

// Writes up to 2 * kLookupLanes - 1 zeros past the last bucket.
static void bucket_sums_parts(const Encoding& e, int64_t i, const float* x, float* sums, float* scratch) {
  zero(sums, e.buckets);
  for (int32_t p = 0; p < e.parts; ++p) lookups::bucket_sums_row(*e.plan[p], i, x, sums + e.offset[p], scratch);
}

// Prepares what the scores of a whole head need.
static void prepare_scores(const AttentionArgs& a, const Buffers& b, int64_t batch, int64_t head) {
  const float* k = rows_of(a.k, batch, head);
  pack_panels(k, a.k.row_stride, a.length, a.head_dim, b.k_panels);
  if (behind_keys(a.on_k))
    append_panels(a.on_k, table_of(a.on_k, a.on_k.table, a.head_dim * a.on_k.padded, head), a.length, a.head_dim, b.k_panels);
  if (a.on_q.parts == 0) return;
  const int64_t n = a.on_q.padded;
  if (a.on_q.bias) {
    const float* table = table_of(a.on_q, a.on_q.table, n, head);
    for (int64_t x = 0; x < a.on_q.buckets; ++x)
      for (int64_t j = 0; j < a.length; ++j) b.lookup_q[x * a.padded + j] = table[x];
  } else {
    gemm<true>(a.on_q.buckets, rounded_up(a.length), a.head_dim, table_of(a.on_q, a.on_q.table, a.head_dim * n, head), n,
               b.k_panels, kPanel, kPanel * a.head_dim, b.lookup_q, a.padded, false);
  }
}

// dest (count, width) = the rows of a tile times the panels of keys and `buckets`.
INLINE void times_panels(const AttentionArgs& a, int64_t count, const float* tile, const float* panels, int64_t buckets,
                         float* dest) {
  gemm<false>(count, rounded_up(a.length + buckets), a.head_dim, tile, rounded_up(a.head_dim), panels, kPanel,
              kPanel * a.head_dim, dest, a.width, false);
}

// One row of scores, with masks and the encodings on queries and keys added. The result is in `row`, b.row or b.spare; its
// padding up to a whole register is -inf.
static float* finished_scores(const AttentionArgs& a, const Buffers& b, int64_t batch, int64_t head, int64_t i, float* row) {
  const int64_t length = a.length;
  if (a.mask) {
    const float* mask = a.mask + batch * a.mask_stride[0] + head * a.mask_stride[1] + i * a.mask_stride[2];
    for (int64_t j = 0; j < length; ++j) row[j] += mask[j * a.mask_stride[3]];
  }
  if (a.key_mask) {
    const float* mask = a.key_mask + batch * a.padded;
    for (int64_t j = 0; j < length; j += LANES) store(row + j, load(row + j) + load(mask + j));
  }
  const float* lookup = a.on_k.bias ? table_of(a.on_k, a.on_k.table, a.on_k.padded, head) : row + length;
  row = plus_query_lookups(a, b, i, row);
  row = plus_lookups(a.on_k, b, i, lookup, row);
  for (int64_t j = length; j < rounded_up(length); ++j) row[j] = -__builtin_inff();
  return row;
}

static float greatest_of_row(const float* row, int64_t length) {
  vf most = load(row);
  for (int64_t j = LANES; j < length; j += LANES) most = greater(load(row + j), most);
  return greatest_of_lanes(most);
}

INLINE uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// dest = x / (1 - p) where the weight is kept, 0 where it is dropped. A hash of (seed, b, h, i, j) decides, so backward drops
// the same weights, and so does any number of threads.
static void drop_row(const AttentionArgs& a, int64_t matrix_row, const float* x, float* dest) {
  const uint64_t key = mixed(mixed(a.seed) ^ static_cast<uint64_t>(matrix_row));
  const uint32_t key_low = static_cast<uint32_t>(key), key_high = static_cast<uint32_t>(key >> 32);
  const int32_t threshold = static_cast<int32_t>(a.dropout_p * 16777216.0);
  const float kept = 1.0f / (1.0f - a.dropout_p);
  vu counter;
  for (int lane = 0; lane < LANES; ++lane) counter[lane] = static_cast<uint32_t>(lane);
  for (int64_t j = 0; j < rounded_up(a.length); j += LANES, counter += LANES) {
    vu bits = counter * 0x9e3779b9u + key_low;
    bits = (bits ^ (bits >> 16)) * 0x7feb352du;
    bits = ((bits ^ (bits >> 15)) + key_high) * 0x846ca68bu;
    bits ^= bits >> 16;
    const vi keep = reinterpret_cast<vi>(bits >> 8) >= threshold;
    store(dest + j, keep ? load(x + j) * kept : vf{});
  }
}

// Forward for the tiles [begin, end), numbered head by head.
static void attention_forward(const AttentionArgs& a, int64_t begin, int64_t end, char* memory) {
  Scratch scratch = {memory, 0};
  const Buffers b = carve(a, false, scratch);
  const Encoding& on_v = a.on_v;
  const int64_t d = rounded_up(a.head_dim), tiles = (a.length + a.tile - 1) / a.tile;
  const Rows* const next_rows[] = {&a.q, &a.k, &a.v};
  for (int64_t t = begin; t < end; ++t) {
    const int64_t matrix = t / tiles, batch = matrix / a.heads, head = matrix % a.heads;
    const int64_t first = t % tiles * a.tile, count = a.length - first < a.tile ? a.length - first : a.tile;
    if (t == begin || first == 0) {
      prepare_scores(a, b, batch, head);
      pack_rows(rows_of(a.v, batch, head), a.v.row_stride, a.length, a.head_dim, 1, b.v_rows);
      if (on_v.parts)
        __builtin_memcpy(b.v_rows + a.length * d, table_of(on_v, on_v.table, on_v.buckets * d, head),
                         on_v.buckets * d * sizeof(float));
    }
    const float* q = rows_of(a.q, batch, head) + first * a.q.row_stride;
    pack_rows(q, a.q.row_stride, count, a.head_dim, a.scale, b.q_tile);
    times_panels(a, count, b.q_tile, b.k_panels, behind_keys(a.on_k), b.scores);
    for (int64_t i = 0, ready = 0; i < count; ++i) {
      prefetch_row(a, a.out, matrix, first + i);
      for (const Rows* next : next_rows) prefetch_row(a, *next, matrix + 1, first + i);
      float* row = b.scores + i * a.width;
      if (i == ready) ready += grouped_queries<false>(a, b.lookup_q, first + i, count - i, row);
      const float* finished = finished_scores(a, b, batch, head, first + i, row);
      float greatest = greatest_of_row(finished, a.length);
      if (greatest == -__builtin_inff()) greatest = 0;  // every key is masked: all weights are zero
      vf total = {};
      for (int64_t j = 0; j < a.length; j += LANES) {
        const vf e = exp_lanes(load(finished + j), greatest);
        total += e;
        store(row + j, e);
      }
      const float sum = sum_of_lanes(total);
      b.factors[i] = sum == 0 ? 0 : 1 / sum;  // multiplied into the output, which is shorter than the row
      if (a.stats) {
        float* stats = a.stats + 2 * (matrix * a.length + first + i);
        stats[0] = greatest, stats[1] = b.factors[i];
      }
      if (a.probs) {
        float* kept = a.probs + (matrix * a.length + first + i) * a.padded;
        const bool aligned = reinterpret_cast<uintptr_t>(kept) % sizeof(vf) == 0;  // PyTorch's allocator aligns; others may not
        for (int64_t j = 0; j < rounded_up(a.length); j += LANES)
          aligned ? stream(kept + j, load(row + j)) : store(kept + j, load(row + j));
      }
    }
    float* weights = b.scores;
    if (a.dropout_p > 0) {
      for (int64_t i = 0; i < count; ++i)
        drop_row(a, matrix * a.length + first + i, b.scores + i * a.width, b.dropped + i * a.width);
      weights = b.dropped;
    }
    for (int64_t i = 0; on_v.parts && i < count; ++i) {
      float* row = weights + i * a.width;
      bucket_sums_parts(on_v, first + i, row, row + a.length, b.bucket_scratch);
      if (a.sums) {
        float* kept = a.sums + (matrix * a.length + first + i) * on_v.padded;
        __builtin_memcpy(kept, row + a.length, on_v.buckets * sizeof(float));
        zero(kept + on_v.buckets, on_v.padded - on_v.buckets);
      }
    }
    matmul(count, d, a.length + behind_keys(on_v), weights, a.width, b.v_rows, d, b.out_tile, d);
    float* out = rows_of(a.out, batch, head) + first * a.out.row_stride;
    for (int64_t i = 0; i < count; ++i)
      unpack_rows(b.out_tile + i * d, 1, a.head_dim, b.factors[i], out + i * a.out.row_stride, a.out.row_stride);
  }
}

// Backward for the heads [begin, end). P = softmax(scores) before dropout, which is factor * weights; the factor is multiplied
// into grad_out:
//   grad P      = dropout(grad_out v^T + lookup(grad_out table_v^T))
//   grad scores = P (grad P - sum over keys of P grad P)
static void attention_backward(const AttentionArgs& a, int64_t begin, int64_t end, char* memory) {
  Scratch scratch = {memory, 0};
  const Buffers b = carve(a, true, scratch);
  const Encoding &on_q = a.on_q, &on_k = a.on_k, &on_v = a.on_v;
  const int64_t d = rounded_up(a.head_dim), with_k = a.length + behind_keys(on_k);
  const int64_t probs_stride = a.probs ? a.padded : a.width;
  const Rows *const results[] = {&a.grad_q, &a.grad_k, &a.grad_v}, *const next_rows[] = {&a.q, &a.k, &a.v, &a.grad_out};
  for (int64_t matrix = begin; matrix < end; ++matrix) {
    const int64_t batch = matrix / a.heads, head = matrix % a.heads;
    if (a.probs == nullptr) prepare_scores(a, b, batch, head);
    pack_panels(rows_of(a.v, batch, head), a.v.row_stride, a.length, a.head_dim, b.v_panels);
    if (on_v.parts)
      append_panels(on_v, table_of(on_v, on_v.transposed, a.head_dim * on_v.padded, head), a.length, a.head_dim, b.v_panels);
    pack_rows(rows_of(a.k, batch, head), a.k.row_stride, a.length, a.head_dim, 1, b.k_rows);
    if (behind_keys(on_k))
      __builtin_memcpy(b.k_rows + a.length * d, table_of(on_k, on_k.transposed, on_k.buckets * d, head),
                       on_k.buckets * d * sizeof(float));
    zero(b.sums_q, column_room(a));
    float* grad_table_k = on_k.parts ? on_k.grad + matrix * (on_k.bias ? on_k.padded : on_k.buckets * d) : nullptr;
    float* grad_table_q = on_q.parts ? on_q.grad + matrix * (on_q.bias ? on_q.padded : on_q.buckets * d) : nullptr;
    float* grad_table_v = on_v.parts ? on_v.grad + matrix * on_v.buckets * d : nullptr;

    for (int64_t first = 0; first < a.length; first += a.tile) {
      const int64_t count = a.length - first < a.tile ? a.length - first : a.tile;
      const int64_t top = matrix * a.length + first;
      pack_rows(rows_of(a.q, batch, head) + first * a.q.row_stride, a.q.row_stride, count, a.head_dim, a.scale, b.q_tile);
      const float* grad_out = rows_of(a.grad_out, batch, head) + first * a.grad_out.row_stride;
      for (int64_t i = 0; i < count; ++i)
        pack_rows(grad_out + i * a.grad_out.row_stride, 0, 1, a.head_dim, a.stats[2 * (top + i) + 1], b.grad_tile + i * d);
      float* probs = a.probs ? a.probs + top * a.padded : b.scores;
      if (a.probs == nullptr) {
        times_panels(a, count, b.q_tile, b.k_panels, behind_keys(on_k), probs);
        for (int64_t i = 0, ready = 0; i < count; ++i) {
          float* row = probs + i * a.width;
          if (i == ready) ready += grouped_queries<false>(a, b.lookup_q, first + i, count - i, row);
          const float* finished = finished_scores(a, b, batch, head, first + i, row);
          for (int64_t j = 0; j < a.length; j += LANES) store(row + j, exp_lanes(load(finished + j), a.stats[2 * (top + i)]));
        }
      }
      times_panels(a, count, b.grad_tile, b.v_panels, behind_keys(on_v), b.grad_scores);
      if (on_v.parts)
        transposed_matmul(on_v.buckets, d, count, a.sums + top * on_v.padded, on_v.padded, b.grad_tile, d, grad_table_v, d,
                          first > 0);
      for (int64_t i = 0; i < count; ++i) {
        for (const Rows* result : results) prefetch_row(a, *result, matrix, first + i);
        for (const Rows* next : next_rows) prefetch_row(a, *next, matrix + 1, first + i);
        float *row = b.grad_scores + i * a.width, *p = probs + i * probs_stride;
        float* grad = plus_lookups(on_v, b, first + i, row + a.length, row);
        zero(grad + a.length, rounded_up(a.length) - a.length);  // held buckets, or what lookups wrote past the last key
        if (a.dropout_p > 0) {
          drop_row(a, top + i, grad, grad);
          drop_row(a, top + i, p, b.dropped + i * a.width);
        }
        if (a.probs)
          for (int64_t j = 0; j < a.length; j += 16) __builtin_prefetch(p + 4 * a.padded + j, 0, 2);
        // The sum below equals grad_out . out, but loses fewer digits where one key has nearly all the weight.
        vf products = {};
        for (int64_t j = 0; j < a.length; j += LANES) products += load(p + j) * load(grad + j);
        const float mean = sum_of_lanes(products) * a.stats[2 * (top + i) + 1];
        for (int64_t j = 0; j < a.length; j += LANES) store(row + j, load(p + j) * (load(grad + j) - mean));
        for (int32_t part = 0; part < on_q.parts; ++part)
          if (!on_q.plan[part]->separable)
            lookups::add_to_column_buckets(*on_q.plan[part], first + i, row, b.sums_q + on_q.offset[part] * a.padded, a.padded);
        if (on_k.parts) bucket_sums_parts(on_k, first + i, row, row + a.length, b.bucket_scratch);
        for (int64_t x = 0; on_k.bias && x < on_k.buckets; ++x) grad_table_k[x] += row[a.length + x];
      }
      for (int64_t i = 0; i < count;)
        i += grouped_queries<true>(a, b.sums_q, first + i, count - i, b.grad_scores + i * a.width);
      transposed_matmul(a.length, d, count, a.dropout_p > 0 ? b.dropped : probs, a.dropout_p > 0 ? a.width : probs_stride,
                        b.grad_tile, d, b.grad_v, d, first > 0);
      transposed_matmul(with_k, d, count, b.grad_scores, a.width, b.q_tile, d, b.grad_k, d, first > 0);
      matmul(count, d, with_k, b.grad_scores, a.width, b.k_rows, d, b.out_tile, d);
      unpack_rows(b.out_tile, count, a.head_dim, a.scale, rows_of(a.grad_q, batch, head) + first * a.grad_q.row_stride,
                  a.grad_q.row_stride);
    }

    if (on_q.parts) {
      if (on_q.bias) {
        for (int64_t x = 0; x < on_q.buckets; ++x)
          for (int64_t j = 0; j < a.length; ++j) grad_table_q[x] += b.sums_q[x * a.padded + j];
      } else {
        const float* transposed = table_of(on_q, on_q.transposed, on_q.buckets * d, head);
        transposed_matmul(a.length, d, on_q.buckets, b.sums_q, a.padded, transposed, d, b.grad_k, d, true);
        matmul(on_q.buckets, d, a.length, b.sums_q, a.padded, b.k_rows, d, grad_table_q, d);
      }
    }
    if (behind_keys(on_k)) __builtin_memcpy(grad_table_k, b.grad_k + a.length * d, on_k.buckets * d * sizeof(float));
    unpack_rows(b.grad_k, a.length, a.head_dim, 1, rows_of(a.grad_k, batch, head), a.grad_k.row_stride);
    unpack_rows(b.grad_v, a.length, a.head_dim, 1, rows_of(a.grad_v, batch, head), a.grad_v.row_stride);
  }
}
