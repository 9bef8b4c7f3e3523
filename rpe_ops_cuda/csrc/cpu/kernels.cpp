// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs: chosen once, by cpuid, and changed by set_cpu_capability (for tests).
#include "kernels.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace irpe {
namespace {

const Kernels* runnable(const std::string& name) {
  if (name == "generic") return generic_kernels();
#ifdef __x86_64__
  __builtin_cpu_init();
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2_kernels();
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return avx512_kernels();
#endif
  return nullptr;
}

const Kernels* best() {
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* found = runnable(name)) return found;
  return generic_kernels();
}

const Kernels* chosen(const std::string& name) {
  if (name.empty()) return best();
  TORCH_CHECK_VALUE(name == "generic" || name == "avx2" || name == "avx512",
                    "CPU capability '", name, "': expected one of generic, avx2, avx512, or nothing for the best one");
  const Kernels* found = runnable(name);
  TORCH_CHECK_VALUE(found != nullptr, "CPU capability '", name, "': this processor lacks it; the best one here is ",
                    best()->name);
  return found;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* now = current.load();
  if (now == nullptr) {
    const char* wanted = std::getenv("IRPE_CPU_CAPABILITY");
    current = now = chosen(wanted ? wanted : "");
  }
  return *now;
}

}  // namespace irpe

TORCH_LIBRARY_FRAGMENT(irpe, m) {
  m.def("cpu_capability() -> str", [] { return std::string(irpe::kernels().name); });
  m.def("set_cpu_capability(str name) -> ()", [](const std::string& name) { irpe::current = irpe::chosen(name); });
}
