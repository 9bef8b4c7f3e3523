// Owning side of plan.h. Not for the kernels.
#pragma once
#include <memory>
#include <vector>

#include "plan.h"

namespace irpe {

struct Plan {
  PlanView view;
  std::vector<uint16_t> ids, base;
  std::vector<uint32_t> perm, col_mask;
  std::vector<int32_t> seg_start, slot_base, slot_first, slot_rows, slot_of_row, col_part;
};

// Fills the rest of a plan whose `ids` (rows * cols, at least one) are set.
void make_plan(Plan& plan, int64_t rows, int64_t cols, int lanes);

}  // namespace irpe
