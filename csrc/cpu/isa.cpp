#include "isa.h"

#include <stdexcept>
#include <string>

#ifdef PSYKERN_AMX_KERNELS
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace psykern {
namespace {

#ifdef PSYKERN_AMX_KERNELS
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBf16) != 0 && (edx & kTiles) != 0;
}

// Linux gives a process the tile registers when it asks for them; threads that are begun later have them too.
bool ask_for_tiles() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const Kernels& kernels(const char* name) {
  const std::string wanted = name == nullptr ? "" : name;
  const auto is_wanted = [&](const Kernels& kernels) { return wanted.empty() || wanted == kernels.name; };
#ifdef PSYKERN_X86_KERNELS
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef PSYKERN_AVX512_BF16_KERNELS
  static const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef PSYKERN_AMX_KERNELS
  static const bool amx = avx512_bf16 && has_amx() && ask_for_tiles();
  if (amx && is_wanted(kAmxKernels)) return kAmxKernels;
#endif
  // Intel's cores multiply pairs of bf16 in vectors at half the rate of fp32, for they have tiles (measured on a Xeon
  // of 2023: 0.64 of the fp32 product's rate). Where the tiles are not given, fp32 is faster.
  static const bool halves_rate = __builtin_cpu_is("intel");
  if (avx512_bf16 && (wanted.empty() ? !halves_rate : is_wanted(kAvx512Bf16Kernels))) return kAvx512Bf16Kernels;
#endif
  if (avx512 && is_wanted(kAvx512Kernels)) return kAvx512Kernels;
  if (avx2 && is_wanted(kAvx2Kernels)) return kAvx2Kernels;
#endif
  if (is_wanted(kPortableKernels)) return kPortableKernels;
  throw std::invalid_argument("instruction set: this machine or build does not have '" + wanted + "'");
}

}  // namespace psykern
