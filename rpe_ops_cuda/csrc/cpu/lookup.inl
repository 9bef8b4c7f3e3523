// SPDX-License-Identifier: Apache-2.0
// Lookups and bucket sums of one row: the two operations that every encoding is made of.

// For each key of a segment, its lane in the loaded register.
INLINE vi offsets(uint32_t perm) {
  const vu shift = {0, 4, 8, 12, 16, 20, 24, 28};
  const vu word = {perm, perm, perm, perm, perm, perm, perm, perm};
  return reinterpret_cast<vi>(word >> shift);  // the permutation uses the lowest 3 bits only
}

// dest[j] = table[id(i, j)] for every key j. Writes up to LANES - 1 entries past the last key; with fewer than LANES buckets,
// reads up to LANES - 1 entries past the last one.
INLINE void lookup_row(const PlanView& plan, int64_t i, const uint32_t* table, uint32_t* dest) {
  if (!plan.segmented) {
    const uint16_t* ids = plan.ids + i * plan.cols;
    for (int64_t j = 0; j < plan.cols; ++j) dest[j] = table[ids[j]];
    return;
  }
  const int64_t segments = plan.num_segments;
  const int32_t* start = plan.seg_start;
  const uint16_t* base = plan.base + i * segments;
  const uint32_t* perm = plan.perm + i * segments;
  // A segment shorter than a register writes past its end, and the next one overwrites that.
  for (int64_t s = 0; s < segments; ++s)
    store(dest + start[s], __builtin_shuffle(load(table + base[s]), offsets(perm[s])));
}

// dest[j] = x[j] + table[id(i, j)]. As above; also reads LANES - 1 entries past the last key of x, which is not dest.
INLINE void add_lookup_row(const PlanView& plan, int64_t i, const float* table, const float* x, float* dest) {
  if (!plan.segmented) {
    const uint16_t* ids = plan.ids + i * plan.cols;
    for (int64_t j = 0; j < plan.cols; ++j) dest[j] = x[j] + table[ids[j]];
    return;
  }
  const int64_t segments = plan.num_segments;
  const int32_t* start = plan.seg_start;
  const uint16_t* base = plan.base + i * segments;
  const uint32_t* perm = plan.perm + i * segments;
  for (int64_t s = 0; s < segments; ++s)
    store(dest + start[s], load(x + start[s]) + __builtin_shuffle(load(table + base[s]), offsets(perm[s])));
}

// dest[j] = x[j] + table[id(j, i)][j] for every key j, with a plan by columns; the rows of the table are `stride` apart. Reads
// and writes up to LANES - 1 entries past the last key; x is not dest.
INLINE void add_lookup_column(const PlanView& plan, int64_t i, const float* table, int64_t stride, const float* x, float* dest) {
  const uint16_t* id = plan.piece_id + plan.piece_first[i];
  const uint8_t* keys = plan.piece_keys + plan.piece_first[i];
  const int64_t pieces = plan.piece_first[i + 1] - plan.piece_first[i];
  for (int64_t p = 0, j = 0; p < pieces; j += keys[p++])
    store(dest + j, load(x + j) + load(table + id[p] * stride + j));  // writes past its end, as above
}

// sums[id(j, i)][j] += x[j] for every key j. Reads up to LANES - 1 entries past the last key.
INLINE void add_to_column_buckets(const PlanView& plan, int64_t i, const float* x, float* sums, int64_t stride) {
  static const uint32_t kFirst[2 * LANES] = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
  const uint16_t* id = plan.piece_id + plan.piece_first[i];
  const uint8_t* keys = plan.piece_keys + plan.piece_first[i];
  const int64_t pieces = plan.piece_first[i + 1] - plan.piece_first[i];
  for (int64_t p = 0, j = 0; p < pieces; j += keys[p++]) {
    float* into = sums + id[p] * stride + j;
    const vu mine = reinterpret_cast<vu>(load(x + j)) & load(kFirst + LANES - keys[p]);
    store(into, load(into) + reinterpret_cast<vf>(mine));
  }
}

// How many of the `left` queries from i on to look up together: those of one grid row, in equal shares.
INLINE int64_t column_group(const PlanView& plan, int64_t i, int64_t left) {
  constexpr int64_t kMost = 8;
  if (!plan.separable || i < plan.skip) return 1;
  const int64_t in_row = plan.width - (i - plan.skip) % plan.width, shares = (in_row + kMost - 1) / kMost;
  const int64_t share = (in_row + shares - 1) / shares;
  return share < left ? share : left;
}

constexpr int kKeyRows = WIDEST / LANES;  // AVX-512 has 32 registers, twice as many as AVX2

// ROWS key rows of one register of key columns, for MOST queries: adds each entry of the table to the row of x of every query
// with that column part or, if BACK, the other way round. `base`, `table` and `x` begin at the first of the key rows. A row
// narrower than a register writes into the next one, which is stored after it.
template <int ROWS, int MOST, bool BACK>
INLINE void key_rows(const int32_t* base, int64_t width, const int32_t* part_of, int64_t parts_stride, int32_t low, int32_t high,
                     float* table, int64_t stride, float* x, int64_t x_stride) {
  vf rows[ROWS][MOST];
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < MOST; ++q) rows[r][q] = load(x + q * x_stride + r * width);
  vi part = low - vi{};
  for (int32_t p = low; p <= high; ++p, part += 1) {
    vf here[ROWS];
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) here[r] = load(table + (base[r] + p) * stride + r * width);
#pragma GCC unroll 8
    for (int q = 0; q < MOST; ++q) {
      const vi mine = load(part_of + q * parts_stride) == part;
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r)
        if (BACK)
          here[r] = mine ? here[r] + rows[r][q] : here[r];
        else
          rows[r][q] = mine ? rows[r][q] + here[r] : rows[r][q];
    }
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r)
      if (BACK) store(table + (base[r] + p) * stride + r * width, here[r]);
  }
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < MOST; ++q)
      if (!BACK) store(x + q * x_stride + r * width, rows[r][q]);
}

// For `count` (at most MOST) queries from i on, of one grid row, and their rows of x, `x_stride` apart:
//   x[j] += table[id(j, i)][j], or, if BACK, table[id(j, i)][j] += x[j].
template <int MOST, bool BACK>
INLINE void grouped_columns(int64_t count, const PlanView& plan, int64_t i, float* table, int64_t stride, float* x, int64_t x_stride) {
  if constexpr (MOST > 1)
    if (count < MOST) return grouped_columns<MOST - 1, BACK>(count, plan, i, table, stride, x, x_stride);
  const int64_t chunks = rounded_up(plan.width) / LANES, query_col = (i - plan.skip) % plan.width;
  const int32_t* base = plan.row_base + (i - plan.skip) / plan.width * plan.height;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int32_t* part_of = plan.part_of + (query_col * chunks + chunk) * LANES;
    const int32_t* range = plan.part_range + (query_col * chunks + chunk) * 2;
    int32_t low = range[0], high = range[1];
    for (int q = 1; q < MOST; ++q) {
      range += 2 * chunks;
      low = range[0] < low ? range[0] : low, high = range[1] > high ? range[1] : high;
    }
    int64_t row = 0, j = plan.skip + chunk * LANES;
    for (; row + kKeyRows <= plan.height; row += kKeyRows, j += kKeyRows * plan.width)
      key_rows<kKeyRows, MOST, BACK>(base + row, plan.width, part_of, chunks * LANES, low, high, table + j, stride, x + j, x_stride);
    for (; row < plan.height; ++row, j += plan.width)
      key_rows<1, MOST, BACK>(base + row, plan.width, part_of, chunks * LANES, low, high, table + j, stride, x + j, x_stride);
  }
  for (int q = 0; q < MOST; ++q)
    for (int64_t j = 0; j < plan.skip; ++j) {
      float& entry = table[plan.skip_id * stride + j];
      BACK ? entry += x[q * x_stride + j] : x[q * x_stride + j] += entry;
    }
}

// The same for any queries of a separable plan. Up to LANES - 1 entries past the last key are read and written back unchanged.
template <bool BACK>
static void columns(const PlanView& plan, int64_t i, int64_t count, float* table, int64_t stride, float* x, int64_t x_stride) {
  for (int64_t here; count > 0; i += here, x += here * x_stride, count -= here) {
    here = column_group(plan, i, count);
    if (i >= plan.skip) {
      grouped_columns<8, BACK>(here, plan, i, table, stride, x, x_stride);
    } else {
      float* row = table + plan.skip_id * stride;
      for (int64_t j = 0; j < plan.cols; ++j) BACK ? row[j] += x[j] : x[j] += row[j];
    }
  }
}

constexpr int kCopies = 4;  // of the sums: neighbours often share a bucket, and an add waits for the last one to the same place

// sums[n] = sum of x[j] over the keys with id(i, j) == n, for the ids of the plan; sums must be zero. Writes up to 2 * LANES - 1
// zeros past the last id, and reads up to LANES - 1 entries past the last key. `scratch` has bucket_scratch(plan) entries.
static void bucket_sums_by_id(const PlanView& plan, int64_t i, const float* x, float* sums, float* scratch) {
  const uint16_t* ids = plan.ids + i * plan.cols;
  const int64_t cols = plan.cols, lowest = plan.min_id, used = plan.max_id + 1 - lowest, stride = used + LANES;
  for (int64_t n = 0; n < kCopies * stride; ++n) scratch[n] = 0;
  float* copies = scratch - lowest;
  int64_t j = 0;
  for (; j + kCopies <= cols; j += kCopies)
    for (int copy = 0; copy < kCopies; ++copy) copies[copy * stride + ids[j + copy]] += x[j + copy];
  for (; j < cols; ++j) copies[j % kCopies * stride + ids[j]] += x[j];
  for (int64_t n = 0; n < used; n += LANES) {
    vf total = load(scratch + n);
    for (int copy = 1; copy < kCopies; ++copy) total += load(scratch + copy * stride + n);
    store(sums + lowest + n, total);
  }
}

#ifdef HAS_AVX2
constexpr bool kTransposes = true;
#else
constexpr bool kTransposes = false;  // value by value, which takes longer than it saves
#endif

// The same for one query in LANES heads at once, whose ids are the same. Each head gets the same bits as alone. Writes all
// `buckets` sums. `scratch` has kCopies * LANES entries for each id from the least to the greatest.
static void bucket_sums_of_heads(const PlanView& plan, int64_t i, const float* x, int64_t x_stride, float* sums, int64_t sums_stride,
                                 int64_t buckets, float* scratch) {
  const uint16_t* ids = plan.ids + i * plan.cols;
  const int64_t stride = (plan.max_id + 1 - plan.min_id) * LANES;
  __builtin_memset(scratch, 0, kCopies * stride * sizeof(float));
  float* copies = scratch - plan.min_id * LANES;
  const auto add_key = [&](int64_t copy, int64_t id, vf values) {
    float* into = copies + copy * stride + id * LANES;
    store(into, load(into) + values);
  };
  vf block[LANES];
  int64_t j = 0;
  for (; j + LANES <= plan.cols; j += LANES) {
    for (int r = 0; r < LANES; ++r) block[r] = load(x + r * x_stride + j);
    transpose(block);
#pragma GCC unroll 8
    for (int key = 0; key < LANES; ++key) add_key(key % kCopies, ids[j + key], block[key]);
  }
  for (; j < plan.cols; ++j) {
    for (int r = 0; r < LANES; ++r) block[0][r] = x[r * x_stride + j];
    add_key(j % kCopies, ids[j], block[0]);
  }
  for (int64_t n = 0; n < buckets; n += LANES) {
    for (int64_t b = 0; b < LANES; ++b) {
      block[b] = vf{};
      if (n + b < plan.min_id || n + b > plan.max_id) continue;
      for (int copy = 0; copy < kCopies; ++copy) block[b] += load(copies + copy * stride + (n + b) * LANES);
    }
    transpose(block);
    for (int r = 0; r < LANES; ++r) {
      float* into = sums + r * sums_stride + n;
      if (n + LANES <= buckets)
        store(into, block[r]);
      else
        for (int64_t b = 0; n + b < buckets; ++b) into[b] = block[r][b];
    }
  }
}

// Sums the grid rows of each slot into a row of `columns`, for `registers` (at most MOST) registers of grid columns.
template <int MOST>
INLINE void rows_into_slots(int64_t registers, const PlanView& plan, int64_t query_row, const float* grid, float* columns) {
  if constexpr (MOST > 1)
    if (registers < MOST) return rows_into_slots<MOST - 1>(registers, plan, query_row, grid, columns);
  const int32_t* first = plan.slot_first + query_row * (plan.num_slots + 1);
  const int32_t* key_rows = plan.slot_rows + query_row * plan.height;
  for (int64_t slot = 0; slot < plan.num_slots; ++slot) {
    vf total[MOST] = {};
    for (int32_t r = first[slot]; r < first[slot + 1]; ++r)
      for (int n = 0; n < MOST; ++n) total[n] += load(grid + key_rows[r] * plan.width + n * LANES);
    for (int n = 0; n < MOST; ++n) store(columns + slot * rounded_up(plan.width) + n * LANES, total[n]);
  }
}

// Adds the columns of `slots` (at most MOST) slots to their buckets, sums + slot_base, which take PARTS registers each.
// `not_finite` becomes NaN where a sum is not finite.
template <int MOST, int PARTS>
INLINE void columns_into_buckets(int64_t slots, const int32_t* slot_base, int64_t width, const float* one_hot,
                                 const float* columns, float* sums, vf& not_finite) {
  if constexpr (MOST > 1)
    if (slots < MOST)
      return columns_into_buckets<MOST - 1, PARTS>(slots, slot_base, width, one_hot, columns, sums, not_finite);
  const int64_t stride = rounded_up(width);
  vf total[MOST][PARTS] = {};
  for (int64_t c = 0; c < width; ++c) {
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; ++p) {
      const vf here = load(one_hot + (c * PARTS + p) * LANES);
#pragma GCC unroll 12
      for (int s = 0; s < MOST; ++s) total[s][p] += splat(columns[s * stride + c]) * here;
    }
  }
#pragma GCC unroll 12
  for (int s = 0; s < MOST; ++s)
    for (int p = 0; p < PARTS; ++p) {
      store(sums + slot_base[s] + p * LANES, total[s][p]);  // zeros past its last bucket: the next slot overwrites them
      not_finite += total[s][p] * 0.0f;
    }
}

// False if a sum is not finite.
template <int PARTS>
static bool slots_into_buckets(const PlanView& plan, int64_t query_col, const float* columns, float* sums) {
  constexpr int kMost = 12 / PARTS;  // as many as the registers of AVX2 hold
  const float* one_hot = plan.one_hot + query_col * plan.width * plan.col_padded;
  vf not_finite = {};
  for (int64_t slot = 0, count; slot < plan.num_slots; slot += count) {
    const int64_t left = plan.num_slots - slot;
    count = left <= kMost ? left : left < 2 * kMost ? (left + 1) / 2 : kMost;
    columns_into_buckets<kMost, PARTS>(count, plan.slot_base + slot, plan.width, one_hot, columns + slot * rounded_up(plan.width),
                                       sums, not_finite);
  }
  return sum_of_lanes(not_finite) == 0;
}

static void bucket_sums_row(const PlanView& plan, int64_t i, const float* x, float* sums, float* scratch) {
  if (!plan.separable) return bucket_sums_by_id(plan, i, x, sums, scratch);
  float leading = 0;
  const int64_t leading_keys = i < plan.skip ? plan.cols : plan.skip;
  for (int64_t j = 0; j < leading_keys; ++j) leading += x[j];
  if (i >= plan.skip) {
    const int64_t width = plan.width, query_row = (i - plan.skip) / width, query_col = (i - plan.skip) % width;
    const float* grid = x + plan.skip;
    constexpr int64_t kMost = 6 * LANES;
    for (int64_t c = 0; c < width; c += kMost)
      rows_into_slots<6>(rounded_up(width - c < kMost ? width - c : kMost) / LANES, plan, query_row, grid + c, scratch + c);
    if (plan.one_hot == nullptr) {
      const int32_t* part = plan.col_part + query_col * width;
      for (int64_t s = 0; s < plan.num_slots; ++s)
        for (int64_t c = 0; c < width; ++c) sums[plan.slot_base[s] + part[c]] += scratch[s * rounded_up(width) + c];
    } else {
      const bool finite = plan.col_padded == LANES ? slots_into_buckets<1>(plan, query_col, scratch, sums)
                                                   : slots_into_buckets<2>(plan, query_col, scratch, sums);
      // An infinite value belongs in one bucket, but the one-hot product makes NaN of it in the others.
      if (!finite) return bucket_sums_by_id(plan, i, x, sums, scratch);
    }
  }
  if (plan.skip > 0) sums[plan.skip_id] += leading;
}

static void lookup_32(const PlanView& plan, const uint32_t* in, uint32_t* out, int64_t begin, int64_t end, int64_t buckets) {
  uint32_t* last = new uint32_t[plan.cols + LANES];
  uint32_t few[LANES] = {};
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t* table = in + row * buckets;
    if (buckets < LANES) {
      for (int64_t n = 0; n < buckets; ++n) few[n] = table[n];
      table = few;
    }
    // The next rows overwrite what a row writes past its end; the last rows of this thread have none.
    const bool room = (end - row - 1) * plan.cols >= LANES;
    uint32_t* dest = out + row * plan.cols;
    // Stores wait for lines that are not in the first-level cache. Long rows would not stay there.
    for (int64_t j = 0; j < plan.cols && plan.cols < 512; j += 16) __builtin_prefetch(dest + 2 * plan.cols + j, 1);
    lookup_row(plan, row % plan.rows, table, room ? dest : last);
    if (!room) __builtin_memcpy(dest, last, plan.cols * sizeof(uint32_t));
  }
  delete[] last;
}

static void lookup_16(const PlanView& plan, const uint16_t* in, uint16_t* out, int64_t begin, int64_t end, int64_t buckets) {
  typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
  typedef vh vh_unaligned __attribute__((aligned(2), may_alias));
  uint16_t* last = new uint16_t[plan.cols + LANES];
  uint32_t* table = new uint32_t[buckets + LANES]();
  const int64_t n = plan.num_segments;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % plan.rows;
    const bool room = (end - row - 1) * plan.cols >= LANES;
    uint16_t* dest = room ? out + row * plan.cols : last;
    if (!plan.segmented) {
      const uint16_t* ids = plan.ids + i * plan.cols;
      for (int64_t j = 0; j < plan.cols; ++j) dest[j] = in[row * buckets + ids[j]];
    } else {
      for (int64_t b = 0; b < buckets; ++b) table[b] = in[row * buckets + b];
      const uint16_t* base = plan.base + i * n;
      const uint32_t* perm = plan.perm + i * n;
      for (int64_t s = 0; s < n; ++s) {
        const vu looked_up = __builtin_shuffle(load(table + base[s]), offsets(perm[s]));
        *reinterpret_cast<vh_unaligned*>(dest + plan.seg_start[s]) = __builtin_convertvector(looked_up, vh);
      }
    }
    if (!room) __builtin_memcpy(out + row * plan.cols, last, plan.cols * sizeof(uint16_t));
  }
  delete[] table;
  delete[] last;
}

static int64_t bucket_scratch(const PlanView& plan) {
  const int64_t copies = kCopies * (plan.max_id + 1 - plan.min_id + 2 * LANES);
  const int64_t slots = plan.separable ? plan.num_slots * rounded_up(plan.width) : 0;
  return copies > slots ? copies : slots;
}

static void bucket_sums(const PlanView& plan, const float* grad, float* out, int64_t begin, int64_t end, int64_t buckets) {
  float* scratch = new float[bucket_scratch(plan)];
  float* sums = new float[buckets + 2 * LANES];
  float* heads = new float[kCopies * LANES * (plan.max_id + 1 - plan.min_id)];
  float* last = new float[plan.cols + LANES]();
  for (int64_t row = begin; row < end; ++row) {
    if (kTransposes && !plan.separable && row + LANES * plan.rows <= end) {
      for (int64_t last_query = row + plan.rows; row < last_query; ++row)
        bucket_sums_of_heads(plan, row % plan.rows, grad + row * plan.cols, plan.rows * plan.cols, out + row * buckets,
                             plan.rows * buckets, buckets, heads);
      row += (LANES - 1) * plan.rows - 1;
      continue;
    }
    // The sums do not read a row in order, so the hardware does not prefetch it. Long rows would not stay in that cache.
    const float* later = grad + (row + 4 < end ? row + 4 : row) * plan.cols;
    for (int64_t j = 0; j < plan.cols; j += 16)
      plan.cols < 512 ? __builtin_prefetch(later + j) : __builtin_prefetch(later + j, 0, 2);
    const float* x = grad + row * plan.cols;
    const bool room = (end - row - 1) * plan.cols >= LANES;  // to read past its end
    if (!room) x = static_cast<float*>(__builtin_memcpy(last, x, plan.cols * sizeof(float)));
    for (int64_t n = 0; n < buckets; n += LANES) store(sums + n, vf{});
    bucket_sums_row(plan, row % plan.rows, x, sums, scratch);
    __builtin_memcpy(out + row * buckets, sums, buckets * sizeof(float));
  }
  delete[] last;
  delete[] heads;
  delete[] sums;
  delete[] scratch;
}
