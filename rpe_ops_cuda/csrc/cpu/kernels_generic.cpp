// SPDX-License-Identifier: Apache-2.0
// Any processor, with 16 lanes as in AVX-512, so that a machine without AVX-512 tests that logic too.
#include "kernels.h"

#define WIDEST 16
#define INSTRUCTION_SET "generic"
namespace irpe::generic {
#include "kernels.inl"
}

namespace irpe {
const Kernels* generic_kernels() { return &generic::kTable; }
}  // namespace irpe
