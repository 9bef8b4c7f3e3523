// SPDX-License-Identifier: Apache-2.0
// Operator schemas, argument checks, and rpe_index and its adjoint on CPU tensors.
#include "rpe_index.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace irpe {
namespace {

bool is_value_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

bool is_id_type(at::ScalarType type) {
  return type == at::kByte || type == at::kShort || type == at::kInt || type == at::kLong;
}

void check_common(const char* function, const char* name, const at::Tensor& values, const at::Tensor& index) {
  TORCH_CHECK_VALUE(values.dim() == 4 && index.dim() == 2, function, ": expected ", name, " (B, H, L_query, ",
                    name[0] == 'i' ? "N" : "L_key", ") and index (L_query, L_key); got ", name, " ", values.sizes(),
                    " and index ", index.sizes());
  TORCH_CHECK_VALUE(is_value_type(values.scalar_type()), function, ": ", name,
                    " must be float32, float64, float16 or bfloat16, not ", values.scalar_type());
  TORCH_CHECK_VALUE(is_id_type(index.scalar_type()), function, ": index must be uint8, int16, int32 or int64, not ",
                    index.scalar_type());
  TORCH_CHECK_VALUE(values.device() == index.device(), function, ": ", name, " is on ", values.device(),
                    " and index on ", index.device(), "; move one of them");
  TORCH_CHECK_VALUE(values.size(2) == index.size(0), function, ": ", name, " ", values.sizes(), " has ", values.size(2),
                    " queries and index ", index.sizes(), " has ", index.size(0));
}

// Fewest rows per thread: about 64 KB of output; below that, starting a thread costs more than it saves.
int64_t grain(int64_t cols) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols)); }

// at::empty, in pages of 2 MB if the system grants them. The C library asks the system for blocks of 32 MB and more each time,
// and faulting them in by pages of 4 KB takes several times as long as filling them.
at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor x = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20, kLarge = 32 << 20;
  if (x.nbytes() >= kLarge) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(x.data_ptr()), end = begin + x.nbytes();
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a refusal costs only time
  }
#endif
  return x;
}

// For fp64, which PyTorch's own operators serve.
at::Tensor expanded(const at::Tensor& index, at::IntArrayRef sizes) { return index.to(at::kLong).expand(sizes); }

at::Tensor rpe_index_cpu(const at::Tensor& input_, const at::Tensor& index) {
  check_rpe_index(input_, index);
  const int64_t buckets = input_.size(3), cols = index.size(1);
  at::Tensor out = empty_in_large_pages({input_.size(0), input_.size(1), input_.size(2), cols}, input_.options());
  if (index.numel() == 0) return out;
  const auto plan = plan_for(index, buckets, "rpe_index");
  if (out.numel() == 0) return out;
  if (input_.scalar_type() == at::kDouble) return at::gather_out(out, input_, 3, expanded(index, out.sizes()));
  const at::Tensor input = input_.contiguous();
  const int64_t rows = out.numel() / cols;
  const Kernels& isa = kernels();
  at::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    if (input.element_size() == 4) {
      isa.lookup_32(plan->view, static_cast<const uint32_t*>(input.const_data_ptr()),
                    static_cast<uint32_t*>(out.data_ptr()), begin, end, buckets);
    } else {
      isa.lookup_16(plan->view, static_cast<const uint16_t*>(input.const_data_ptr()),
                    static_cast<uint16_t*>(out.data_ptr()), begin, end, buckets);
    }
  });
  return out;
}

// Bucket sums of half precision, in fp32: one (L_query, L_key) matrix at a time, without an fp32 copy of all of `grad`.
template <class T>
void sum_halves(const PlanView& plan, const at::Tensor& grad, at::Tensor& out, int64_t buckets) {
  const Kernels& isa = kernels();
  const T* from = grad.const_data_ptr<T>();
  T* into = out.data_ptr<T>();
  const int64_t entries = plan.rows * plan.cols, results = plan.rows * buckets;
  at::parallel_for(0, grad.numel() / entries, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> values(entries), sums(results);
    for (int64_t m = begin; m < end; ++m) {
      std::transform(from + m * entries, from + (m + 1) * entries, values.begin(), [](T x) { return static_cast<float>(x); });
      isa.bucket_sums(plan, values.data(), sums.data(), 0, plan.rows, buckets);
      std::transform(sums.begin(), sums.end(), into + m * results, [](float x) { return static_cast<T>(x); });
    }
  });
}

at::Tensor rpe_index_adjoint_cpu(const at::Tensor& grad_, const at::Tensor& index, int64_t buckets) {
  check_rpe_index_adjoint(grad_, index, buckets);
  const int64_t cols = index.size(1);
  const auto sizes = {grad_.size(0), grad_.size(1), grad_.size(2), buckets};
  if (index.numel() == 0) return at::zeros(sizes, grad_.options());
  const auto plan = plan_for(index, buckets, "rpe_index_adjoint");
  if (grad_.numel() == 0) return at::zeros(sizes, grad_.options());
  if (grad_.scalar_type() == at::kDouble)
    return at::zeros(sizes, grad_.options()).scatter_add_(3, expanded(index, grad_.sizes()), grad_);
  const at::Tensor grad = grad_.contiguous();
  at::Tensor out = at::empty(sizes, grad.options());
  if (grad.scalar_type() == at::kFloat) {
    const Kernels& isa = kernels();
    at::parallel_for(0, grad.numel() / cols, grain(cols), [&](int64_t begin, int64_t end) {
      isa.bucket_sums(plan->view, grad.const_data_ptr<float>(), out.data_ptr<float>(), begin, end, buckets);
    });
  } else if (grad.scalar_type() == at::kBFloat16) {
    sum_halves<at::BFloat16>(plan->view, grad, out, buckets);
  } else {
    sum_halves<at::Half>(plan->view, grad, out, buckets);
  }
  return out;
}

}  // namespace

void check_rpe_index(const at::Tensor& input, const at::Tensor& index) {
  check_common("rpe_index", "input", input, index);
}

void check_rpe_index_adjoint(const at::Tensor& grad, const at::Tensor& index, int64_t num_buckets) {
  check_common("rpe_index_adjoint", "grad", grad, index);
  TORCH_CHECK_VALUE(grad.size(3) == index.size(1), "rpe_index_adjoint: grad ", grad.sizes(), " has ", grad.size(3),
                    " keys and index ", index.sizes(), " has ", index.size(1));
  TORCH_CHECK_VALUE(num_buckets >= 0, "rpe_index_adjoint: num_buckets must not be negative, got ", num_buckets);
}

}  // namespace irpe

TORCH_LIBRARY(irpe, m) {
  m.def("rpe_index(Tensor input, Tensor index) -> Tensor");
  m.def("rpe_index_adjoint(Tensor grad, Tensor index, SymInt num_buckets) -> Tensor");
}

TORCH_LIBRARY_IMPL(irpe, CPU, m) {
  m.impl("rpe_index", irpe::rpe_index_cpu);
  m.impl("rpe_index_adjoint", irpe::rpe_index_adjoint_cpu);
}
