// SPDX-License-Identifier: Apache-2.0
// cuda/attention_cuda.cpp on CPU tensors, as the operators irpe_on_host::*, around loops in place of the kernels: what
// it passes to them (addresses, strides, ids by lane, tables) and makes of their results is then tested without a GPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

// What the included file takes from c10/cuda; test_cuda_attention.py cuts its includes.
#define C10_CUDA_CHECK(error) TORCH_CHECK((error) == cudaSuccess)
namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda

#define irpe irpe_on_host
#define CUDA CPU
#include "attention_cuda.cpp"
#undef CUDA

namespace irpe {

template <class T>
T* row(const Heads& x, int batch, int head, int token) {
  T* found = static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride + token * x.row_stride;
  TORCH_CHECK(reinterpret_cast<uintptr_t>(found) % 16 == 0, "a row is not aligned");
  return found;
}

template <class T>
float product(const T* x, const T* y) {
  float sum = 0;
  for (int d = 0; d < kHeadDim; ++d) sum += float(x[d]) * float(y[d]);
  return sum;
}

template <class T>
float entry(const Table& table, int head, int bucket, int dim) {
  const int64_t place = head * table.head_stride + bucket * table.bucket_stride + dim * table.dim_stride;
  return table.is_float ? static_cast<const float*>(table.data)[place] : float(static_cast<const T*>(table.data)[place]);
}

template <class T>
float product(const T* x, const Table& table, int head, int bucket) {
  float sum = 0;
  for (int d = 0; table.data && d < kHeadDim; ++d) sum += float(x[d]) * entry<T>(table, head, bucket, d);
  return sum;
}

int of_lane(const AttentionCall& c, const uint2* layout, int own, int other, int lane, int byte) {
  const int64_t blocks = (c.length + 15) / 16;
  return reinterpret_cast<const uint8_t*>(layout + (own / 16 * blocks + other / 16) * 32 + lane)[byte];
}

int by_lane(const AttentionCall& c, const uint2* layout, int own, int other) {
  const int lane = own % 8 * 4 + other % 8 / 2;
  return of_lane(c, layout, own, other, lane, other / 8 % 2 * 4 + own / 8 % 2 * 2 + other % 2);
}

// The id of a pair, as both layouts must have it.
int id_of(const AttentionCall& c, int query, int key) {
  const int id = by_lane(c, c.ids.by_query, query, key);
  TORCH_CHECK(id == by_lane(c, c.ids.by_key, key, query), "by_key differs");
  return id;
}

template <class T>
float score(const AttentionCall& c, int b, int h, int query, int key) {
  const T *q = row<T>(c.q, b, h, query), *k = row<T>(c.k, b, h, key);
  return c.scale * (product(q, k) + product(q, c.on_k, h, id_of(c, query, key)) + product(k, c.on_q, h, id_of(c, key, query)));
}

template <class T>
void forward(const AttentionCall& c, int b, int h) {
  std::vector<float> scores(c.length);
  for (int i = 0; i < c.length; ++i) {
    float sum = 0, sums[kMostBuckets] = {};
    for (int j = 0; j < c.length; ++j) sum += std::exp2(scores[j] = score<T>(c, b, h, i, j) * 1.44269504f);
    const float log_sum = c.log_sums[(b * c.heads + h) * c.length + i] = std::log2(sum);
    for (int j = 0; j < c.length; ++j) sums[id_of(c, i, j)] += std::exp2(scores[j] - log_sum);
    for (int d = 0; d < kHeadDim; ++d) {
      float result = 0;
      for (int j = 0; j < c.length; ++j) result += std::exp2(scores[j] - log_sum) * float(row<T>(c.v, b, h, j)[d]);
      for (int n = 0; c.on_v.data && n < c.buckets; ++n) result += sums[n] * entry<T>(c.on_v, h, n, d);
      row<T>(c.out, b, h, i)[d] = result;
    }
    for (int n = 0; c.sums.data && n < kMostBuckets; ++n) row<T>(c.sums, b, h, i)[n] = sums[n];
  }
}

template <class T>
void backward(const AttentionCall& c, int b, int h) {
  using Rows = std::vector<std::vector<float>>;
  const std::vector<float> zeros(kHeadDim), nothing(kMostBuckets);
  Rows of_q(c.length, zeros), of_k(c.length, zeros), of_v(c.length, zeros), lookups_q(c.length, nothing), lookups_k(c.length, nothing);
  for (int i = 0; i < c.length; ++i) {
    const T *grad = row<T>(c.grad_out, b, h, i), *q = row<T>(c.q, b, h, i);
    const int place = (b * c.heads + h) * c.length + i;
    const float delta = c.deltas[place] = product<T>(grad, row<T>(c.out, b, h, i));
    for (int j = 0; j < c.length; ++j) {
      const int id = id_of(c, i, j), back = id_of(c, j, i);
      const T* k = row<T>(c.k, b, h, j);
      const float weight = std::exp2(score<T>(c, b, h, i, j) * 1.44269504f - c.log_sums[place]);
      const float of_weight = product<T>(grad, row<T>(c.v, b, h, j)) + product(grad, c.on_v, h, id);
      const float of_score = weight * (of_weight - delta) * c.scale;
      lookups_k[i][id] += of_score, lookups_q[j][back] += of_score;
      for (int d = 0; d < kHeadDim; ++d) {
        of_q[i][d] += of_score * (float(k[d]) + entry<T>(c.on_k, h, id, d));
        of_k[j][d] += of_score * (float(q[d]) + (c.on_q.data ? entry<T>(c.on_q, h, back, d) : 0));
        of_v[j][d] += weight * float(grad[d]);
      }
    }
  }
  const auto store = [&](const Heads& to, const Rows& rows) {
    for (int i = 0; to.data && i < c.length; ++i)
      for (size_t d = 0; d < rows[i].size(); ++d) row<T>(to, b, h, i)[d] = rows[i][d];
  };
  store(c.grad_q, of_q), store(c.grad_k, of_k), store(c.grad_v, of_v);
  store(c.grad_lookup_q, lookups_q), store(c.grad_lookup_k, lookups_k);
}

template <class T>
void run(const AttentionCall& c, bool back) {
  for (int plane = 0; plane < c.batch * c.heads; ++plane) (back ? backward<T> : forward<T>)(c, plane / c.heads, plane % c.heads);
}

cudaError_t launch_attention(const AttentionCall& c, cudaStream_t) {
  (c.is_bfloat16 ? run<c10::BFloat16> : run<c10::Half>)(c, false);
  return cudaSuccess;
}

cudaError_t launch_attention_backward(const AttentionCall& c, cudaStream_t) {
  (c.is_bfloat16 ? run<c10::BFloat16> : run<c10::Half>)(c, true);
  return cudaSuccess;
}

int table_gradient_parts(int batch, int) { return batch; }

template <class T>
void sum_table(const Heads& x, const Heads& grad, int batch, int heads, int length, bool shared, float* parts) {
  const int tables = shared ? 1 : heads, size = kHeadDim * kMostBuckets;
  std::fill_n(parts, batch * tables * size, 0.f);
  for (int b = 0; b < batch; ++b)
    for (int h = 0; h < heads; ++h)
      for (int l = 0; l < length; ++l)
        for (int i = 0; i < size; ++i)
          parts[(b * tables + (shared ? 0 : h)) * size + i] +=
              float(row<T>(x, b, h, l)[i / kMostBuckets]) * float(row<T>(grad, b, h, l)[i % kMostBuckets]);
}

cudaError_t launch_table_gradient(const Heads& x, const Heads& grad, int batch, int heads, int length, bool shared,
                                  bool is_bfloat16, float* parts, cudaStream_t) {
  (is_bfloat16 ? sum_table<c10::BFloat16> : sum_table<c10::Half>)(x, grad, batch, heads, length, shared, parts);
  return cudaSuccess;
}

}  // namespace irpe
