// A register of LANES 32-bit values, in GCC's vector extensions: the same source becomes AVX-512, AVX2 or plain code.

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef vf vf_unaligned __attribute__((aligned(4), may_alias));
typedef vu vu_unaligned __attribute__((aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
INLINE vu load(const uint32_t* p) { return *reinterpret_cast<const vu_unaligned*>(p); }
INLINE void store(uint32_t* p, vu x) { *reinterpret_cast<vu_unaligned*>(p) = x; }
INLINE vf splat(float x) { return x - vf{}; }

#if LANES == 8
INLINE vi offsets(const uint32_t* perm) {
  const vu shift = {0, 4, 8, 12, 16, 20, 24, 28};
  const vu word = {perm[0], perm[0], perm[0], perm[0], perm[0], perm[0], perm[0], perm[0]};
  return reinterpret_cast<vi>(word >> shift);  // the permutation uses the lowest 3 bits only
}
#else
INLINE vi offsets(const uint32_t* perm) {
  const vu shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
  const uint32_t a = perm[0], b = perm[1];
  const vu word = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
  return reinterpret_cast<vi>(word >> shift);
}
#endif

INLINE float sum_of_lanes(vf x) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += x[lane];
  return total;
}
