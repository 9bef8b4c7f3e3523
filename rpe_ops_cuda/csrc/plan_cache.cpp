// SPDX-License-Identifier: Apache-2.0
// plan_for: plans are cached for the last few maps of ids, because every layer of a model asks for the same one.
#include <ATen/ops/aminmax.h>

#include <cstring>
#include <list>
#include <mutex>

#include "rpe_index.h"

namespace irpe {
namespace {

struct Known {
  at::Tensor index;  // a copy: compiled graphs reuse the memory of a map for another, without bumping any version
  LookUp direction;
  std::shared_ptr<const Plan> plan;
};

constexpr size_t kKept = 32;
std::mutex mutex;
std::list<Known> known;  // most recently used first

std::shared_ptr<const Plan> build(const at::Tensor& index, LookUp direction, int64_t buckets, const char* function) {
  const auto [lowest, highest] = at::aminmax(index);
  const int64_t low = lowest.item().toLong(), high = highest.item().toLong();
  TORCH_CHECK_INDEX(low >= 0 && high < buckets, function, ": index holds ", low < 0 ? low : high, "; with ", buckets,
                    " buckets it must be in [0, ", buckets, ")");
  TORCH_CHECK_VALUE(high < 65536, function, ": index holds ", high, "; the compiled kernels take at most 65536 buckets");
  const at::Tensor ids = index.to(at::kInt).contiguous();
  const int32_t* from = ids.const_data_ptr<int32_t>();
  auto plan = std::make_shared<Plan>();
  plan->ids.assign(from, from + ids.numel());
  (direction == LookUp::kByRows ? make_plan : make_column_plan)(*plan, index.size(0), index.size(1));
  return plan;
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

}  // namespace

std::shared_ptr<const Plan> plan_for(const at::Tensor& index_, int64_t buckets, const char* function, LookUp direction) {
  const at::Tensor index = index_.contiguous();
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = known.begin(); it != known.end(); ++it) {
    if (it->direction != direction || !same(it->index, index)) continue;
    known.splice(known.begin(), known, it);
    TORCH_CHECK_INDEX(it->plan->view.max_id < buckets, function, ": index holds ", it->plan->view.max_id, "; with ",
                      buckets, " buckets it must be in [0, ", buckets, ")");
    return it->plan;
  }
  auto plan = build(index, direction, buckets, function);
  known.push_front({index.clone(), direction, plan});
  if (known.size() > kKept) known.pop_back();
  return plan;
}

}  // namespace irpe
