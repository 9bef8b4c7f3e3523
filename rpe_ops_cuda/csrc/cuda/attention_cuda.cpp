// SPDX-License-Identifier: Apache-2.0
// Fused attention with relative position encoding on CUDA tensors: unpacks tensors and launches the kernels of
// attention_forward.cu and attention_backward.cu. Schemas are in ../attention.cpp; what is supported, in irpe_ops/backends/compiled.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "attention_kernels.h"

namespace irpe {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kScoreBytes = 256 << 20;  // for gradients of scores at a time, unless one head has more

// As the kernels read a tensor: `x` itself, or a copy.
at::Tensor readable(const at::Tensor& x) {
  bool fits = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int dim = 0; dim < 2; ++dim) fits = fits && (x.size(dim) == 1 || x.stride(dim) % 8 == 0);
  fits = fits && x.stride(2) % 8 == 0;  // also of one token: a tile's other rows have addresses
  for (int dim = 1; dim < 3; ++dim) fits = fits && x.size(dim) * x.stride(dim) <= INT32_MAX;
  return fits ? x : x.clone(at::MemoryFormat::Contiguous);  // contiguous() would keep an odd address
}

Heads heads_of(const at::Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), static_cast<int>(x.stride(1)), static_cast<int>(x.stride(2))};
}

// (B, H, L, columns), laid out as (B, L, H, columns), so that the projection that follows needs no copy.
at::Tensor empty_rows(const at::Tensor& q, int64_t columns) {
  return at::empty({q.size(0), q.size(2), q.size(1), columns}, q.options()).transpose(1, 2);
}

// Everything the kernels read, kept alive.
struct Call {
  AttentionCall args = {};
  at::Tensor q, k, v, on_q, on_k, on_v, ids;
};

// on_q and on_k are (H or 1, D, N), on_v is (H or 1, N, D).
Table prepare(at::Tensor& into, const char* name, const OptionalTensor& table, const at::Tensor& q, int& buckets) {
  if (!table.has_value()) return {};
  const at::Tensor& t = *table;
  const bool on_values = name[6] == 'v';
  TORCH_CHECK_VALUE(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == q.size(1)) && t.size(on_values ? 2 : 1) == kHeadDim,
                    "irpe::attention: ", name, " ", t.sizes(), " does not fit H=", q.size(1), " and D=", kHeadDim);
  TORCH_CHECK_VALUE(t.device() == q.device(), "irpe::attention: ", name, " is on ", t.device(), ", q on ", q.device());
  const int64_t found = t.size(on_values ? 1 : 2);
  TORCH_CHECK_VALUE(found > 0 && found <= kMostBuckets && (buckets == 0 || buckets == found), "irpe::attention: ", name,
                    " has ", found, " buckets; all tables must have the same number, at most ", kMostBuckets, " on CUDA");
  buckets = static_cast<int>(found);
  into = t.scalar_type() == q.scalar_type() || t.scalar_type() == at::kFloat ? t : t.to(at::kFloat);
  return {into.const_data_ptr(), into.size(0) == 1 ? 0 : into.stride(0), into.stride(on_values ? 1 : 2),
          into.stride(on_values ? 2 : 1), into.scalar_type() == at::kFloat};
}

void fill(Call& c, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& table_q,
          const OptionalTensor& table_k, const OptionalTensor& table_v, at::TensorList index_k,
          const OptionalTensor& key_padding_mask, const OptionalTensor& attn_mask, double scale, double dropout_p) {
  TORCH_CHECK_VALUE(q.dim() == 4 && q.size(3) == kHeadDim && q.sizes() == k.sizes() && q.sizes() == v.sizes(),
                    "irpe::attention: q, k and v must be (B, H, L, ", kHeadDim, ") of one shape on CUDA, got ", q.sizes(), ", ",
                    k.sizes(), " and ", v.sizes());
  TORCH_CHECK_VALUE((q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16) &&
                        k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "irpe::attention: q, k and v must all be float16 or bfloat16 on CUDA, got ", q.scalar_type(), ", ",
                    k.scalar_type(), " and ", v.scalar_type());
  TORCH_CHECK_VALUE(k.device() == q.device() && v.device() == q.device(), "irpe::attention: q, k and v must share one device");
  TORCH_CHECK_VALUE(table_k.has_value() && (table_q.has_value() || !table_v.has_value()),
                    "irpe::attention: CUDA has kernels for table_k, with table_q, or with both others");
  TORCH_CHECK_VALUE(!key_padding_mask.has_value() && !attn_mask.has_value() && dropout_p == 0 && scale > 0,
                    "irpe::attention: CUDA takes no masks, no dropout and a positive scale, got dropout_p=", dropout_p,
                    " and scale=", scale);
  const int64_t blocks = (q.size(2) + 15) / 16;
  TORCH_CHECK_VALUE(index_k.size() == 1 && index_k[0].sizes() == at::IntArrayRef({2, blocks, blocks, 32, 8}) &&
                        index_k[0].scalar_type() == at::kByte && index_k[0].device() == q.device() &&
                        index_k[0].is_contiguous() && reinterpret_cast<uintptr_t>(index_k[0].const_data_ptr()) % 8 == 0,
                    "irpe::attention: index_k must be one aligned (2, M, M, 32, 8) uint8 tensor on CUDA, the ids of L=", q.size(2),
                    " tokens as irpe_ops.buckets.ids_by_lane orders them");
  AttentionCall& a = c.args;
  a.batch = static_cast<int>(q.size(0)), a.heads = static_cast<int>(q.size(1)), a.length = static_cast<int>(q.size(2));
  a.is_bfloat16 = q.scalar_type() == at::kBFloat16;
  a.scale = static_cast<float>(scale);
  c.q = readable(q), c.k = readable(k), c.v = readable(v), c.ids = index_k[0];
  a.q = heads_of(c.q), a.k = heads_of(c.k), a.v = heads_of(c.v);
  a.on_q = prepare(c.on_q, "table_q", table_q, q, a.buckets);
  a.on_k = prepare(c.on_k, "table_k", table_k, q, a.buckets);
  a.on_v = prepare(c.on_v, "table_v", table_v, q, a.buckets);
  const auto* ids = static_cast<const uint2*>(c.ids.const_data_ptr());
  a.ids = {ids, ids + blocks * blocks * 32};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_cuda(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& table_q, const OptionalTensor& table_k,
    const OptionalTensor& table_v, at::TensorList, at::TensorList index_k, at::TensorList,
    const OptionalTensor& key_padding_mask, const OptionalTensor& attn_mask, const OptionalTensor&, double scale,
    double dropout_p, bool keep, bool) {
  const c10::cuda::CUDAGuard guard(q.device());
  Call c;
  fill(c, q, k, v, table_q, table_k, table_v, index_k, key_padding_mask, attn_mask, scale, dropout_p);
  at::Tensor out = empty_rows(q, kHeadDim);
  at::Tensor log_sums = at::empty({q.size(0) * q.size(1) * q.size(2)}, q.options().dtype(at::kFloat));
  at::Tensor none = at::empty({0}, log_sums.options()), sums = at::empty({0}, q.options());
  if (keep && table_v.has_value()) sums = at::empty({q.size(0), q.size(2), q.size(1), kMostBuckets}, q.options());
  if (q.numel() > 0) {
    c.args.out = heads_of(out);
    if (sums.numel() > 0) c.args.sums = heads_of(sums.transpose(1, 2));
    c.args.log_sums = log_sums.mutable_data_ptr<float>();
    C10_CUDA_CHECK(launch_attention(c.args, c10::cuda::getCurrentCUDAStream()));
  }
  return {out, log_sums, none, sums};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward_cuda(
    const at::Tensor& grad_out_, const at::Tensor& out, const at::Tensor& log_sums, const at::Tensor&, const at::Tensor& sums_,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& table_q, const OptionalTensor& table_k,
    const OptionalTensor& table_v, at::TensorList, at::TensorList index_k, at::TensorList,
    const OptionalTensor& key_padding_mask, const OptionalTensor& attn_mask, const OptionalTensor&, double scale,
    double dropout_p) {
  const c10::cuda::CUDAGuard guard(q.device());
  Call c;
  AttentionCall& a = c.args;
  fill(c, q, k, v, table_q, table_k, table_v, index_k, key_padding_mask, attn_mask, scale, dropout_p);
  const at::Tensor grad_qkv = at::empty({a.batch, a.length, 3, a.heads, kHeadDim}, q.options());
  const at::Tensor grad_out = readable(grad_out_), rows = readable(out);
  const at::Tensor sums = table_v.has_value() ? sums_.transpose(1, 2) : at::Tensor();
  const at::Tensor on_q = table_q.has_value() ? empty_rows(q, kMostBuckets) : at::Tensor();
  const at::Tensor on_k = empty_rows(q, kMostBuckets);
  const int64_t bytes = std::max<int64_t>(1, bytes_of_scores(a.length));
  a.planes = static_cast<int>(std::clamp<int64_t>(kScoreBytes / bytes, 1, std::max<int64_t>(1, q.size(0) * q.size(1))));
  const at::Tensor scores = at::empty({a.planes * bytes / 2}, q.options());
  a.out = heads_of(rows), a.grad_out = heads_of(grad_out), a.log_sums = const_cast<float*>(log_sums.const_data_ptr<float>());
  const auto part = [&](int64_t i) { return heads_of(grad_qkv.select(2, i).transpose(1, 2)); };
  a.grad_q = part(0), a.grad_k = part(1), a.grad_v = part(2);
  if (table_q.has_value()) a.grad_lookup_q = heads_of(on_q);
  if (table_v.has_value()) a.sums = heads_of(sums);
  a.grad_lookup_k = heads_of(on_k), a.grad_scores = scores.mutable_data_ptr();
  TableGradients gradients{};
  const auto out_of = [&](const OptionalTensor& table, bool of_values, const at::Tensor& x, const at::Tensor& grad) {
    const auto floats = q.options().dtype(at::kFloat);
    if (!table.has_value()) return at::empty({0}, floats);
    at::Tensor result = q.numel() > 0 ? at::empty(table->sizes(), floats) : at::zeros(table->sizes(), floats);
    gradients.all[gradients.count++] = {heads_of(x), heads_of(grad), static_cast<int>(table->size(0)), of_values,
                                        result.mutable_data_ptr<float>()};
    return result;
  };
  const at::Tensor of_q = out_of(table_q, false, c.k, on_q), of_k = out_of(table_k, false, c.q, on_k);
  const at::Tensor of_v = out_of(table_v, true, grad_out, sums);
  if (q.numel() > 0) {
    const auto stream = c10::cuda::getCurrentCUDAStream();
    C10_CUDA_CHECK(launch_attention_backward(a, stream));
    at::Tensor parts = at::empty({floats_of_parts(gradients)}, of_k.options());
    C10_CUDA_CHECK(launch_table_gradients(gradients, a.batch, a.heads, a.length, a.buckets, a.is_bfloat16,
                                          parts.mutable_data_ptr<float>(), stream));
  }
  const auto as = [](const at::Tensor& grad, const OptionalTensor& table) {
    return table.has_value() ? grad.to(table->scalar_type()) : grad;
  };
  return {grad_qkv, as(of_q, table_q), as(of_k, table_k), as(of_v, table_v)};
}

}  // namespace
}  // namespace irpe

TORCH_LIBRARY_IMPL(irpe, CUDA, m) {
  m.impl("attention", irpe::attention_cuda);
  m.impl("attention_backward", irpe::attention_backward_cuda);
}
