// SPDX-License-Identifier: Apache-2.0
// AVX-512.
#include "kernels.h"

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define WIDEST 16
#define HAS_AVX2  // the pragma defines no __AVX2__ in GCC 12
#define INSTRUCTION_SET "avx512"
namespace irpe::avx512 {
#include "kernels.inl"
}
#pragma GCC pop_options

namespace irpe {
const Kernels* avx512_kernels() { return &avx512::kTable; }
}  // namespace irpe
#else
namespace irpe {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace irpe
#endif
