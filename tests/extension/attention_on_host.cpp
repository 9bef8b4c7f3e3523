// SPDX-License-Identifier: Apache-2.0
// cuda/attention_cuda.cpp on CPU tensors, as the operators irpe_on_host::*; cuda_emulator.h runs its kernels.
#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

// What the included file takes from c10/cuda; test_cuda_attention.py cuts its includes, and puts CPU for CUDA.
#define C10_CUDA_CHECK(error) TORCH_CHECK((error) == cudaSuccess)
namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda

#include "attention_cuda.cpp"
