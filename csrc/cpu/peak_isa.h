// peak for one instruction set; included once per set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "peak.h"
#include "product_isa.h"
#include "simd.h"

namespace {

constexpr int64_t kPeakSteps = 16384;  // of a block
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPeakSums = 24;  // more than a multiply-add's latency times the units, fewer than the registers
#else
constexpr int kPeakSums = 12;
#endif

// Sums start apart, or the compiler would keep one of them; they go to 1, so no number is slow or infinite.
double add_up_fp32(float start) {
  Vec sums[kPeakSums];
  for (int i = 0; i < kPeakSums; ++i) sums[i] = broadcast(start + static_cast<float>(i));
  const Vec half = broadcast(0.5f);
  for (int64_t step = 0; step < kPeakSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kPeakSums; ++i) sums[i] = sums[i] * half + half;
  }
  Vec total{};
  for (int i = 0; i < kPeakSums; ++i) total += sums[i];
  return static_cast<double>(sum(total));
}
constexpr double kFp32Flops = 2.0 * kPeakSteps * kPeakSums * kLanes;  // of a block

#if defined(__AMX_BF16__)
double add_up_bf16(float start) {
  float tile[16 * 16] = {start};
  uint16_t ones[16 * 32];
  std::fill_n(ones, 16 * 32, narrow(1.0f));
  const Bf16Product::Session session;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t step = 0; step < kPeakSteps / 16; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, tile, 64);
  return static_cast<double>(tile[0]);
}
constexpr double kBf16Flops = 2.0 * (kPeakSteps / 16) * 4 * 16 * 16 * 32;

#elif defined(__AVX512BF16__)
double add_up_bf16(float start) {
  __m512 sums[kPeakSums];
  for (int i = 0; i < kPeakSums; ++i) sums[i] = _mm512_set1_ps(start + static_cast<float>(i));
  const auto ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f));
  for (int64_t step = 0; step < kPeakSteps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kPeakSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], ones, ones);
  }
  Vec total{};
  for (int i = 0; i < kPeakSums; ++i) total += reinterpret_cast<Vec>(sums[i]);
  return static_cast<double>(sum(total));
}
constexpr double kBf16Flops = 2.0 * kPeakSteps * kPeakSums * kLanes * 2;

#else
double add_up_bf16(float start) { return static_cast<double>(start); }
constexpr double kBf16Flops = 0.0;  // this set multiplies no bf16
#endif

// The floating-point operations that were done; 0 where the set has no product of the type.
double peak_isa(const psykern::Peak& p, int num_threads) {
  const bool is_fp32 = p.type == FloatType::kFloat32;
  if (!is_fp32 && kBf16Flops == 0.0) return 0.0;
  psykern::parallel_for(p.num_blocks, num_threads, [is_fp32](int64_t block) {
    const volatile double kept = is_fp32 ? add_up_fp32(static_cast<float>(block)) : add_up_bf16(1.0f);
    static_cast<void>(kept);
  });
  return static_cast<double>(p.num_blocks) * (is_fp32 ? kFp32Flops : kBf16Flops);
}

}  // namespace
