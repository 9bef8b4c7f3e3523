// Lookups and bucket sums of one row: the two operations by which every encoding enters attention.

constexpr int64_t kMaxBuckets = 65536;  // ids are 16 bits wide

// dest[j] = table[id(i, j)] for every key j. Writes up to LANES - 1 entries past the last key, and reads as many past the
// last bucket if there are fewer than LANES of them.
INLINE void lookup_row(const PlanView& plan, int64_t i, const uint32_t* table, uint32_t* dest) {
  if (!plan.segmented) {
    const uint16_t* ids = plan.ids + i * plan.cols;
    for (int64_t j = 0; j < plan.cols; ++j) dest[j] = table[ids[j]];
    return;
  }
  const int64_t n = plan.num_segments;
  const uint16_t* base = plan.base + i * n;
  const uint32_t* perm = plan.perm + i * n * (LANES / 8);
  // A segment shorter than a register spills over, and the next one overwrites what it spilt.
  for (int64_t s = 0; s < n; ++s)
    store(dest + plan.seg_start[s], __builtin_shuffle(load(table + base[s]), offsets(perm + s * (LANES / 8))));
}

INLINE void lookup_row(const PlanView& plan, int64_t i, const float* table, float* dest) {
  lookup_row(plan, i, reinterpret_cast<const uint32_t*>(table), reinterpret_cast<uint32_t*>(dest));
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

// The column sums of one slot into its buckets: PARTS registers of column parts.
template <int PARTS>
INLINE void columns_into_buckets(const PlanView& plan, int64_t query_col, const float* columns, float* sums) {
  vf total[PARTS] = {};
  const uint32_t* mask = plan.col_mask + query_col * plan.width * plan.col_padded;
  for (int64_t c = 0; c < plan.width; ++c)
    for (int p = 0; p < PARTS; ++p)
      // A mask rather than a product with 0 or 1: an infinite value stays in its own bucket.
      total[p] += reinterpret_cast<vf>(reinterpret_cast<vu>(splat(columns[c])) & load(mask + c * plan.col_padded + p * LANES));
  for (int p = 0; p < PARTS; ++p) store(sums + p * LANES, total[p]);
}

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
    for (int32_t slot = 0; slot < plan.num_slots; ++slot) {
      if (first[slot] == first[slot + 1]) continue;
      for (int64_t c = 0; c < width; c += LANES) {
        vf total = load(grid + key_rows[first[slot]] * width + c);
        for (int32_t r = first[slot] + 1; r < first[slot + 1]; ++r) total += load(grid + key_rows[r] * width + c);
        store(scratch + c, total);
      }
      float* into = sums + plan.slot_base[slot];
      if (plan.col_mask == nullptr) {
        const int32_t* part = plan.col_part + query_col * width;
        for (int64_t c = 0; c < width; ++c) into[part[c]] += scratch[c];
      } else if (plan.col_padded == LANES) {
        columns_into_buckets<1>(plan, query_col, scratch, into);
      } else {
        columns_into_buckets<2>(plan, query_col, scratch, into);
      }
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
    // What a row writes past its end is overwritten by the next rows, but for the last rows of this thread.
    const bool room = (end - row - 1) * plan.cols >= LANES;
    uint32_t* dest = out + row * plan.cols;
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
  const int64_t copies = 8 * (buckets + 2 * LANES), width = plan.width + 2 * LANES;
  return copies > width ? copies : width;
}

static void bucket_sums(const PlanView& plan, const float* grad, float* out, int64_t begin, int64_t end, int64_t buckets) {
  float* scratch = new float[bucket_scratch(plan, buckets)];
  float* sums = new float[buckets + 2 * LANES];
  float* last = new float[plan.cols + LANES]();
  for (int64_t row = begin; row < end; ++row) {
    const float* x = grad + row * plan.cols;
    if ((end - row - 1) * plan.cols < LANES) {  // reading past the last row might leave the tensor
      __builtin_memcpy(last, x, plan.cols * sizeof(float));
      x = last;
    }
    bucket_sums_row(plan, row % plan.rows, x, sums, buckets, scratch);
    __builtin_memcpy(out + row * buckets, sums, buckets * sizeof(float));
  }
  delete[] last;
  delete[] sums;
  delete[] scratch;
}
