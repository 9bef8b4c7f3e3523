// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set, as a table of functions. See kernels.inl for their definition.
#pragma once
#include "attention_args.h"

namespace irpe {

struct Kernels {
  const char* name;
  int lanes;  // floats in the widest registers
  // out[row, j] = in[row, id(row % plan.rows, j)] for rows [begin, end); in is (rows, buckets), out (rows, plan.cols).
  void (*lookup_32)(const PlanView& plan, const uint32_t* in, uint32_t* out, int64_t begin, int64_t end, int64_t buckets);
  void (*lookup_16)(const PlanView& plan, const uint16_t* in, uint16_t* out, int64_t begin, int64_t end, int64_t buckets);
  // out[row, n] = sum of grad[row, j] over the j with id(row % plan.rows, j) == n.
  void (*bucket_sums)(const PlanView& plan, const float* grad, float* out, int64_t begin, int64_t end, int64_t buckets);

  int block_rows;  // a tile should be a multiple of this
  // Bytes that one thread needs in attention_forward or attention_backward, 64-byte aligned.
  int64_t (*attention_scratch)(const AttentionArgs& args, bool backward);
  void (*attention_forward)(const AttentionArgs& args, int64_t first_tile, int64_t last_tile, char* scratch);
  void (*attention_backward)(const AttentionArgs& args, int64_t first_head, int64_t last_head, char* scratch);
};

// The best this machine runs, or the one asked for by IRPE_CPU_CAPABILITY or set_cpu_capability.
const Kernels& kernels();

// Defined by kernels_*.cpp; null where the compiler cannot build them (other processors).
const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

}  // namespace irpe
