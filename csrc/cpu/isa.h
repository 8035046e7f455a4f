// The operations of the CPU backend, compiled once per instruction set from the same source and chosen at run time.
//
// kernels_isa.cpp is compiled with the flags of each set and gives one table. All it defines besides is in anonymous
// namespaces; templates of the standard library that it shares with other files are taken by the linker from the first
// object that has them, so CMakeLists.txt lists the objects for the plain instruction set first.
#pragma once

#include "elementwise.h"
#include "linear.h"
#include "option_logprobs.h"
#include "peak.h"
#include "prefix_attention.h"

namespace psykern {

struct Kernels {
  const char* name;
  bool multiplies_bf16;  // as it is; else it is widened
  void (*option_logprobs)(const OptionLogprobs&, int num_threads);
  void (*prefix_attention)(const PrefixAttention&, int num_threads);
  void (*add_rms_norm)(const AddRmsNorm&, int num_threads);
  void (*qk_norm_rope)(const QkNormRope&, int num_threads);
  void (*silu_mul)(const SiluMul&, int num_threads);
  void (*add_weighted)(const AddWeighted&, int num_threads);
  void (*linear)(const Linear&, int num_threads);
  double (*peak)(const Peak&, int num_threads);  // gives the floating-point operations done
};

extern const Kernels kPortableKernels;
#ifdef PSYKERN_X86_KERNELS
extern const Kernels kAvx2Kernels;    // AVX2 and FMA
extern const Kernels kAvx512Kernels;  // AVX-512 F, BW, DQ, VL
#endif
#ifdef PSYKERN_AVX512_BF16_KERNELS
extern const Kernels kAvx512Bf16Kernels;  // and BF16: products of pairs of bf16, summed in fp32
#endif
#ifdef PSYKERN_AMX_KERNELS
extern const Kernels kAmxKernels;  // and AMX: products of tiles of bf16, summed in fp32
#endif

inline constexpr const char* kKernelNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};  // slowest first

// The fastest set for this machine, or the one of kKernelNames that `name` asks for. Throws std::invalid_argument
// where the machine or the build does not have it.
const Kernels& kernels(const char* name = nullptr);

}  // namespace psykern
