#include "memory.h"

#include <ATen/ops/empty.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace irpe {

at::Tensor empty_in_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor x = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20, kKept = 32 << 20;
  if (x.nbytes() >= kKept) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(x.data_ptr()), end = begin + x.nbytes();
    const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a refusal changes nothing but the time
  }
#endif
  return x;
}

}  // namespace irpe
