// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA.
#include "kernels.h"

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define WIDEST 8
#define HAS_AVX2  // the pragma defines no __AVX2__ in GCC 12
#define INSTRUCTION_SET "avx2"
namespace irpe::avx2 {
#include "kernels.inl"
}
#pragma GCC pop_options

namespace irpe {
const Kernels* avx2_kernels() { return &avx2::kTable; }
}  // namespace irpe
#else
namespace irpe {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace irpe
#endif
