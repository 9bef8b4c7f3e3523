// SPDX-License-Identifier: Apache-2.0
// C (+)= A B for matrices that lie in the first- and second-level caches.

// Rows of C held in registers: with two registers of columns they fill the register file (16 of AVX2, 32 of AVX-512).
#if LANES == 8
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 12;
#endif
constexpr int kPanel = 2 * LANES;  // columns of C held in registers
constexpr int64_t kSmall = 4096;   // entries of the largest B that stays in the first-level cache whole
constexpr int64_t kDepth = 256;    // rows of a panel of B that stay in the first-level cache

// A is (M, K) with row stride lda, or its transpose if TRANSPOSED. B is (K, N): panels of kPanel columns, `panel_stride`
// apart, with row stride ldb.
template <int ROWS, int REGISTERS, bool TRANSPOSED>
INLINE void gemm_block(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                       bool accumulate) {
  vf total[ROWS][REGISTERS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < REGISTERS; ++n) total[r][n] = accumulate ? load(c + r * ldc + n * LANES) : vf{};
  for (int64_t k = 0; k < depth; ++k) {
    vf columns[REGISTERS];
#pragma GCC unroll 2
    for (int n = 0; n < REGISTERS; ++n) columns[n] = load(b + k * ldb + n * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vf x = splat(TRANSPOSED ? a[k * lda + r] : a[r * lda + k]);
#pragma GCC unroll 2
      for (int n = 0; n < REGISTERS; ++n) total[r][n] += x * columns[n];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < REGISTERS; ++n) store(c + r * ldc + n * LANES, total[r][n]);
}

template <int ROWS, bool TRANSPOSED>
static __attribute__((noinline)) void gemm_rows(int64_t registers, int64_t depth, const float* a, int64_t lda,
                                                const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  if (registers == 2)
    gemm_block<ROWS, 2, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc, accumulate);
  else
    gemm_block<ROWS, 1, TRANSPOSED>(depth, a, lda, b, ldb, c, ldc, accumulate);
}

using Block = void (*)(int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool);

template <bool TRANSPOSED, int ROWS = kMaxRows>
static Block block_of(int64_t rows) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return block_of<TRANSPOSED, ROWS - 1>(rows);
  return gemm_rows<ROWS, TRANSPOSED>;
}

template <bool TRANSPOSED>
static void gemm(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                 int64_t panel_stride, float* c, int64_t ldc, bool accumulate) {
  const int64_t panels = (cols + kPanel - 1) / kPanel;
  for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
    const int64_t depth_here = depth - k < kDepth ? depth - k : kDepth;
    const auto block = [&](int64_t m, int64_t panel) {
      const int64_t n = panel * kPanel, height = rows - m < kMaxRows ? rows - m : kMaxRows;
      block_of<TRANSPOSED>(height)(cols - n > LANES ? 2 : 1, depth_here, TRANSPOSED ? a + k * lda + m : a + m * lda + k, lda,
                      b + panel * panel_stride + k * ldb, ldb, c + m * ldc + n, ldc, accumulate || k > 0);
    };
    // One panel of B stays in the first-level cache, or all of a small B, so that A is read once.
    if (TRANSPOSED && depth_here * cols <= kSmall) {
      for (int64_t m = 0; m < rows; m += kMaxRows)
        for (int64_t panel = 0; panel < panels; ++panel) block(m, panel);
    } else {
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t m = 0; m < rows; m += kMaxRows) block(m, panel);
    }
  }
}

// C = A B with B as it lies in memory: cols is a multiple of LANES, ldb at least that.
INLINE void matmul(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
                   float* c, int64_t ldc, bool accumulate = false) {
  gemm<false>(rows, cols, depth, a, lda, b, ldb, kPanel, c, ldc, accumulate);
}

// C (+)= A^T B, A being (depth, rows).
INLINE void transposed_matmul(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t lda, const float* b,
                              int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  gemm<true>(rows, cols, depth, a, lda, b, ldb, kPanel, c, ldc, accumulate);
}
