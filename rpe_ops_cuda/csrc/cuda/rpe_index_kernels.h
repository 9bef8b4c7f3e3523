// SPDX-License-Identifier: Apache-2.0
// The interface between rpe_index_cuda.cpp and the kernel files. Neither this nor they include torch, so they build fast.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace irpe {

enum class ValueType { kFloat, kDouble, kHalf, kBFloat16 };
enum class IdType { kUInt8, kInt32, kInt64 };

// A (batch, heads, rows, columns) tensor of any strides, counted in elements.
struct Strided {
  const void* data;
  int64_t batch, heads, rows, columns;
  int64_t batch_stride, head_stride, row_stride, column_stride;
};

// out[b, h, i, j] = input[b, h, i, index[i, j]].
// `index` is (input.rows, keys), `out` (batch, heads, rows, keys); both contiguous, `out` aligned to 16 bytes.
cudaError_t launch_rpe_index(const Strided& input, ValueType value_type, const void* index, IdType id_type,
                             int64_t keys, void* out, cudaStream_t stream);

// Whether the kernel walks this grad by columns: its warps then read a column of the ids at once.
inline bool ids_are_transposed(const Strided& grad) { return grad.column_stride != 1 && grad.columns != 1; }

// out[b, h, i, n] = sum of grad[b, h, i, j] over the j with index[i, j] == n, always added in the same order.
// `index` is (grad.rows, grad.columns), or transposed if `ids_are_transposed`, and `out` (batch, heads, rows, buckets);
// both contiguous. Sums in fp32 (double: fp64).
cudaError_t launch_rpe_index_adjoint(const Strided& grad, ValueType value_type, const void* index, IdType id_type,
                                     int64_t buckets, void* out, cudaStream_t stream);

// Whether this build has code for the current device: its binaries cover a few GPU generations.
bool has_code_for_this_device();

}  // namespace irpe
