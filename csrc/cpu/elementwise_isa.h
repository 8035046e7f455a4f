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
using psykern::AddWeighted;
using psykern::FloatType;
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

template <typename T>
inline Vec get(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline Vec get(const T* p, Streamed) {
  return load(p);
}
template <typename T>
inline Vec get(const T* p, Part part) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(part.count) * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void put(T* p, Vec x, Whole) {
  store(p, x);
}
template <typename T>
inline void put(T* p, Vec x, Streamed) {
  stream(p, x);
}
template <typename T>
inline void put(T* p, Vec x, Part part) {
  T lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(part.count) * sizeof(T));
}

// What a store to T and a load would give.
template <typename T>
inline Vec as_stored(Vec x) {
  T lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}
template <>
inline Vec as_stored<float>(Vec x) {
  return x;
}

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
inline bool is_streamed(const void* out, FloatType type, int64_t stride, int64_t num_rows, int64_t size,
                        bool is_input) {
  const size_t vector_bytes = type == FloatType::kFloat32 ? sizeof(Vec) : sizeof(Halves);
  const bool is_aligned = reinterpret_cast<uintptr_t>(out) % vector_bytes == 0 && stride % kLanes == 0;
  return !is_input && is_aligned && num_rows * size >= kStreamedFloats;
}

// 1 / sqrt(mean(s^2) + eps), the squares added up in kSums vectors.
inline float inverse_rms(const Vec (&squares)[kSums], int64_t size, float eps) {
  const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  return 1.0f / std::sqrt(total / static_cast<float>(size) + eps);
}
template <typename T>
inline float inverse_rms(const T* x, int64_t size, float eps) {
  Vec squares[kSums] = {};
  for_vectors(size, [&](int64_t i, int slot, auto lanes) {
    const Vec s = get(x + i, lanes);
    squares[slot] += s * s;
  });
  return inverse_rms(squares, size, eps);
}

// Row `row` of an array of T, or null where there is none.
template <typename T>
inline T* row_of(void* data, int64_t stride, int64_t row) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + row * stride;
}
template <typename T>
inline const T* row_of(const void* data, int64_t stride, int64_t row) {
  return data == nullptr ? nullptr : static_cast<const T*>(data) + row * stride;
}

// As in Llama and Qwen. kStoreSum: `summed` is wanted; the second loop then reads it, else it adds again. What is
// normed is the sum as it is stored.
template <typename T, bool kResidual, bool kStoreSum, typename Full>
void add_then_norm(const AddRmsNorm& p, int64_t row) {
  const T* x = row_of<T>(p.x, p.x_stride, row);
  const T* residual = kResidual ? row_of<T>(p.residual, p.residual_stride, row) : nullptr;
  T* normed = row_of<T>(p.normed, p.normed_stride, row);
  T* summed = kStoreSum ? row_of<T>(p.summed, p.summed_stride, row) : nullptr;
  const auto add = [&](int64_t i, auto lanes) {
    return kResidual ? as_stored<T>(get(x + i, lanes) + get(residual + i, lanes)) : get(x + i, lanes);
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
template <typename T>
void norm_then_add(const AddRmsNorm& p, int64_t row) {
  const T* x = row_of<T>(p.x, p.x_stride, row);
  const T* residual = row_of<T>(p.residual, p.residual_stride, row);
  T* normed = row_of<T>(p.normed, p.normed_stride, row);
  T* summed = row_of<T>(p.summed, p.summed_stride, row);
  const Vec scale = broadcast(inverse_rms(x, p.size, p.eps));
  for_vectors(p.size, [&](int64_t i, int, auto lanes) {
    const Vec norm = get(x + i, lanes) * scale * get(p.weight + i, lanes);
    const Vec total = residual == nullptr ? norm : get(residual + i, lanes) + norm;
    if (normed != nullptr) put(normed + i, norm, lanes);
    if (summed != nullptr) put(summed + i, total, lanes);
  });
}

template <typename T, typename Full>
auto choose_norm(const AddRmsNorm& p) {
  if (p.norm_first) return &norm_then_add<T>;
  if (p.residual == nullptr) {
    return p.summed != nullptr ? &add_then_norm<T, false, true, Full> : &add_then_norm<T, false, false, Full>;
  }
  return p.summed != nullptr ? &add_then_norm<T, true, true, Full> : &add_then_norm<T, true, false, Full>;
}

template <typename Choose>
auto choose_kernel(FloatType type, bool streamed, const Choose& choose) {
  if (type == FloatType::kBfloat16) return streamed ? choose(uint16_t{}, Streamed{}) : choose(uint16_t{}, Whole{});
  return streamed ? choose(float{}, Streamed{}) : choose(float{}, Whole{});
}

void add_rms_norm_isa(const AddRmsNorm& p, int num_threads) {
  const bool in_place = p.normed == p.x || p.normed == p.residual;
  const bool streamed = is_streamed(p.normed, p.type, p.normed_stride, p.num_rows, p.size, in_place);
  auto* kernel = choose_kernel(
      p.type, streamed, [&](auto number, auto full) { return choose_norm<decltype(number), decltype(full)>(p); });
  for_rows(p.num_rows, p.size, num_threads, [&](int64_t row) { kernel(p, row); });
}

template <typename T, bool kNorm, typename Full>
void norm_and_rotate(const QkNormRope& p, int64_t row) {
  const T* x = row_of<T>(p.x, p.x_stride, row);
  T* out = row_of<T>(p.out, p.out_stride, row);
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
  const bool streamed = whole_vectors && is_streamed(p.out, p.type, p.out_stride, p.num_rows, size, p.out == p.x);
  auto* kernel = choose_kernel(p.type, streamed, [&](auto number, auto full) {
    using T = decltype(number);
    using Full = decltype(full);
    return p.weight != nullptr ? &norm_and_rotate<T, true, Full> : &norm_and_rotate<T, false, Full>;
  });
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

template <typename T, typename Full>
void silu_then_mul(const SiluMul& p, int64_t row) {
  const T* gate = row_of<T>(p.gate, p.gate_stride, row);
  const T* up = row_of<T>(p.up, p.up_stride, row);
  T* out = row_of<T>(p.out, p.out_stride, row);
  for_vectors<Full>(p.size, [&](int64_t i, int, auto lanes) {
    put(out + i, silu(get(gate + i, lanes)) * get(up + i, lanes), lanes);
  });
}

void silu_mul_isa(const SiluMul& p, int num_threads) {
  const bool in_place = p.out == p.gate || p.out == p.up;
  const bool streamed = is_streamed(p.out, p.type, p.out_stride, p.num_rows, p.size, in_place);
  auto* kernel = choose_kernel(p.type, streamed,
                               [](auto number, auto full) { return &silu_then_mul<decltype(number), decltype(full)>; });
  for_rows(p.num_rows, p.size, num_threads, [&](int64_t row) { kernel(p, row); });
}

template <typename T>
void add_weighted_rows(const AddWeighted& p, int64_t row) {
  const float* weights = p.weights + row * p.top_k;
  const T* x = row_of<T>(p.x, p.x_stride, row * p.top_k);
  T* total = row_of<T>(p.total, p.total_stride, row);
  for_vectors(p.size, [&](int64_t i, int, auto lanes) {
    Vec sum = get(total + i, lanes);
    for (int64_t j = 0; j < p.top_k; ++j) sum += broadcast(weights[j]) * get(x + j * p.x_stride + i, lanes);
    put(total + i, sum, lanes);
  });
}

void add_weighted_isa(const AddWeighted& p, int num_threads) {
  auto* kernel = p.type == FloatType::kBfloat16 ? &add_weighted_rows<uint16_t> : &add_weighted_rows<float>;
  for_rows(p.num_rows, p.size * (p.top_k + 1), num_threads, [&](int64_t row) { kernel(p, row); });
}

}  // namespace
