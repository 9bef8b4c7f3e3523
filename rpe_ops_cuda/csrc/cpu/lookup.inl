// Lookups and bucket sums of one row: the two operations by which every encoding enters attention.

constexpr int64_t kMaxBuckets = 65536;  // ids are 16 bits wide

// Keys [first, first + count) and the segments that hold them.
struct KeyRange {
  int64_t first, count, first_segment, last_segment;
};

static KeyRange keys_between(const PlanView& plan, int64_t first, int64_t count) {
  KeyRange range = {first, count, 0, 0};
  if (!plan.segmented) return range;
  while (plan.seg_start[range.first_segment + 1] <= first) ++range.first_segment;
  range.last_segment = range.first_segment;
  while (range.last_segment < plan.num_segments && plan.seg_start[range.last_segment] < first + count) ++range.last_segment;
  return range;
}

INLINE KeyRange all_keys(const PlanView& plan) { return {0, plan.cols, 0, plan.num_segments}; }

// dest[j] = table[id(i, first + j)] for every key of the range. Writes up to LANES - 1 entries past the last key and, unless
// the range begins with a segment, before the first one; reads LANES - 1 past the last bucket if there are fewer than LANES.
INLINE void lookup_row(const PlanView& plan, const KeyRange& range, int64_t i, const uint32_t* table, uint32_t* dest) {
  if (!plan.segmented) {
    const uint16_t* ids = plan.ids + i * plan.cols + range.first;
    for (int64_t j = 0; j < range.count; ++j) dest[j] = table[ids[j]];
    return;
  }
  const uint16_t* base = plan.base + i * plan.num_segments;
  const uint32_t* perm = plan.perm + i * plan.num_segments * (LANES / 8);
  // A segment shorter than a register spills over, and the next one overwrites what it spilt.
  for (int64_t s = range.first_segment; s < range.last_segment; ++s)
    store(dest + (plan.seg_start[s] - range.first),
          __builtin_shuffle(load(table + base[s]), offsets(perm + s * (LANES / 8))));
}

INLINE void lookup_row(const PlanView& plan, const KeyRange& range, int64_t i, const float* table, float* dest) {
  lookup_row(plan, range, i, reinterpret_cast<const uint32_t*>(table), reinterpret_cast<uint32_t*>(dest));
}

// sums[n] = sum of x[j] over the keys with id(i, j) == n, for n < buckets. Writes up to 2 * LANES - 1 entries past the last
// bucket and reads LANES - 1 past the last key. `scratch` has bucket_scratch(plan, buckets) entries.
static void bucket_sums_by_id(const uint16_t* ids, int64_t cols, const float* x, float* sums, int64_t buckets,
                              float* scratch) {
  // Neighbours often share a bucket, and an add must wait for the one before it: neighbours add to different copies.
  constexpr int kCopies = 8;
  const int64_t stride = buckets + LANES;
  for (int64_t n = 0; n < kCopies * stride; ++n) scratch[n] = 0;
  int64_t j = 0;
  for (; j + kCopies <= cols; j += kCopies)
    for (int copy = 0; copy < kCopies; ++copy) scratch[copy * stride + ids[j + copy]] += x[j + copy];
  for (; j < cols; ++j) scratch[ids[j]] += x[j];
  for (int64_t n = 0; n < buckets; n += LANES) {
    vf total = load(scratch + n);
    for (int copy = 1; copy < kCopies; ++copy) total += load(scratch + copy * stride + n);
    store(sums + n, total);
  }
}

// sums + slot_base: the columns of SLOTS slots (rows of `columns`) into their buckets, PARTS registers of column parts each.
template <int SLOTS, int PARTS, bool ADD>
INLINE void columns_into_buckets(const PlanView& plan, int64_t query_col, const int32_t* slots, const float* columns,
                                 int64_t stride, float* sums) {
  vf total[SLOTS][PARTS];
  for (int s = 0; s < SLOTS; ++s)
    for (int p = 0; p < PARTS; ++p) total[s][p] = ADD ? load(sums + plan.slot_base[slots[s]] + p * LANES) : vf{};
  const uint32_t* mask = plan.col_mask + query_col * plan.width * plan.col_padded;
  for (int64_t c = 0; c < plan.width; ++c, mask += plan.col_padded)
    for (int p = 0; p < PARTS; ++p) {
      const vu here = load(mask + p * LANES);
      for (int s = 0; s < SLOTS; ++s)
        // A mask rather than a product with 0 or 1: an infinite value stays in its own bucket.
        total[s][p] += reinterpret_cast<vf>(reinterpret_cast<vu>(splat(columns[s * stride + c])) & here);
    }
  for (int s = 0; s < SLOTS; ++s)
    for (int p = 0; p < PARTS; ++p) store(sums + plan.slot_base[slots[s]] + p * LANES, total[s][p]);
}

template <int PARTS, bool ADD>
static void slots_into_buckets(const PlanView& plan, int64_t query_col, const int32_t* slots, int64_t count,
                               const float* columns, int64_t stride, float* sums) {
  // When adding, two slots that touch must not be in flight together.
  constexpr int kTogether = ADD ? 1 : 4 / PARTS;
  int64_t s = 0;
  for (; s + kTogether <= count; s += kTogether)
    columns_into_buckets<kTogether, PARTS, ADD>(plan, query_col, slots + s, columns + s * stride, stride, sums);
  for (; s < count; ++s)
    columns_into_buckets<1, PARTS, ADD>(plan, query_col, slots + s, columns + s * stride, stride, sums);
}

INLINE int64_t column_stride(const PlanView& plan) { return rounded_up(plan.width) + LANES; }

static void bucket_sums_row(const PlanView& plan, int64_t i, const float* x, float* sums, int64_t buckets, float* scratch) {
  if (!plan.separable) return bucket_sums_by_id(plan.ids + i * plan.cols, plan.cols, x, sums, buckets, scratch);
  for (int64_t n = 0; n < buckets; n += LANES) store(sums + n, vf{});
  float leading = 0;
  const int64_t leading_keys = i < plan.skip ? plan.cols : plan.skip;
  for (int64_t j = 0; j < leading_keys; ++j) leading += x[j];
  if (i >= plan.skip) {
    const int64_t width = plan.width, query_row = (i - plan.skip) / width, query_col = (i - plan.skip) % width;
    const int32_t* first = plan.slot_first + query_row * (plan.num_slots + 1);
    const int32_t* key_rows = plan.slot_rows + query_row * plan.height;
    const float* grid = x + plan.skip;
    const int64_t stride = column_stride(plan);
    int32_t* slots = reinterpret_cast<int32_t*>(scratch + plan.num_slots * stride);
    int64_t count = 0;
    for (int32_t slot = 0; slot < plan.num_slots; ++slot) {
      if (first[slot] == first[slot + 1]) continue;
      float* columns = scratch + count * stride;
      slots[count++] = slot;
      for (int64_t c = 0; c < width; c += LANES) {
        vf total = load(grid + key_rows[first[slot]] * width + c);
        for (int32_t r = first[slot] + 1; r < first[slot + 1]; ++r) total += load(grid + key_rows[r] * width + c);
        store(columns + c, total);
      }
    }
    if (plan.col_mask == nullptr) {
      const int32_t* part = plan.col_part + query_col * width;
      for (int64_t s = 0; s < count; ++s)
        for (int64_t c = 0; c < width; ++c) sums[plan.slot_base[slots[s]] + part[c]] += scratch[s * stride + c];
    } else if (plan.col_padded == LANES) {
      slots_into_buckets<1, false>(plan, query_col, slots, count, scratch, stride, sums);
    } else {
      slots_into_buckets<2, false>(plan, query_col, slots, count, scratch, stride, sums);
    }
  }
  if (plan.skip > 0) sums[plan.skip_id] += leading;
}

// As bucket_sums_row, but for the keys [first, first + count) alone, and added to `sums`. x[j] belongs to key j, and the
// grid rows that the keys touch are whole: what lies outside the keys is zero.
static void add_bucket_sums(const PlanView& plan, int64_t i, const float* x, int64_t first, int64_t count, float* sums) {
  if (!plan.separable || plan.col_mask == nullptr || i < plan.skip) {
    const uint16_t* ids = plan.ids + i * plan.cols;
    for (int64_t j = first; j < first + count; ++j) sums[ids[j]] += x[j];
    return;
  }
  const int64_t width = plan.width, query_row = (i - plan.skip) / width, query_col = (i - plan.skip) % width;
  int64_t begin = first;
  for (; begin < plan.skip && begin < first + count; ++begin) sums[plan.skip_id] += x[begin];
  if (begin == first + count) return;
  const int64_t last_row = (first + count - 1 - plan.skip) / width;
  for (int64_t row = (begin - plan.skip) / width; row <= last_row; ++row) {
    const int32_t slot = plan.slot_of_row[query_row * plan.height + row];
    const float* columns = x + plan.skip + row * width;
    if (plan.col_padded == LANES)
      slots_into_buckets<1, true>(plan, query_col, &slot, 1, columns, 0, sums);
    else
      slots_into_buckets<2, true>(plan, query_col, &slot, 1, columns, 0, sums);
  }
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
    // What a row writes past its end is overwritten by the next rows, but for the last rows of this thread.
    const bool room = (end - row - 1) * plan.cols >= LANES;
    uint32_t* dest = out + row * plan.cols;
    lookup_row(plan, all_keys(plan), row % plan.rows, table, room ? dest : last);
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
      const uint32_t* perm = plan.perm + i * n * (LANES / 8);
      for (int64_t s = 0; s < n; ++s) {
        const vu looked_up = __builtin_shuffle(load(table + base[s]), offsets(perm + s * (LANES / 8)));
        *reinterpret_cast<vh_unaligned*>(dest + plan.seg_start[s]) = __builtin_convertvector(looked_up, vh);
      }
    }
    if (!room) __builtin_memcpy(out + row * plan.cols, last, plan.cols * sizeof(uint16_t));
  }
  delete[] table;
  delete[] last;
}

static int64_t bucket_scratch(const PlanView& plan, int64_t buckets) {
  const int64_t copies = 8 * (buckets + 2 * LANES), slots = plan.separable ? plan.num_slots * (column_stride(plan) + 1) : 0;
  return copies > slots ? copies : slots;
}

static void bucket_sums(const PlanView& plan, const float* grad, float* out, int64_t begin, int64_t end, int64_t buckets) {
  float* scratch = new float[bucket_scratch(plan, buckets)];
  float* sums = new float[buckets + 2 * LANES];
  float* x = new float[plan.cols + LANES]();
  for (int64_t row = begin; row < end; ++row) {
    // A copy is read in the order of the memory, which is what the processor fetches ahead; the sums jump about in it.
    __builtin_memcpy(x, grad + row * plan.cols, plan.cols * sizeof(float));
    bucket_sums_row(plan, row % plan.rows, x, sums, buckets, scratch);
    __builtin_memcpy(out + row * buckets, sums, buckets * sizeof(float));
  }
  delete[] x;
  delete[] sums;
  delete[] scratch;
}
