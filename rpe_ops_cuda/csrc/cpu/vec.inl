// SPDX-License-Identifier: Apache-2.0
// A register of LANES 32-bit values, in GCC's vector extensions: the same source becomes AVX-512, AVX2 or plain code.

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef vf vf_unaligned __attribute__((aligned(4), may_alias));
typedef vu vu_unaligned __attribute__((aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
// Past the caches, which would first fetch the old line. For an aligned place that is not read again soon.
INLINE void stream(float* p, vf x) {
#if defined(HAS_AVX2) && LANES == 16 && !defined(__clang__)
  __builtin_ia32_movntps512(p, x);
#elif defined(HAS_AVX2) && LANES == 8 && !defined(__clang__)
  __builtin_ia32_movntps256(p, x);
#else
  store(p, x);
#endif
}
INLINE vi load(const int32_t* p) { return reinterpret_cast<vi>(*reinterpret_cast<const vu_unaligned*>(p)); }
INLINE vu load(const uint32_t* p) { return *reinterpret_cast<const vu_unaligned*>(p); }
INLINE void store(uint32_t* p, vu x) { *reinterpret_cast<vu_unaligned*>(p) = x; }
INLINE vf splat(float x) { return x - vf{}; }

// x combined with itself, half a register apart, then a quarter, ...: every lane ends with the result.
#if LANES == 8
#define COMBINE_LANES(x, OP)                                             \
  x = OP(x, __builtin_shuffle(x, vi{4, 5, 6, 7, 0, 1, 2, 3}));           \
  x = OP(x, __builtin_shuffle(x, vi{2, 3, 0, 1, 6, 7, 4, 5}));           \
  x = OP(x, __builtin_shuffle(x, vi{1, 0, 3, 2, 5, 4, 7, 6}))
#else
#define COMBINE_LANES(x, OP)                                                                      \
  x = OP(x, __builtin_shuffle(x, vi{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));      \
  x = OP(x, __builtin_shuffle(x, vi{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));      \
  x = OP(x, __builtin_shuffle(x, vi{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));      \
  x = OP(x, __builtin_shuffle(x, vi{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}))
#endif

INLINE vf add(vf a, vf b) { return a + b; }
INLINE vf greater(vf a, vf b) { return a > b ? a : b; }  // b if either is NaN, as the instruction

INLINE float sum_of_lanes(vf x) {
  COMBINE_LANES(x, add);
  return x[0];
}

INLINE float greatest_of_lanes(vf x) {
  COMBINE_LANES(x, greater);
  return x[0];
}

#undef COMBINE_LANES

INLINE int64_t rounded_up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// exp(x - greatest) for x <= greatest: 0 below exp(-87.3), NaN for NaN. 2^t is 2^n, by the exponent bits, times a polynomial
// in t - n on [-1/2, 1/2], fitted to the least relative error (9e-8). Sums of pairs rather than Horner's scheme: the chain of
// dependent steps is what takes time.
INLINE vf exp_lanes(vf x, float greatest_x) {
  constexpr float kLog2E = 1.44269504088896341f;
  const vf d = x - greatest_x;
  const vf shifted = d * kLog2E + 12583039.0f;  // 1.5 * 2^23 + 127: rounds to an integer, and n + 127 are the low bits
  const vf r = d * kLog2E - (shifted - 12583039.0f);
  const vf r2 = r * r;
  const vf low = r * 0.24022242427f + 0.69314700365f;
  const vf high = r2 * 0.0013264652807f + (r * 0.0096715111285f + 0.055507339537f);
  const vf p = (low + r2 * high) * r + 1.0f;
  return d < -87.3f ? vf{} : p * reinterpret_cast<vf>(reinterpret_cast<vi>(shifted) << 23);
}

// rows[r][lane] -> rows[lane][r]
INLINE void transpose(vf rows[LANES]) {
#if LANES == 8
  vf t[8];
  for (int r = 0; r < 8; r += 2) {
    t[r] = __builtin_shuffle(rows[r], rows[r + 1], vi{0, 8, 1, 9, 4, 12, 5, 13});
    t[r + 1] = __builtin_shuffle(rows[r], rows[r + 1], vi{2, 10, 3, 11, 6, 14, 7, 15});
  }
  vf u[8];
  for (int r = 0; r < 8; r += 4)
    for (int half = 0; half < 2; ++half) {
      u[r + 2 * half] = __builtin_shuffle(t[r + half], t[r + 2 + half], vi{0, 1, 8, 9, 4, 5, 12, 13});
      u[r + 2 * half + 1] = __builtin_shuffle(t[r + half], t[r + 2 + half], vi{2, 3, 10, 11, 6, 7, 14, 15});
    }
  for (int r = 0; r < 4; ++r) {
    rows[r] = __builtin_shuffle(u[r], u[r + 4], vi{0, 1, 2, 3, 8, 9, 10, 11});
    rows[r + 4] = __builtin_shuffle(u[r], u[r + 4], vi{4, 5, 6, 7, 12, 13, 14, 15});
  }
#else
  // Interleaving row r with row r + 8, four times over, moves every bit of the row number into the lane number.
  const vi low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const vi high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int step = 0; step < 4; ++step) {
    vf t[16];
    for (int r = 0; r < 8; ++r) {
      t[2 * r] = __builtin_shuffle(rows[r], rows[r + 8], low);
      t[2 * r + 1] = __builtin_shuffle(rows[r], rows[r + 8], high);
    }
    for (int r = 0; r < 16; ++r) rows[r] = t[r];
  }
#endif
}
