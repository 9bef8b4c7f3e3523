// SPDX-License-Identifier: Apache-2.0
// The interface between attention_cuda.cpp and the kernels of attention. Neither includes torch.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

namespace irpe {

constexpr int kHeadDim = 64;      // of queries, keys and values
constexpr int kMostBuckets = 56;  // of a map; bucket sums have this many columns

// (batch, heads, length, columns) in half precision: columns adjacent, rows and strides multiples of 16 bytes.
struct Heads {
  void* data;
  int64_t batch_stride;
  int head_stride, row_stride;  // in elements, as batch_stride; so small that length * row_stride fits
};

// A table of `buckets` vectors of kHeadDim for each head, in any layout. data == nullptr: no encoding of this kind.
struct Table {
  const void* data;
  int64_t head_stride, bucket_stride, dim_stride;  // in elements; head_stride 0: shared by all heads
  bool is_float;                                   // fp32, else the type of q
};

// Ids of a (length, length) map, padded with zeros to M x M blocks of 16 x 16, in the order in which the lanes of a warp read
// them: (M, M, 32 lanes, 8 bytes). Lane 4 g + t reads [columns 0-7, 8-15][rows g, g + 8][columns 2 t, 2 t + 1] of its block.
struct Ids {
  const uint2* by_query;  // of map[own][other]
  const uint2* by_key;    // of map[other][own]
};

struct AttentionCall {
  int batch, heads, length, buckets;
  bool is_bfloat16;  // else fp16
  float scale;       // > 0
  Heads q, k, v, out;
  Table on_q, on_k, on_v;  // on_k; on_q and on_k; or all three
  Ids ids;
  Heads sums;       // weights summed by bucket, kMostBuckets columns; only with on_v
  float* log_sums;  // (batch, heads, length): log2 of the softmax's divisors
  // Backward only; the gradients of lookups have kMostBuckets columns.
  Heads grad_out, grad_q, grad_k, grad_v, grad_lookup_q, grad_lookup_k;  // grad_lookup_q: of rows of keys
  void* grad_scores;  // room for the gradients of the scores of `planes` heads of images, `bytes_of_scores` for each
  int planes;
};

// Of a head of an image.
inline int64_t bytes_of_scores(int length) {
  const int64_t blocks = (length + 15) / 16;
  return blocks * blocks * 512;
}

// Both return an error if this build has no code for the device, or the device has too little shared memory.
cudaError_t launch_attention(const AttentionCall& call, cudaStream_t stream);
cudaError_t launch_attention_backward(const AttentionCall& call, cudaStream_t stream);

// A table's gradient: the sum of x[b, h, l, d] * grad[b, h, l, n] over all (b, l), for each head h, or over all heads too.
struct TableGradient {
  Heads x, grad;   // grad has kMostBuckets columns
  int tables;      // heads, or 1
  bool of_values;  // then out is (tables, buckets, kHeadDim)
  float* out;      // (tables, kHeadDim, buckets)
};

struct TableGradients {
  TableGradient all[3];
  int count;
};

// Room for partial sums, and the gradients.
int64_t floats_of_parts(const TableGradients& gradients);
cudaError_t launch_table_gradients(const TableGradients& gradients, int batch, int heads, int length, int buckets,
                                   bool is_bfloat16, float* parts, cudaStream_t stream);

}  // namespace irpe
