#include "isa.h"

#include <stdexcept>
#include <string>

namespace psykern {

const Kernels& kernels(const char* name) {
  const std::string wanted = name == nullptr ? "" : name;
#ifdef PSYKERN_X86_KERNELS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (wanted.empty() || wanted == kAvx512Kernels.name)) return kAvx512Kernels;
  if (avx2 && (wanted.empty() || wanted == kAvx2Kernels.name)) return kAvx2Kernels;
#endif
  if (wanted.empty() || wanted == kPortableKernels.name) return kPortableKernels;
  throw std::invalid_argument("instruction set: this machine or build does not have '" + wanted + "'");
}

}  // namespace psykern
