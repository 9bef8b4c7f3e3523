// SPDX-License-Identifier: Apache-2.0
// Owning side of plan.h. Not for the kernels.
#pragma once
#include <memory>
#include <vector>

#include "plan.h"

namespace irpe {

struct Plan {
  PlanView view;
  std::vector<uint16_t> ids, base;
  std::vector<uint32_t> perm;
  std::vector<float> one_hot;
  std::vector<int32_t> seg_start, slot_base, slot_first, slot_rows, col_part, row_base, part_of, part_range;
  std::vector<int64_t> piece_first;
  std::vector<uint8_t> piece_keys;
  std::vector<uint16_t> piece_id;
};

// Fills the rest of a plan whose `ids` (rows * cols, at least one) are set.
void make_plan(Plan& plan, int64_t rows, int64_t cols);
// The same for lookups by columns; `ids` are dropped.
void make_column_plan(Plan& plan, int64_t rows, int64_t cols);

}  // namespace irpe
