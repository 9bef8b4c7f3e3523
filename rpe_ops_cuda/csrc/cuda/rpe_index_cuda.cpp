// SPDX-License-Identifier: Apache-2.0
// rpe_index and its adjoint on CUDA tensors: unpacks tensors and launches the kernels of lookup.cu and bucket_sums.cu.
// Schemas and argument checks are in ../rpe_index.h and ../rpe_index.cpp.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../rpe_index.h"
#include "rpe_index_kernels.h"

namespace irpe {
namespace {

ValueType value_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return ValueType::kFloat;
    case at::kDouble: return ValueType::kDouble;
    case at::kHalf: return ValueType::kHalf;
    case at::kBFloat16: return ValueType::kBFloat16;
    default: TORCH_INTERNAL_ASSERT(false, "check_rpe_index let ", tensor.scalar_type(), " pass");
  }
}

IdType id_type(const at::Tensor& index) {
  switch (index.scalar_type()) {
    case at::kByte: return IdType::kUInt8;
    case at::kInt: return IdType::kInt32;
    case at::kLong: return IdType::kInt64;
    default: TORCH_INTERNAL_ASSERT(false, "check_rpe_index let ", index.scalar_type(), " pass");
  }
}

// Contiguous, in a type the kernels are built for: int16 is too rare to be worth one of its own.
at::Tensor ids_of(const at::Tensor& index) {
  return (index.scalar_type() == at::kShort ? index.to(at::kInt) : index).contiguous();
}

Strided strided(const at::Tensor& t) {
  return {t.const_data_ptr(), t.size(0),   t.size(1),   t.size(2),  t.size(3),
          t.stride(0),        t.stride(1), t.stride(2), t.stride(3)};
}

at::Tensor rpe_index_cuda(const at::Tensor& input, const at::Tensor& index) {
  check_rpe_index(input, index);
  const c10::cuda::CUDAGuard guard(input.device());
  at::Tensor out = at::empty({input.size(0), input.size(1), input.size(2), index.size(1)}, input.options());
  if (out.numel() == 0) return out;
  const at::Tensor ids = ids_of(index);
  C10_CUDA_CHECK(launch_rpe_index(strided(input), value_type(input), ids.const_data_ptr(), id_type(ids), ids.size(1),
                                  out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

at::Tensor rpe_index_adjoint_cuda(const at::Tensor& grad, const at::Tensor& index, int64_t num_buckets) {
  check_rpe_index_adjoint(grad, index, num_buckets);
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto sizes = {grad.size(0), grad.size(1), grad.size(2), num_buckets};
  if (grad.numel() == 0) return at::zeros(sizes, grad.options());
  at::Tensor out = at::empty(sizes, grad.options());
  if (out.numel() == 0) return out;
  const at::Tensor ids = ids_of(ids_are_transposed(strided(grad)) ? index.t() : index);
  C10_CUDA_CHECK(launch_rpe_index_adjoint(strided(grad), value_type(grad), ids.const_data_ptr(), id_type(ids),
                                          num_buckets, out.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return out;
}

bool has_code_for(int64_t device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  return has_code_for_this_device();
}

}  // namespace
}  // namespace irpe

TORCH_LIBRARY_FRAGMENT(irpe, m) { m.def("has_code_for(int device) -> bool", irpe::has_code_for); }

TORCH_LIBRARY_IMPL(irpe, CUDA, m) {
  m.impl("rpe_index", irpe::rpe_index_cuda);
  m.impl("rpe_index_adjoint", irpe::rpe_index_adjoint_cuda);
}
