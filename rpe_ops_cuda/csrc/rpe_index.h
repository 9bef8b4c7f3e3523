// SPDX-License-Identifier: Apache-2.0
// Argument checks that the CPU and CUDA operators share, and the plans that CPU code makes of a map of bucket ids.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>

#include "cpu/plan_cache.h"

namespace irpe {

// input (B, H, L_query, N), index (L_query, L_key).
void check_rpe_index(const at::Tensor& input, const at::Tensor& index);
// grad (B, H, L_query, L_key), index (L_query, L_key).
void check_rpe_index_adjoint(const at::Tensor& grad, const at::Tensor& index, int64_t num_buckets);

// The plan of a CPU index tensor with at least one element, made once for equal ids and cached for the last few maps.
// IndexError unless every id is in [0, num_buckets).
enum class LookUp { kByRows, kByColumns };  // of a map: make_plan or make_column_plan
std::shared_ptr<const Plan> plan_for(const at::Tensor& index, int64_t num_buckets, const char* function,
                                     LookUp direction = LookUp::kByRows);

}  // namespace irpe
