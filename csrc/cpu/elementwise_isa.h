// The elementwise operations for one instruction set; included once per set by kernels_isa.cpp.
//
// Memory is read and written once: what a norm needs of a row a second time is still in the nearest cache. Rows are cut
// into fixed runs, one per task, and nothing crosses rows: the bits of a row depend neither on the number of threads
// nor on the other rows. All arithmetic is on whole vectors, the end of a row padded with zeros.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementwise.h"
#include "parallel.h"
#include "simd.h"

namespace {

using psykern::AddRmsNorm;
using psykern::QkNormRope;
using psykern::SiluMul;

constexpr int64_t kTaskFloats = 64 * 1024;  // of one array: some 30 us, much longer than it takes to hand out a task
constexpr int64_t kStreamedFloats = 6 * 1024 * 1024;  // of one array: more than a batch of the engine has
constexpr int kSums = 4;                              // vectors in flight; also the accumulators of a sum

// How much of a vector is there, and for a whole one whether it is written past the caches.
struct Whole {};
struct Streamed {};
struct Part {
  int64_t count;  // less than kLanes
};

inline Vec get(const float* p, Whole) { return load(p); }
inline Vec get(const float* p, Streamed) { return load(p); }
inline Vec get(const float* p, Part part) {
  Vec x = {};
  std::memcpy(&x, p, static_cast<size_t>(part.count) * sizeof(float));
  return x;
}
inline void put(float* p, Vec x, Whole) { store(p, x); }
inline void put(float* p, Vec x, Streamed) { stream(p, x); }
inline void put(float* p, Vec x, Part part) { std::memcpy(p, &x, static_cast<size_t>(part.count) * sizeof(float)); }

// step(i, slot, Full or Part) for the vectors from i on of [0, size), in order; neighbours have different slots.
template <typename Full = Whole, typename Step>
inline void for_vectors(int64_t size, const Step& step) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (int slot = 0; slot < kSums; ++slot) step(i + slot * kLanes, slot, Full{});
  }
  for (; i + kLanes <= size; i += kLanes) step(i, 0, Full{});
  if (i < size) step(i, 0, Part{size - i});
}

template <typename Rows>
void for_rows(int64_t num_rows, int64_t size, int num_threads, const Rows& row_kernel) {
  const int64_t run = std::max<int64_t>(kTaskFloats / std::max<int64_t>(size, 1), 1);
  psykern::parallel_for((num_rows + run - 1) / run, num_threads, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * run, num_rows);
    for (int64_t row = task * run; row < end; ++row) row_kernel(row);
    finish_streaming();
  });
}

// Whether an output of `num_rows` rows is written past the caches: a new array that is too large for them anyway. Its
// lines are then not read before they are written. Rows must begin at whole vectors.
inline bool is_streamed(const float* out, int64_t stride, int64_t num_rows, int64_t size, bool is_input) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(out) % sizeof(Vec) == 0 && stride % kLanes == 0;
  return !is_input && is_aligned && num_rows * size >= kStreamedFloats;
}

// 1 / sqrt(mean(s^2) + eps), the squares added up in kSums vectors.
inline float inverse_rms(const Vec (&squares)[kSums], int64_t size, float eps) {
  const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  return 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
}
inline float inverse_rms(const float* x, int64_t size, float eps) {
  Vec squares[kSums] = {};
  for_vectors(size, [&](int64_t i, int slot, auto lanes) {
    const Vec s = get(x + i, lanes);
    squares[slot] += s * s;
  });
  return inverse_rms(squares, size, eps);
}

// As in Llama and Qwen. kStoreSum: `summed` is wanted; the second loop then reads it, else it adds again.
template <bool kResidual, bool kStoreSum, typename Full>
void add_then_norm(const AddRmsNorm& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  const float* residual = kResidual ? p.residual + row * p.residual_stride : nullptr;
  float* normed = p.normed + row * p.normed_stride;
  float* summed = kStoreSum ? p.summed + row * p.summed_stride : nullptr;
  const auto add = [&](int64_t i, auto lanes) {
    return kResidual ? get(x + i, lanes) + get(residual + i, lanes) : get(x + i, lanes);
  };
  Vec squares[kSums] = {};
  for_vectors(p.size, [&](int64_t i, int slot, auto lanes) {
    const Vec s = add(i, lanes);
    if (kStoreSum) put(summed + i, s, lanes);
    squares[slot] += s * s;
  });
  if (p.normed == nullptr) return;
  const Vec scale = broadcast(inverse_rms(squares, p.size, p.eps));
  for_vectors<Full>(p.size, [&](int64_t i, int, auto lanes) {
    const Vec s = kStoreSum ? get(summed + i, lanes) : add(i, lanes);
    put(normed + i, s * scale * get(p.weight + i, lanes), lanes);
  });
}

// As in OLMo.
void norm_then_add(const AddRmsNorm& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  const float* residual = p.residual == nullptr ? nullptr : p.residual + row * p.residual_stride;
  float* normed = p.normed == nullptr ? nullptr : p.normed + row * p.normed_stride;
  float* summed = p.summed == nullptr ? nullptr : p.summed + row * p.summed_stride;
  const Vec scale = broadcast(inverse_rms(x, p.size, p.eps));
  for_vectors(p.size, [&](int64_t i, int, auto lanes) {
    const Vec norm = get(x + i, lanes) * scale * get(p.weight + i, lanes);
    const Vec total = residual == nullptr ? norm : get(residual + i, lanes) + norm;
    if (normed != nullptr) put(normed + i, norm, lanes);
    if (summed != nullptr) put(summed + i, total, lanes);
  });
}

template <typename Full>
auto choose_norm(const AddRmsNorm& p) {
  if (p.norm_first) return &norm_then_add;
  if (p.residual == nullptr) {
    return p.summed != nullptr ? &add_then_norm<false, true, Full> : &add_then_norm<false, false, Full>;
  }
  return p.summed != nullptr ? &add_then_norm<true, true, Full> : &add_then_norm<true, false, Full>;
}

void add_rms_norm_isa(const AddRmsNorm& p, int num_threads) {
  const bool in_place = p.normed == p.x || p.normed == p.residual;
  const bool streamed = is_streamed(p.normed, p.normed_stride, p.num_rows, p.size, in_place);
  auto* kernel = streamed ? choose_norm<Streamed>(p) : choose_norm<Whole>(p);
  for_rows(p.num_rows, p.size, num_threads, [&](int64_t row) { kernel(p, row); });
}

template <bool kNorm, typename Full>
void norm_and_rotate(const QkNormRope& p, int64_t row) {
  const float* x = p.x + row * p.x_stride;
  float* out = p.out + row * p.out_stride;
  const int64_t half = p.head_dim / 2, row_size = p.num_heads * p.head_dim;
  const float* cos = p.cos + p.positions[row] * half;
  const float* sin = p.sin + p.positions[row] * half;
  const bool whole_row = kNorm && p.weight_size == row_size;
  float inverse = whole_row ? inverse_rms(x, row_size, p.eps) : 1.0f;
  for (int64_t head = 0; head < row_size; head += p.head_dim) {
    if (kNorm && !whole_row) inverse = inverse_rms(x + head, p.head_dim, p.eps);
    const Vec scale = broadcast(inverse);
    const float* weight = p.weight + (whole_row ? head : 0);
    for_vectors<Full>(half, [&](int64_t i, int, auto lanes) {
      Vec low = get(x + head + i, lanes), high = get(x + head + half + i, lanes);
      if (kNorm) {
        low = low * scale * get(weight + i, lanes);
        high = high * scale * get(weight + half + i, lanes);
      }
      const Vec c = get(cos + i, lanes), s = get(sin + i, lanes);
      put(out + head + i, low * c - high * s, lanes);
      put(out + head + half + i, high * c + low * s, lanes);
    });
  }
}

void qk_norm_rope_isa(const QkNormRope& p, int num_threads) {
  const int64_t size = p.num_heads * p.head_dim;
  const bool whole_vectors = p.head_dim / 2 % kLanes == 0;  // where each half of a head begins
  const bool streamed = whole_vectors && is_streamed(p.out, p.out_stride, p.num_rows, size, p.out == p.x);
  auto* kernel = streamed ? &norm_and_rotate<false, Streamed> : &norm_and_rotate<false, Whole>;
  if (p.weight != nullptr) kernel = streamed ? &norm_and_rotate<true, Streamed> : &norm_and_rotate<true, Whole>;
  for_rows(p.num_rows, size, num_threads, [&](int64_t row) { kernel(p, row); });
}

// z / (1 + exp(-z)) with the exponential of -|z|, which does not overflow.
inline Vec silu(Vec z) {
  IntVec bits;
  std::memcpy(&bits, &z, sizeof bits);
  bits |= INT32_MIN;  // the sign: -|z|
  Vec negative;
  std::memcpy(&negative, &bits, sizeof negative);
  const Vec one = broadcast(1.0f), e = exp_nonpositive(negative);
  return z * ((z > 0.0f ? one : e) / (one + e));
}

template <typename Full>
void silu_then_mul(const SiluMul& p, int64_t row) {
  const float* gate = p.gate + row * p.gate_stride;
  const float* up = p.up + row * p.up_stride;
  float* out = p.out + row * p.out_stride;
  for_vectors<Full>(p.size, [&](int64_t i, int, auto lanes) {
    put(out + i, silu(get(gate + i, lanes)) * get(up + i, lanes), lanes);
  });
}

void silu_mul_isa(const SiluMul& p, int num_threads) {
  const bool in_place = p.out == p.gate || p.out == p.up;
  const bool streamed = is_streamed(p.out, p.out_stride, p.num_rows, p.size, in_place);
  auto* kernel = streamed ? &silu_then_mul<Streamed> : &silu_then_mul<Whole>;
  for_rows(p.num_rows, p.size, num_threads, [&](int64_t row) { kernel(p, row); });
}

}  // namespace
