// SPDX-License-Identifier: Apache-2.0
// Every kernel of one instruction set. Included by kernels_<instruction set>.cpp inside a namespace of its own, after the
// pragma that selects the instruction set. No standard header may be included here: see plan.h.
//
// Products and exp are computed in the widest registers, of WIDEST floats; lookups and bucket sums in registers of kLookupLanes
// everywhere. A store from a wider one crosses a cache line twice as often, and the loads after it wait.
namespace lookups {
#define LANES 8
static_assert(LANES == kLookupLanes, "plans are made for so many");
#include "vec.inl"

#include "lookup.inl"
#undef LANES
}  // namespace lookups

#define LANES WIDEST
#include "vec.inl"

#include "gemm.inl"

#include "attention.inl"

static const Kernels kTable = {INSTRUCTION_SET,      LANES,    lookups::lookup_32, lookups::lookup_16,
                               lookups::bucket_sums, kMaxRows, attention_scratch,  attention_forward,
                               attention_backward};
