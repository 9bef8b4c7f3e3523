// SPDX-License-Identifier: Apache-2.0
// Attention with relative position encoding, tile by tile: a tile is a few queries of one head with all their keys, so
// that its scores stay in the second-level cache and no (L, L) matrix is ever needed.
//
//   scores = scale q k^T + lookup(scale q table_k) + lookup(scale k table_q)^T + masks
//   out    = P v + bucket_sums(P) table_v,   P = dropout(softmax(scores))

struct Scratch {  // a stack of arrays for one thread; measures itself when `base` is null
  char* base;
  int64_t used;
  float* floats(int64_t count) {
    float* result = base ? reinterpret_cast<float*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
    return result;
  }
};

struct Buffers {
  float *k_panels, *v_panels;            // transposed, in panels: B of q k^T and grad_out v^T
  float *k_rows, *v_rows;                // (L, D padded)
  float *q_tile, *out_tile, *grad_tile;  // (tile, D padded)
  float *scores, *grad_scores, *dropped; // (tile, padded)
  float *lookup_k, *lookup_q, *lookup_v; // (tile, on_k.padded), (on_q.buckets, padded), (tile, on_v.padded)
  float *sums_k, *sums_q;                // gradients of lookup_k, lookup_q
  float *sums_v;                         // (tile, on_v.padded) attention weights in buckets
  float *grad_k, *grad_v;                // (L, D padded)
  float *row, *spare;                    // one row of scores, or of their gradients, on its way
  float *factors;                        // (tile) 1 / sum of exp(score - greatest)
  float *bucket_scratch;
};

INLINE int64_t lookup_room(const Encoding& e, int64_t rows) { return e.parts ? rows * e.padded + 4 * LANES : 0; }

INLINE int64_t column_room(const AttentionArgs& a) { return a.on_q.parts ? a.on_q.buckets * a.padded + LANES : 0; }

static Buffers carve(const AttentionArgs& a, bool backward, Scratch& s) {
  Buffers b = {};
  const int64_t d = rounded_up(a.head_dim), panel_room = (a.length + kPanel) * a.head_dim + kPanel;
  const bool recompute = !backward || a.probs == nullptr;
  if (recompute) b.k_panels = s.floats(panel_room);
  if (backward) b.v_panels = s.floats(panel_room), b.k_rows = s.floats(a.length * d);
  if (!backward) b.v_rows = s.floats(a.length * d);
  b.q_tile = s.floats(a.tile * d);
  b.out_tile = s.floats(a.tile * d);
  if (a.probs == nullptr) b.scores = s.floats(a.tile * a.padded + LANES);
  if (a.dropout_p > 0) b.dropped = s.floats(a.tile * a.padded);
  if (recompute) b.lookup_k = s.floats(lookup_room(a.on_k, a.tile)), b.lookup_q = s.floats(column_room(a));
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
  b.sums_v = s.floats(lookup_room(a.on_v, a.tile));
  if (backward) {
    b.grad_tile = s.floats(a.tile * d);
    b.grad_scores = s.floats(a.tile * a.padded + LANES);
    b.lookup_v = s.floats(lookup_room(a.on_v, a.tile));
    b.sums_k = s.floats(lookup_room(a.on_k, a.tile));
    b.sums_q = s.floats(column_room(a));
    b.grad_k = s.floats(a.length * d);
    b.grad_v = s.floats(a.length * d);
  }
  return b;
}

static int64_t attention_scratch(const AttentionArgs& a, bool backward) {
  Scratch measure = {nullptr, 0};
  carve(a, backward, measure);
  return measure.used;
}

INLINE void zero(float* x, int64_t count) { __builtin_memset(x, 0, count * sizeof(float)); }

INLINE float* rows_of(const Rows& r, int64_t b, int64_t h) { return r.data + b * r.batch_stride + h * r.head_stride; }

// The processor foresees a walk through memory, but not rows that lie far apart.
INLINE void prefetch_row(const AttentionArgs& a, const Rows& r, int64_t matrix, int64_t i) {
  if (matrix >= a.batch * a.heads) return;
  const float* row = rows_of(r, matrix / a.heads, matrix % a.heads) + i * r.row_stride;
  for (int64_t x = 0; x < a.head_dim; x += 16) __builtin_prefetch(row + x);
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

// dest: panels of kPanel rows, each (d, kPanel); missing rows are zero.
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
      for (int64_t r = 0; r < LANES; ++r) panel[x * kPanel + r] = j + r < count ? from[(j + r) * stride + x] : 0;
  }
}

INLINE const float* table_of(const Encoding& e, const float* tables, int64_t entries, int64_t head) {
  return tables + (e.shared ? 0 : head * entries);
}

// x[j] + the lookups of every part, for every key j: in b.row or b.spare, whichever x is not.
static float* plus_lookups(const Encoding& e, const Buffers& b, int64_t i, const float* lookup, float* x) {
  for (int32_t p = 0; p < e.parts; ++p) {
    float* dest = x == b.row ? b.spare : b.row;
    lookups::add_lookup_row(*e.plan[p], i, lookup + e.offset[p], x, dest);
    x = dest;
  }
  return x;
}

// The same for the encoding on queries, whose lookups (buckets, padded) belong to keys.
static float* plus_query_lookups(const AttentionArgs& a, const Buffers& b, int64_t i, float* x) {
  for (int32_t p = 0; p < a.on_q.parts; ++p) {
    float* dest = x == b.row ? b.spare : b.row;
    lookups::add_lookup_column(*a.on_q.plan[p], i, b.lookup_q + a.on_q.offset[p] * a.padded, a.padded, x, dest);
    x = dest;
  }
  return x;
}

static void bucket_sums_parts(const Encoding& e, int64_t i, const float* x, float* sums, float* scratch) {
  zero(sums, e.padded);
  for (int32_t p = 0; p < e.parts; ++p) lookups::bucket_sums_row(*e.plan[p], i, x, sums + e.offset[p], scratch);
}

// What the whole head needs before its scores can be computed.
static void prepare_scores(const AttentionArgs& a, const Buffers& b, int64_t batch, int64_t head) {
  const float* k = rows_of(a.k, batch, head);
  pack_panels(k, a.k.row_stride, a.length, a.head_dim, b.k_panels);
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

// scores (count, padded) of the queries from `first` on, but for what `finished_scores` adds. q_tile holds the scaled queries.
static void begin_scores(const AttentionArgs& a, const Buffers& b, int64_t head, int64_t first, int64_t count, float* scores) {
  const int64_t d = rounded_up(a.head_dim);
  gemm<false>(count, rounded_up(a.length), a.head_dim, b.q_tile, d, b.k_panels, kPanel, kPanel * a.head_dim, scores, a.padded,
              false);
  if (a.on_k.parts == 0) return;
  const int64_t n = a.on_k.padded;
  const float* table = table_of(a.on_k, a.on_k.table, a.on_k.bias ? n : a.head_dim * n, head);
  if (a.on_k.bias)
    __builtin_memcpy(b.lookup_k, table, n * sizeof(float));
  else
    matmul(count, rounded_up(a.on_k.buckets), a.head_dim, b.q_tile, d, table, n, b.lookup_k, n);
}

// One row of scores with the encodings on queries and keys and the masks, in `row` itself, b.row or b.spare; its padding up to
// a whole register is -inf.
static float* finished_scores(const AttentionArgs& a, const Buffers& b, int64_t batch, int64_t head, int64_t i, int64_t tile_row,
                              float* row) {
  const int64_t length = a.length;
  if (a.mask) {
    const float* mask = a.mask + batch * a.mask_stride[0] + head * a.mask_stride[1] + i * a.mask_stride[2];
    for (int64_t j = 0; j < length; ++j) row[j] += mask[j * a.mask_stride[3]];
  }
  if (a.key_mask) {
    const float* mask = a.key_mask + batch * a.padded;
    for (int64_t j = 0; j < length; j += LANES) store(row + j, load(row + j) + load(mask + j));
  }
  row = plus_query_lookups(a, b, i, row);
  row = plus_lookups(a.on_k, b, i, a.on_k.bias ? b.lookup_k : b.lookup_k + tile_row * a.on_k.padded, row);
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

// dest = x * 1 / (1 - p) where the weight is kept, 0 where it is dropped: a hash of (seed, b, h, i, j), so backward draws
// the same, and the number of threads changes nothing.
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

// Forward for the tiles [begin, end) of all heads, counted head by head.
static void attention_forward(const AttentionArgs& a, int64_t begin, int64_t end, char* memory) {
  Scratch scratch = {memory, 0};
  const Buffers b = carve(a, false, scratch);
  const int64_t d = rounded_up(a.head_dim), tiles = (a.length + a.tile - 1) / a.tile;
  const Rows* const next_rows[] = {&a.q, &a.k, &a.v};
  for (int64_t t = begin; t < end; ++t) {
    const int64_t matrix = t / tiles, batch = matrix / a.heads, head = matrix % a.heads;
    const int64_t first = t % tiles * a.tile, count = a.length - first < a.tile ? a.length - first : a.tile;
    if (t == begin || first == 0) {
      prepare_scores(a, b, batch, head);
      pack_rows(rows_of(a.v, batch, head), a.v.row_stride, a.length, a.head_dim, 1, b.v_rows);
    }
    const float* q = rows_of(a.q, batch, head) + first * a.q.row_stride;
    pack_rows(q, a.q.row_stride, count, a.head_dim, a.scale, b.q_tile);
    float* scores = a.probs ? a.probs + (matrix * a.length + first) * a.padded : b.scores;
    begin_scores(a, b, head, first, count, scores);
    for (int64_t i = 0; i < count; ++i) {
      prefetch_row(a, a.out, matrix, first + i);
      for (const Rows* next : next_rows) prefetch_row(a, *next, matrix + 1, first + i);
      float* row = scores + i * a.padded;
      const float* finished = finished_scores(a, b, batch, head, first + i, i, row);
      float greatest = greatest_of_row(finished, a.length);
      if (greatest == -__builtin_inff()) greatest = 0;  // every key is masked: all weights are zero
      vf total = {};
      for (int64_t j = 0; j < a.length; j += LANES) {
        const vf e = exp_lanes(load(finished + j), greatest);
        total += e;
        store(row + j, e);
      }
      const float sum = sum_of_lanes(total);
      b.factors[i] = sum == 0 ? 0 : 1 / sum;  // waits for the output, which is shorter
      if (a.stats) {
        float* stats = a.stats + 2 * (matrix * a.length + first + i);
        stats[0] = greatest, stats[1] = b.factors[i];
      }
      zero(row + rounded_up(a.length), a.padded - rounded_up(a.length));
    }
    const float* weights = scores;
    if (a.dropout_p > 0) {
      for (int64_t i = 0; i < count; ++i)
        drop_row(a, matrix * a.length + first + i, scores + i * a.padded, b.dropped + i * a.padded);
      weights = b.dropped;
    }
    matmul(count, d, a.length, weights, a.padded, b.v_rows, d, b.out_tile, d);
    if (a.on_v.parts) {
      const int64_t n = a.on_v.padded;
      for (int64_t i = 0; i < count; ++i)
        bucket_sums_parts(a.on_v, first + i, weights + i * a.padded, b.sums_v + i * n, b.bucket_scratch);
      const float* table = table_of(a.on_v, a.on_v.table, a.on_v.buckets * d, head);
      matmul(count, d, a.on_v.buckets, b.sums_v, n, table, d, b.out_tile, d, true);
      for (int64_t i = 0; a.sums && i < count; ++i) {
        float* kept = a.sums + (matrix * a.length + first + i) * n;
        __builtin_memcpy(kept, b.sums_v + i * n, a.on_v.buckets * sizeof(float));
        zero(kept + a.on_v.buckets, n - a.on_v.buckets);
      }
    }
    float* out = rows_of(a.out, batch, head) + first * a.out.row_stride;
    for (int64_t i = 0; i < count; ++i)
      unpack_rows(b.out_tile + i * d, 1, a.head_dim, b.factors[i], out + i * a.out.row_stride, a.out.row_stride);
  }
}

// Backward for the heads [begin, end): with P = softmax(scores) before dropout,
// which is factor * weights, the factor being multiplied into grad_out:
//   grad P      = dropout(grad_out v^T + lookup(grad_out table_v^T))
//   grad scores = P (grad P - sum over keys of P grad P)
static void attention_backward(const AttentionArgs& a, int64_t begin, int64_t end, char* memory) {
  Scratch scratch = {memory, 0};
  const Buffers b = carve(a, true, scratch);
  const int64_t d = rounded_up(a.head_dim);
  const Encoding &on_q = a.on_q, &on_k = a.on_k, &on_v = a.on_v;
  const Rows *const results[] = {&a.grad_q, &a.grad_k, &a.grad_v}, *const next_rows[] = {&a.q, &a.k, &a.v, &a.grad_out};
  for (int64_t matrix = begin; matrix < end; ++matrix) {
    const int64_t batch = matrix / a.heads, head = matrix % a.heads;
    const float *k = rows_of(a.k, batch, head), *v = rows_of(a.v, batch, head);
    if (a.probs == nullptr) prepare_scores(a, b, batch, head);
    pack_panels(v, a.v.row_stride, a.length, a.head_dim, b.v_panels);
    pack_rows(k, a.k.row_stride, a.length, a.head_dim, 1, b.k_rows);
    zero(b.grad_k, a.length * d);
    zero(b.grad_v, a.length * d);
    zero(b.sums_q, column_room(a));
    float* grad_table_k = on_k.parts ? on_k.grad + matrix * on_k.padded * (on_k.bias ? 1 : a.head_dim) : nullptr;
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
        begin_scores(a, b, head, first, count, probs);
        for (int64_t i = 0; i < count; ++i) {
          float* row = probs + i * a.padded;
          const float* finished = finished_scores(a, b, batch, head, first + i, i, row);
          for (int64_t j = 0; j < a.length; j += LANES) store(row + j, exp_lanes(load(finished + j), a.stats[2 * (top + i)]));
        }
      }
      gemm<false>(count, rounded_up(a.length), a.head_dim, b.grad_tile, d, b.v_panels, kPanel, kPanel * a.head_dim,
                  b.grad_scores, a.padded, false);
      if (on_v.parts) {
        const int64_t n = on_v.padded;
        const float* transposed = table_of(on_v, on_v.transposed, a.head_dim * n, head);
        matmul(count, rounded_up(on_v.buckets), a.head_dim, b.grad_tile, d, transposed, n, b.lookup_v, n);
        add_transposed_matmul(on_v.buckets, d, count, a.sums + top * n, n, b.grad_tile, d, grad_table_v, d);
      }
      for (int64_t i = 0; i < count; ++i) {
        for (const Rows* result : results) prefetch_row(a, *result, matrix, first + i);
        for (const Rows* next : next_rows) prefetch_row(a, *next, matrix + 1, first + i);
        float *row = b.grad_scores + i * a.padded, *p = probs + i * a.padded;
        float* grad = plus_lookups(on_v, b, first + i, b.lookup_v + i * on_v.padded, row);
        if (on_v.parts) zero(grad + a.length, rounded_up(a.length) - a.length);  // what lookups wrote there
        if (a.dropout_p > 0) {
          drop_row(a, top + i, grad, grad);
          drop_row(a, top + i, p, b.dropped + i * a.padded);
        }
        if (a.probs)
          for (int64_t j = 0; j < a.length; j += 16) __builtin_prefetch(p + 4 * a.padded + j);
        // The sum below equals grad_out . out, but cancels better where one key has nearly all the weight.
        vf products = {};
        for (int64_t j = 0; j < a.length; j += LANES) products += load(p + j) * load(grad + j);
        const float mean = sum_of_lanes(products) * a.stats[2 * (top + i) + 1];
        for (int64_t j = 0; j < a.length; j += LANES) store(row + j, load(p + j) * (load(grad + j) - mean));
        for (int32_t part = 0; part < on_q.parts; ++part)
          lookups::add_to_column_buckets(*on_q.plan[part], first + i, row, b.sums_q + on_q.offset[part] * a.padded, a.padded);
      }
      add_transposed_matmul(a.length, d, count, a.dropout_p > 0 ? b.dropped : probs, a.padded, b.grad_tile, d, b.grad_v, d);
      add_transposed_matmul(a.length, d, count, b.grad_scores, a.padded, b.q_tile, d, b.grad_k, d);
      matmul(count, d, a.length, b.grad_scores, a.padded, b.k_rows, d, b.out_tile, d);
      if (on_k.parts) {
        const int64_t n = on_k.padded;
        for (int64_t i = 0; i < count; ++i)
          bucket_sums_parts(on_k, first + i, b.grad_scores + i * a.padded, b.sums_k + i * n, b.bucket_scratch);
        if (on_k.bias) {
          for (int64_t i = 0; i < count; ++i)
            for (int64_t x = 0; x < on_k.buckets; ++x) grad_table_k[x] += b.sums_k[i * n + x];
        } else {
          const float* transposed = table_of(on_k, on_k.transposed, on_k.buckets * d, head);
          matmul(count, d, on_k.buckets, b.sums_k, n, transposed, d, b.out_tile, d, true);
          add_transposed_matmul(a.head_dim, rounded_up(on_k.buckets), count, b.q_tile, d, b.sums_k, n, grad_table_k, n);
        }
      }
      unpack_rows(b.out_tile, count, a.head_dim, a.scale, rows_of(a.grad_q, batch, head) + first * a.grad_q.row_stride,
                  a.grad_q.row_stride);
    }

    if (on_q.parts) {
      if (on_q.bias) {
        for (int64_t x = 0; x < on_q.buckets; ++x)
          for (int64_t j = 0; j < a.length; ++j) grad_table_q[x] += b.sums_q[x * a.padded + j];
      } else {
        const float* transposed = table_of(on_q, on_q.transposed, on_q.buckets * d, head);
        add_transposed_matmul(a.length, d, on_q.buckets, b.sums_q, a.padded, transposed, d, b.grad_k, d);
        matmul(on_q.buckets, d, a.length, b.sums_q, a.padded, b.k_rows, d, grad_table_q, d, true);
      }
    }
    unpack_rows(b.grad_k, a.length, a.head_dim, 1, rows_of(a.grad_k, batch, head), a.grad_k.row_stride);
    unpack_rows(b.grad_v, a.length, a.head_dim, 1, rows_of(a.grad_v, batch, head), a.grad_v.row_stride);
  }
}
