// One vector of fp32 as wide as the instruction set this file is compiled for, in the compilers' portable vector
// extension. Everything is in an anonymous namespace: the same source is compiled once per instruction set, and no
// function of one may be taken for another's by the linker.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }

// Writes to memory past the caches, where the set has instructions for it; p is a multiple of the vector's size.
inline void stream(float* p, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(x));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(x));
#else
  store(p, x);
#endif
}

// Streamed values are there for other threads once this has run.
inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

inline Vec broadcast(float x) {
#if defined(__AVX512F__)
  return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif defined(__AVX2__)
  return Vec{x, x, x, x, x, x, x, x};
#else
  return Vec{x, x, x, x};
#endif
}

// a > b ? a : b. A NaN in b stays, one in a is lost: see has_nan.
inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)  // compilers make two operations of the rule; the mask keeps GCC 12 from a false warning
  const auto x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  return reinterpret_cast<Vec>(_mm512_mask_max_ps(x, 0xffff, x, y));
#else
  return a > b ? a : b;
#endif
}

inline float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float widen(float x) { return x; }

struct Fp16 {  // IEEE's half precision
  uint16_t bits;
};

// bf16 is the upper half of fp32: kLanes pairs of neighbours, and the fp32 vectors of the first and second of each.
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
inline Vec load_pairs(const uint16_t* p) {
  Vec pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return pairs;
}
inline Vec widen_first(Vec pairs) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(pairs) << 16); }
inline Vec widen_second(Vec pairs) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(pairs) & 0xffff0000u); }

// kLanes numbers of 16 bits to and from 32. GCC 12 splits __builtin_convertvector into halves of vectors, at a multiple
// of the cost; it warns of the forms of the instructions without a mask, and leaves out a mask of ones.
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
inline Bits load_halves(const void* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, Bits);
#endif
}
inline Halves lower_halves(Bits bits) {  // of numbers below 2^16
#if defined(__AVX512F__)
  return reinterpret_cast<Halves>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(bits);
  return reinterpret_cast<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
#else
  return __builtin_convertvector(bits, Halves);
#endif
}

// kLanes numbers that are stored as bf16, and a vector rounded to nearest even and stored so. A NaN stays one.
inline Vec load(const uint16_t* p) { return reinterpret_cast<Vec>(load_halves(p) << 16); }
inline Halves round_to_halves(Vec x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return lower_halves(x == x ? rounded : (bits >> 16) | 0x40u);
#endif
}
inline void store(uint16_t* p, Vec x) {
  const Halves halves = round_to_halves(x);
  std::memcpy(p, &halves, sizeof halves);
}
inline void stream(uint16_t* p, Vec x) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(round_to_halves(x)));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(round_to_halves(x)));
#else
  store(p, x);
#endif
}

// fp16 has 5 bits of exponent, fp32 8: moved there, a number is too small by 2^112, also one below the normal numbers.
inline Vec load(const Fp16* p) {
  const Bits bits = load_halves(p);
  const Vec magnitude = reinterpret_cast<Vec>((bits & 0x7fffu) << 13) * broadcast(0x1p112f);
  const Bits special = reinterpret_cast<Bits>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;  // infinity, NaN
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(magnitude) | special | (bits & 0x8000u) << 16);
}
inline float widen(Fp16 x) {
  Fp16 lanes[kLanes] = {x};
  return load(lanes)[0];
}
inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u);
}

// rows[i][j] becomes rows[j][i]: log2(kLanes) rounds of interleaving the first half of the rows with the second.
template <int... kLane>
inline Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kLanes)...);
}
template <int... kLane>
inline Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLanes / 2 + kLane / 2 + kLane % 2 * kLanes)...);
}
inline void transpose(Vec rows[kLanes]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2], Lanes{});
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2], Lanes{});
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

template <int kShift, int... kLane>
inline Vec rotate(Vec v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, ((kLane + kShift) % kLanes)...);
}

// f over all lanes, of the halves first.
template <typename F>
inline float fold(Vec v, const F& f) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  if constexpr (kLanes > 8) v = f(v, rotate<8>(v, Lanes{}));
  if constexpr (kLanes > 4) v = f(v, rotate<4>(v, Lanes{}));
  v = f(v, rotate<2>(v, Lanes{}));
  return f(v, rotate<1>(v, Lanes{}))[0];
}
inline float sum(Vec v) {
  return fold(v, [](Vec a, Vec b) { return a + b; });
}
inline float max_lane(Vec v) {
  return fold(v, [](Vec a, Vec b) { return maximum(a, b); });
}

// exp(x) for x <= 0 (and NaN), to about 1 ulp: x = n log 2 + r with |r| <= log(2) / 2, a polynomial in r, times 2^n.
// Where 2^n would leave the normal numbers, below -87.7, it is 0, and so is the result. Coefficients: Cephes expf.
inline Vec exp_nonpositive(Vec x) {
  const Vec clamped = maximum(broadcast(-88.0f), x);  // where n is -127
  const Vec shifter = broadcast(12582912.0f);         // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec shifted = clamped * broadcast(1.44269504088896341f) + shifter;
  const Vec n = shifted - shifter;
  Vec r = clamped - n * broadcast(0.693359375f);
  r = r + n * broadcast(2.12194440e-4f);
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + broadcast(1.3981999507e-3f);
  p = p * r + broadcast(8.3334519073e-3f);
  p = p * r + broadcast(4.1665795894e-2f);
  p = p * r + broadcast(1.6666665459e-1f);
  p = p * r + broadcast(5.0000001201e-1f);
  p = p * r * r + r + broadcast(1.0f);
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127 << 23);  // the low bits of `shifted` are n; 2^n as fp32, 0 for n = -127
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

template <int kCount, typename F>
inline void for_each(const F& f) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) f(i);
}

// 2^x for several x <= 0 (and NaN) at once, step by step, so that none waits for its own last step: x = n + f with
// |f| <= 1/2, a polynomial in f, times 2^n. Below -126.5 at the latest, where 2^n would leave the normal numbers, it is
// 0, and at 0 it is 1. Coefficients from the highest down; that of degree 0 is 1.
template <int kDegree, int kVectors>
inline void exp2_nonpositive(Vec (&x)[kVectors], const float (&coefficients)[kDegree]) {
  Vec f[kVectors], p[kVectors];
#if defined(__AVX512DQ__)  // has x - n, and times 2^n
  for_each<kVectors>([&](int i) {
    constexpr int kToInteger = 8;  // rounds to the nearest, reports nothing
    f[i] = reinterpret_cast<Vec>(_mm512_reduce_ps(reinterpret_cast<__m512>(x[i]), kToInteger));
  });
#else
  const Vec shifter = broadcast(12582912.0f + 127.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  Vec shifted[kVectors];
  for_each<kVectors>([&](int i) { x[i] = maximum(broadcast(-127.0f), x[i]); });
  for_each<kVectors>([&](int i) { shifted[i] = x[i] + shifter; });
  for_each<kVectors>([&](int i) { f[i] = shifted[i] - shifter; });
  for_each<kVectors>([&](int i) { f[i] = x[i] - f[i]; });
#endif
  for_each<kVectors>([&](int i) { p[i] = broadcast(coefficients[0]); });
#pragma GCC unroll 8
  for (int k = 1; k < kDegree; ++k) {
    for_each<kVectors>([&](int i) { p[i] = p[i] * f[i] + broadcast(coefficients[k]); });
  }
  for_each<kVectors>([&](int i) { p[i] = p[i] * f[i] + broadcast(1.0f); });
#if defined(__AVX512DQ__)
  for_each<kVectors>([&](int i) {
    const auto from = reinterpret_cast<__m512>(x[i]), n = reinterpret_cast<__m512>(x[i] - f[i]);
    const __mmask16 is_normal = _mm512_cmp_ps_mask(from, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // or NaN
    x[i] = reinterpret_cast<Vec>(_mm512_maskz_scalef_ps(is_normal, reinterpret_cast<__m512>(p[i]), n));
  });
#else
  for_each<kVectors>([&](int i) { x[i] = p[i] * reinterpret_cast<Vec>(reinterpret_cast<IntVec>(shifted[i]) << 23); });
#endif
}

template <int kVectors>
inline void exp2_nonpositive(Vec (&x)[kVectors]) {  // to 0.7 ulp
  static constexpr float kCoefficients[] = {1.53533620e-4f, 1.33988739e-3f, 9.61843692e-3f,
                                            5.55033237e-2f, 2.40226477e-1f, 6.93147182e-1f};
  exp2_nonpositive(x, kCoefficients);
}
template <int kVectors>
inline void exp2_coarse(Vec (&x)[kVectors]) {  // to 3e-6, for what is rounded to bf16
  static constexpr float kCoefficients[] = {9.58285294e-3f, 5.59064262e-2f, 2.40240991e-1f, 6.93124175e-1f};
  exp2_nonpositive(x, kCoefficients);
}

}  // namespace
