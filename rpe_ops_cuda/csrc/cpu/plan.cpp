// SPDX-License-Identifier: Apache-2.0
#include "plan_cache.h"

#include <algorithm>
#include <map>

namespace irpe {
namespace {

constexpr int64_t kMaxOneHot = 1 << 19;  // entries: 2 MB

void cut_into_segments(Plan& plan) {
  const int64_t rows = plan.view.rows, cols = plan.view.cols;
  plan.seg_start.clear();
  for (int64_t start = 0; start < cols;) {
    int64_t length = std::min<int64_t>(kLookupLanes, cols - start);
    for (int64_t i = 0; i < rows && length > 1; ++i) {
      const uint16_t* id = &plan.ids[i * cols + start];
      int lowest = id[0], highest = id[0];
      for (int64_t t = 1; t < length; ++t) {
        lowest = std::min<int>(lowest, id[t]);
        highest = std::max<int>(highest, id[t]);
        if (highest - lowest >= kLookupLanes) length = t;
      }
    }
    plan.seg_start.push_back(static_cast<int32_t>(start));
    start += length;
    // Below four keys a segment on average, permuting is slower than single loads.
    if (plan.seg_start.size() > 16 && start < 4 * static_cast<int64_t>(plan.seg_start.size())) return;
  }
  const int64_t segments = static_cast<int64_t>(plan.seg_start.size());
  plan.seg_start.push_back(static_cast<int32_t>(cols));
  plan.base.resize(rows * segments);
  plan.perm.assign(rows * segments, 0);
  // A load of kLookupLanes entries may not pass the last bucket, so the base is kept that far from it.
  const int last_base = std::max(0, plan.view.max_id + 1 - kLookupLanes);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t s = 0; s < segments; ++s) {
      const uint16_t* id = &plan.ids[i * cols];
      const int64_t begin = plan.seg_start[s], end = plan.seg_start[s + 1];
      const int base = std::min<int>(*std::min_element(id + begin, id + end), last_base);
      plan.base[i * segments + s] = static_cast<uint16_t>(base);
      for (int64_t j = begin; j < end; ++j) {
        plan.perm[i * segments + s] |= static_cast<uint32_t>(id[j] - base) << (4 * (j - begin));
      }
    }
  }
  plan.view.segmented = true;
  plan.view.num_segments = segments;
}

// The number of leading tokens, whose rows and columns hold one id throughout; -1 if only the rows do.
int64_t leading_tokens(const Plan& plan) {
  const int64_t n = plan.view.rows;
  const auto row_is_constant = [&](int64_t i) {
    const uint16_t* id = &plan.ids[i * n];
    return std::all_of(id, id + n, [&](uint16_t x) { return x == plan.ids[0]; });
  };
  int64_t skip = 0;
  while (skip < n && row_is_constant(skip)) ++skip;
  if (skip == n) return 0;  // one bucket for everything
  for (int64_t i = skip; i < n; ++i)
    for (int64_t j = 0; j < skip; ++j)
      if (plan.ids[i * n + j] != plan.ids[0]) return -1;
  return skip;
}

bool is_separable(const Plan& plan, int64_t skip, int64_t height, int64_t width) {
  const int64_t n = plan.view.rows;
  const auto id = [&](int64_t qr, int64_t qc, int64_t kr, int64_t kc) {
    return static_cast<int>(plan.ids[(skip + qr * width + qc) * n + skip + kr * width + kc]);
  };
  for (int64_t qr = 0; qr < height; ++qr)
    for (int64_t qc = 0; qc < width; ++qc)
      for (int64_t kr = 0; kr < height; ++kr) {
        const int row_part = id(qr, 0, kr, 0) - id(0, 0, 0, 0);
        for (int64_t kc = 0; kc < width; ++kc)
          if (id(qr, qc, kr, kc) != row_part + id(0, qc, 0, kc)) return false;
      }
  return true;
}

void separate(Plan& plan) {
  PlanView& view = plan.view;
  if (view.rows != view.cols || view.rows < 4) return;
  const int64_t skip = leading_tokens(plan);
  if (skip < 0) return;
  const int64_t n = view.rows, tokens = n - skip;
  int64_t best_width = 0, best_cost = tokens * tokens;
  for (int64_t width = 2; width <= tokens; ++width) {
    if (tokens % width != 0) continue;
    const int64_t height = tokens / width;
    if (!is_separable(plan, skip, height, width)) continue;
    std::map<int, int> row_parts;
    for (int64_t qr = 0; qr < height; ++qr)
      for (int64_t kr = 0; kr < height; ++kr)
        row_parts.emplace(plan.ids[(skip + qr * width) * n + skip + kr * width], 0);
    const int64_t cost = static_cast<int64_t>(row_parts.size()) * width;
    if (cost < best_cost) best_cost = cost, best_width = width;
  }
  if (best_width == 0 || best_cost > tokens) return;  // no gain over adding one by one; see also below
  const int64_t width = best_width, height = tokens / width;
  const auto at = [&](int64_t qr, int64_t qc, int64_t kr, int64_t kc) {
    return static_cast<int>(plan.ids[(skip + qr * width + qc) * n + skip + kr * width + kc]);
  };
  int col_min = at(0, 0, 0, 0), col_max = col_min;
  for (int64_t qc = 0; qc < width; ++qc)
    for (int64_t kc = 0; kc < width; ++kc) {
      col_min = std::min(col_min, at(0, qc, 0, kc));
      col_max = std::max(col_max, at(0, qc, 0, kc));
    }
  std::map<int, int> slot_of;  // id at columns (0, 0) -> slot, in the order of ids
  for (int64_t qr = 0; qr < height; ++qr)
    for (int64_t kr = 0; kr < height; ++kr) slot_of.emplace(at(qr, 0, kr, 0), 0);
  for (auto& [id, slot] : slot_of) {
    slot = static_cast<int>(plan.slot_base.size());
    plan.slot_base.push_back(id - at(0, 0, 0, 0) + col_min);
  }
  view.num_slots = static_cast<int32_t>(slot_of.size());
  for (int64_t qr = 0; qr < height; ++qr) {
    std::vector<std::vector<int32_t>> of_slot(slot_of.size());
    for (int64_t kr = 0; kr < height; ++kr) of_slot[slot_of[at(qr, 0, kr, 0)]].push_back(static_cast<int32_t>(kr));
    for (const auto& key_rows : of_slot) {
      plan.slot_first.push_back(static_cast<int32_t>(plan.slot_rows.size() - qr * height));
      plan.slot_rows.insert(plan.slot_rows.end(), key_rows.begin(), key_rows.end());
    }
    plan.slot_first.push_back(static_cast<int32_t>(height));
  }
  view.col_span = col_max - col_min + 1;
  view.col_padded = (view.col_span + kLookupLanes - 1) / kLookupLanes * kLookupLanes;
  bool one_hot = width * width * view.col_padded <= kMaxOneHot && view.col_padded <= 2 * kLookupLanes;
  for (size_t slot = 1; slot < plan.slot_base.size(); ++slot)
    one_hot = one_hot && plan.slot_base[slot] >= plan.slot_base[slot - 1] + view.col_span;
  if (!one_hot && 4 * best_cost > 3 * tokens) return;
  if (one_hot) plan.one_hot.assign(width * width * view.col_padded, 0.0f);
  for (int64_t qc = 0; qc < width; ++qc)
    for (int64_t kc = 0; kc < width; ++kc) {
      const int part = at(0, qc, 0, kc) - col_min;
      plan.col_part.push_back(part);
      if (one_hot) plan.one_hot[(qc * width + kc) * view.col_padded + part] = 1.0f;
    }
  view.separable = true;
  view.skip = skip, view.height = height, view.width = width, view.skip_id = skip ? plan.ids[0] : 0;
}

// The queries of a separable map are its columns here.
void separate_columns(Plan& plan) {
  const PlanView& view = plan.view;
  const int64_t height = view.height, width = view.width, lanes = kLookupLanes;
  const auto at = [&](int64_t key, int64_t query) {
    return static_cast<int32_t>(plan.ids[(view.skip + key) * view.cols + view.skip + query]);
  };
  const int32_t least = at(0, 0) - plan.col_part[0];
  for (int64_t query_row = 0; query_row < height; ++query_row)
    for (int64_t key_row = 0; key_row < height; ++key_row)
      plan.row_base.push_back(at(key_row * width, query_row * width) - at(0, 0) + least);
  for (int64_t query = 0; query < width; ++query)
    for (int64_t chunk = 0; chunk < width; chunk += lanes) {
      for (int64_t key = chunk; key < chunk + lanes; ++key) plan.part_of.push_back(key < width ? at(key, query) - least : -1);
      const auto end = plan.part_of.end();
      const auto [low, high] = std::minmax_element(end - lanes, end - lanes + std::min(lanes, width - chunk));
      plan.part_range.insert(plan.part_range.end(), {*low, *high});
    }
  plan.view.row_base = plan.row_base.data();
  plan.view.part_of = plan.part_of.data(), plan.view.part_range = plan.part_range.data();
}

void begin(Plan& plan, int64_t rows, int64_t cols) {
  plan.view = PlanView{};
  plan.view.rows = rows, plan.view.cols = cols;
  const auto [lowest, highest] = std::minmax_element(plan.ids.begin(), plan.ids.end());
  plan.view.min_id = *lowest, plan.view.max_id = *highest;
}

}  // namespace

void make_column_plan(Plan& plan, int64_t rows, int64_t cols) {
  begin(plan, rows, cols);
  for (int64_t i = 0; i < cols; ++i) {
    plan.piece_first.push_back(static_cast<int64_t>(plan.piece_id.size()));
    for (int64_t j = 0; j < rows;) {
      const uint16_t id = plan.ids[j * cols + i];
      int keys = 1;
      while (keys < kLookupLanes && j + keys < rows && plan.ids[(j + keys) * cols + i] == id) ++keys;
      plan.piece_keys.push_back(static_cast<uint8_t>(keys));
      plan.piece_id.push_back(id);
      j += keys;
    }
  }
  plan.piece_first.push_back(static_cast<int64_t>(plan.piece_id.size()));
  separate(plan);
  if (plan.view.separable) separate_columns(plan);
  plan.ids = {};
  plan.view.piece_first = plan.piece_first.data();
  plan.view.piece_keys = plan.piece_keys.data(), plan.view.piece_id = plan.piece_id.data();
}

void make_plan(Plan& plan, int64_t rows, int64_t cols) {
  begin(plan, rows, cols);
  PlanView& view = plan.view;
  cut_into_segments(plan);
  separate(plan);
  view.ids = plan.ids.data();
  view.seg_start = plan.seg_start.data(), view.base = plan.base.data(), view.perm = plan.perm.data();
  view.slot_base = plan.slot_base.data(), view.slot_first = plan.slot_first.data();
  view.slot_rows = plan.slot_rows.data();
  view.col_part = plan.col_part.data();
  view.one_hot = plan.one_hot.empty() ? nullptr : plan.one_hot.data();
}

}  // namespace irpe
