// Every kernel, for registers of LANES 32-bit values. Included by kernels_<instruction set>.cpp inside a namespace of its
// own, after the pragma that selects the instruction set. No standard header may be included here: see plan.h.
#include "vec.inl"

#include "lookup.inl"

#include "gemm.inl"

#include "attention.inl"

static const Kernels kTable = {INSTRUCTION_SET,   LANES,  lookup_32, lookup_16, bucket_sums, kMaxRows, attention_scratch,
                               attention_forward, attention_backward};
