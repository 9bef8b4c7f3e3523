// SPDX-License-Identifier: Apache-2.0
// Fused attention with relative position encoding: schemas, and on CPU tensors the preparation around the kernels of
// cpu/attention.inl. The CUDA part is in cuda/attention_cuda.cpp.
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "rpe_index.h"

namespace irpe {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

at::Tensor padded(const at::Tensor& x, int64_t width) {
  return at::constant_pad_nd(x.to(at::kFloat), {0, width - x.size(-1)}).contiguous();
}

at::Tensor as_float_rows(const at::Tensor& x) {
  at::Tensor f = x.to(at::kFloat);
  return f.stride(-1) == 1 || f.size(-1) == 1 ? f : f.contiguous();
}

Rows rows_of(const at::Tensor& x) { return {x.data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)}; }

// An Encoding with the tensors and plans it points to.
struct Prepared {
  Encoding encoding = {};
  int64_t bucket_dim = 0, first_bucket = 0;  // of the given table; first bucket used
  at::Tensor table, transposed, grad;
  std::vector<std::shared_ptr<const Plan>> plans;
};

enum class On { kQueries, kKeys, kValues };

// Tables as given: ctx on q and k (heads or 1, D, N), on v (heads or 1, N, D), bias (heads or 1, N).
void prepare(Prepared& into, const char* name, On on, const OptionalTensor& table, at::TensorList index, const at::Tensor& q,
             float factor, bool backward) {
  Encoding& e = into.encoding;
  const bool on_values = on == On::kValues;
  if (!table.has_value()) return;
  const at::Tensor given = table->detach();
  const int64_t heads = q.size(1), length = q.size(2), head_dim = q.size(3);
  e.bias = given.dim() == 2;
  TORCH_CHECK_VALUE(!(e.bias && on_values), "irpe::attention: ", name, " must be (H or 1, N, D), got ", given.sizes());
  TORCH_CHECK_VALUE((given.dim() == 3 || e.bias) && (given.size(0) == 1 || given.size(0) == heads) &&
                        (e.bias || given.size(on_values ? 2 : 1) == head_dim),
                    "irpe::attention: ", name, " ", given.sizes(), " does not fit H=", heads, " and D=", head_dim);
  TORCH_CHECK_VALUE(index.size() == 1 || index.size() == 2, "irpe::attention: ", name, " needs one or two index maps, got ",
                    index.size());
  e.parts = static_cast<int32_t>(index.size());
  e.shared = given.size(0) == 1;
  into.bucket_dim = e.bias || on_values ? 1 : 2;
  const int64_t buckets = given.size(into.bucket_dim), per_part = buckets / e.parts;
  TORCH_CHECK_VALUE(buckets % e.parts == 0, "irpe::attention: ", name, " ", given.sizes(), " does not have two equal parts");
  for (int32_t p = 0; p < e.parts; ++p) {
    TORCH_CHECK_VALUE(index[p].dim() == 2 && index[p].size(0) == length && index[p].size(1) == length,
                      "irpe::attention: the index maps of ", name, " must be (L, L) with L=", length, ", got ", index[p].sizes());
    const LookUp direction = on == On::kQueries ? LookUp::kByColumns : LookUp::kByRows;
    into.plans.push_back(plan_for(index[p], per_part, "irpe::attention", direction));
    e.plan[p] = &into.plans.back()->view;
  }
  // A lookup loads a whole register, so the table keeps as many buckets before the last id as a register has lanes.
  const PlanView &front = *e.plan[0], &back = *e.plan[e.parts - 1];
  into.first_bucket = std::max<int64_t>(0, std::min<int64_t>(front.min_id, front.max_id + 1 - kLookupLanes));
  e.buckets = (e.parts - 1) * per_part + back.max_id + 1 - into.first_bucket;
  e.padded = rounded_up(e.buckets, 16);
  for (int32_t p = 0; p < e.parts; ++p) e.offset[p] = p * per_part - into.first_bucket;
  const int64_t d = rounded_up(head_dim, kernels().lanes);
  const at::Tensor used = given.narrow(into.bucket_dim, into.first_bucket, e.buckets);
  const at::Tensor scaled = e.bias || factor == 1 ? used : used.to(at::kFloat).mul(factor);
  into.table = padded(scaled, on_values ? d : e.padded);
  e.table = into.table.data_ptr<float>();
  if (!backward) return;
  if (!e.bias) {
    into.transposed = padded(scaled.transpose(1, 2), on_values ? e.padded : d);
    e.transposed = into.transposed.data_ptr<float>();
  }
  const int64_t matrices = q.size(0) * heads;
  const auto options = q.options().dtype(at::kFloat);
  into.grad = e.bias ? at::empty({matrices, e.padded}, options) : at::empty({matrices, e.buckets, d}, options);
  if (e.bias || q.numel() == 0) into.grad.zero_();  // a bias accumulates, the rest is overwritten
  e.grad = into.grad.data_ptr<float>();
}

// The table's gradient: those of all (b, h), summed in order.
at::Tensor reduced(const Prepared& p, On on, const OptionalTensor& table, int64_t batch, int64_t heads, float factor) {
  if (!table.has_value()) return at::empty({0});
  const bool transposed = on != On::kValues && !p.encoding.bias;
  const int64_t width = transposed ? table->size(1) : on == On::kValues ? table->size(2) : p.encoding.buckets;
  const at::Tensor cut = p.grad.narrow(-1, 0, width);
  at::Tensor sum = p.encoding.shared ? cut.sum(0, /*keepdim=*/true) : cut.unflatten(0, {batch, heads}).sum(0);
  if (transposed) sum = sum.transpose(1, 2);
  if (!p.encoding.bias && factor != 1) sum = sum.mul(factor);
  at::Tensor grad = at::zeros(table->sizes(), table->options());
  grad.narrow(p.bucket_dim, p.first_bucket, p.encoding.buckets).copy_(sum);
  return grad;
}

// Everything the kernels read, kept alive.
struct Call {
  AttentionArgs args = {};
  at::Tensor q, k, v, key_mask, mask;
  Prepared on_q, on_k, on_v;
};

void check_inputs(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double dropout_p, const OptionalTensor& seed) {
  TORCH_CHECK_VALUE(q.dim() == 4 && q.sizes() == k.sizes() && q.sizes() == v.sizes(),
                    "irpe::attention: q, k and v must be (B, H, L, D) of one shape, got ", q.sizes(), ", ", k.sizes(), " and ",
                    v.sizes());
  TORCH_CHECK_VALUE(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                        (q.scalar_type() == at::kFloat || q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16),
                    "irpe::attention: q, k and v must all be float32, float16 or bfloat16, got ", q.scalar_type(), ", ",
                    k.scalar_type(), " and ", v.scalar_type());
  TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p < 1, "irpe::attention: dropout_p must be in [0, 1), got ", dropout_p);
  TORCH_CHECK_VALUE(dropout_p == 0 || (seed.has_value() && seed->numel() == 1 && seed->scalar_type() == at::kLong),
                    "irpe::attention: dropout needs a seed, an int64 tensor of one element");
}

// Queries per tile: as many as keep their scores within `bytes`, in tiles of about equal size.
int64_t tile_rows(int64_t length, int64_t row_bytes, int64_t bytes) {
  const int64_t step = kernels().block_rows;
  const int64_t most = std::max<int64_t>(step, bytes / row_bytes / step * step);
  const int64_t tiles = (length + most - 1) / most;
  return rounded_up((length + tiles - 1) / tiles, step);
}

void fill(Call& c, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& table_q,
          const OptionalTensor& table_k, const OptionalTensor& table_v, at::TensorList index_q, at::TensorList index_k,
          at::TensorList index_v, const OptionalTensor& key_padding_mask, const OptionalTensor& attn_mask,
          const OptionalTensor& seed, double scale, double dropout_p, bool backward) {
  check_inputs(q, k, v, dropout_p, seed);
  AttentionArgs& a = c.args;
  a.batch = q.size(0), a.heads = q.size(1), a.length = q.size(2), a.head_dim = q.size(3);
  a.padded = rounded_up(a.length, 16);
  a.scale = static_cast<float>(scale);
  c.q = as_float_rows(q), c.k = as_float_rows(k), c.v = as_float_rows(v);
  a.q = rows_of(c.q), a.k = rows_of(c.k), a.v = rows_of(c.v);
  prepare(c.on_q, "table_q", On::kQueries, table_q, index_q, q, a.scale, backward);
  prepare(c.on_k, "table_k", On::kKeys, table_k, index_k, q, 1, backward);
  prepare(c.on_v, "table_v", On::kValues, table_v, index_v, q, 1, backward);
  a.on_q = c.on_q.encoding, a.on_k = c.on_k.encoding, a.on_v = c.on_v.encoding;
  a.width = rounded_up(a.length + std::max(a.on_k.buckets, a.on_v.buckets) + 2 * kLookupLanes, 16);
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  const auto options = q.options().dtype(at::kFloat);
  if (key_padding_mask.has_value()) {
    TORCH_CHECK_VALUE(key_padding_mask->scalar_type() == at::kBool &&
                          key_padding_mask->sizes() == at::IntArrayRef({a.batch, a.length}),
                      "irpe::attention: key_padding_mask must be bool and (B, L), got ", key_padding_mask->scalar_type(), " ",
                      key_padding_mask->sizes());
    c.key_mask = padded(at::zeros({a.batch, a.length}, options).masked_fill_(*key_padding_mask, minus_infinity), a.padded);
    a.key_mask = c.key_mask.data_ptr<float>();
  }
  if (attn_mask.has_value()) {
    c.mask = attn_mask->scalar_type() == at::kBool
                 ? at::zeros(attn_mask->sizes(), options).masked_fill_(*attn_mask, minus_infinity)
                 : attn_mask->to(at::kFloat);
    c.mask = c.mask.expand({a.batch, a.heads, a.length, a.length});
    a.mask = c.mask.const_data_ptr<float>();
    for (int dim = 0; dim < 4; ++dim) a.mask_stride[dim] = c.mask.stride(dim);
  }
  a.dropout_p = static_cast<float>(dropout_p);
  if (dropout_p > 0) a.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
}

// Runs `kernel` on each thread's share of [0, count), with scratch memory per thread.
template <class Kernel>
void in_parallel(const AttentionArgs& args, bool backward, int64_t count, Kernel kernel) {
  const int64_t bytes = kernels().attention_scratch(args, backward);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    at::Tensor scratch = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
    kernel(args, begin, end, static_cast<char*>(scratch.data_ptr()));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& table_q, const OptionalTensor& table_k,
    const OptionalTensor& table_v, at::TensorList index_q, at::TensorList index_k, at::TensorList index_v,
    const OptionalTensor& key_padding_mask, const OptionalTensor& attn_mask, const OptionalTensor& seed, double scale,
    double dropout_p, bool keep, bool keep_probs) {
  Call c;
  AttentionArgs& a = c.args;
  fill(c, q, k, v, table_q, table_k, table_v, index_q, index_k, index_v, key_padding_mask, attn_mask, seed, scale, dropout_p, false);
  const int64_t matrices = a.batch * a.heads;
  const auto options = q.options().dtype(at::kFloat);
  // Laid out as (B, L, H, D), so that the projection that follows needs no copy.
  at::Tensor out = at::empty({a.batch, a.length, a.heads, a.head_dim}, options).transpose(1, 2);
  at::Tensor stats = at::empty({keep ? matrices * a.length * 2 : 0}, options);
  at::Tensor probs = at::empty({keep && keep_probs ? matrices * a.length * a.padded + 16 : 0}, options);
  // Room for every bucket, as in the fake kernel, which cannot see the ids.
  const int64_t sums_width = keep && a.on_v.parts ? rounded_up(table_v->size(1), 16) : 0;
  at::Tensor sums = at::empty({matrices * a.length * sums_width}, options);
  if (a.on_v.padded < sums_width) sums.zero_();
  if (q.numel() > 0) {
    a.out = rows_of(out);
    if (keep) a.stats = stats.data_ptr<float>();
    if (keep && keep_probs) a.probs = probs.data_ptr<float>();
    if (a.probs) std::fill_n(a.probs + probs.numel() - 16, 16, 0.0f);
    if (keep && a.on_v.parts) a.sums = sums.data_ptr<float>();
    a.tile = tile_rows(a.length, a.width * 4, 80 << 10);
    in_parallel(a, false, matrices * ((a.length + a.tile - 1) / a.tile), kernels().attention_forward);
  }
  return {out.to(q.scalar_type()), stats, probs, sums};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor&, const at::Tensor& stats, const at::Tensor& probs, const at::Tensor& sums,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& table_q, const OptionalTensor& table_k,
    const OptionalTensor& table_v, at::TensorList index_q, at::TensorList index_k, at::TensorList index_v,
    const OptionalTensor& key_padding_mask, const OptionalTensor& attn_mask, const OptionalTensor& seed, double scale,
    double dropout_p) {
  Call c;
  AttentionArgs& a = c.args;
  fill(c, q, k, v, table_q, table_k, table_v, index_q, index_k, index_v, key_padding_mask, attn_mask, seed, scale, dropout_p, true);
  const int64_t matrices = a.batch * a.heads;
  at::Tensor grad_qkv = at::empty({a.batch, a.length, 3, a.heads, a.head_dim}, q.options().dtype(at::kFloat));
  if (q.numel() > 0) {
    const at::Tensor grad = as_float_rows(grad_out);
    a.grad_out = rows_of(grad);
    const auto part = [&](int64_t i) { return rows_of(grad_qkv.select(2, i).transpose(1, 2)); };
    a.grad_q = part(0), a.grad_k = part(1), a.grad_v = part(2);
    a.stats = stats.data_ptr<float>();
    if (probs.numel() > 0) a.probs = probs.data_ptr<float>();
    if (a.on_v.parts) a.sums = sums.data_ptr<float>();
    a.tile = tile_rows(a.length, a.width * 8, 384 << 10);
    in_parallel(a, true, matrices, kernels().attention_backward);
  }
  return {grad_qkv.to(q.scalar_type()),
          reduced(c.on_q, On::kQueries, table_q, a.batch, a.heads, a.scale),
          reduced(c.on_k, On::kKeys, table_k, a.batch, a.heads, 1),
          reduced(c.on_v, On::kValues, table_v, a.batch, a.heads, 1)};
}

}  // namespace
}  // namespace irpe

#define INPUTS                                                                                                  \
  "Tensor q, Tensor k, Tensor v, Tensor? table_q, Tensor? table_k, Tensor? table_v, Tensor[] index_q, "        \
  "Tensor[] index_k, Tensor[] index_v, Tensor? key_padding_mask, Tensor? attn_mask, Tensor? seed, float scale, " \
  "float dropout_p"

TORCH_LIBRARY_FRAGMENT(irpe, m) {
  m.def("attention(" INPUTS ", bool keep, bool keep_probs) -> (Tensor out, Tensor stats, Tensor probs, Tensor sums)");
  m.def("attention_backward(Tensor grad_out, Tensor out, Tensor stats, Tensor probs, Tensor sums, " INPUTS
        ") -> (Tensor grad_qkv, Tensor grad_table_q, Tensor grad_table_k, Tensor grad_table_v)");
}

TORCH_LIBRARY_IMPL(irpe, CPU, m) {
  m.impl("attention", irpe::attention_cpu);
  m.impl("attention_backward", irpe::attention_backward_cpu);
}
