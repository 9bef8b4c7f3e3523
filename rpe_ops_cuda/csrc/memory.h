// Tensors too large for the C library to keep.
#pragma once
#include <ATen/core/Tensor.h>

namespace irpe {

// at::empty for a CPU tensor, in pages of 2 MB where the system grants them on request. The C library takes blocks of 32 MB
// and more from the system anew each time, and faulting them in by pages of 4 KB costs several times what filling them does.
at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace irpe
