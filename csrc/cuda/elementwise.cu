// add_rms_norm, qk_norm_rope and silu_mul; see ops.h. A thread reads again only what it alone writes, so that outputs
// may be inputs. kSize is 16 bytes of T, or 1 where an address or a stride does not allow it.
#include "common.cuh"

namespace psykern::cuda {
namespace {

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads)
    add_rms_norm_kernel(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride, const T* weight,
                        T* normed, int64_t normed_stride, T* summed, int64_t summed_stride, int columns, float eps,
                        bool norm_first) {
  __shared__ float shared[kWarps];
  const int64_t row = blockIdx.x;
  x += row * x_stride;
  normed += row * normed_stride;
  if (residual != nullptr) {
    residual += row * residual_stride;
    summed += row * summed_stride;
  }
  const bool add_first = residual != nullptr && !norm_first;

  float squares = 0;
  for (int d = threadIdx.x * kSize; d < columns; d += kThreads * kSize) {
    Pack<T, kSize> s = load<kSize>(x + d);
    if (add_first) {
      const Pack<T, kSize> r = load<kSize>(residual + d);
#pragma unroll
      for (int i = 0; i < kSize; ++i) s.at[i] = from_float<T>(to_float(s.at[i]) + to_float(r.at[i]));
      store(summed + d, s);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) squares += to_float(s.at[i]) * to_float(s.at[i]);
  }
  const float scale = 1.0f / sqrtf(block_sum(squares, shared) / static_cast<float>(columns) + eps);

  const T* source = add_first ? summed : x;
  for (int d = threadIdx.x * kSize; d < columns; d += kThreads * kSize) {
    Pack<T, kSize> s = load<kSize>(source + d);
    const Pack<T, kSize> w = load<kSize>(weight + d);
#pragma unroll
    for (int i = 0; i < kSize; ++i) s.at[i] = from_float<T>(to_float(s.at[i]) * scale * to_float(w.at[i]));
    if (residual != nullptr && norm_first) {
      Pack<T, kSize> r = load<kSize>(residual + d);
#pragma unroll
      for (int i = 0; i < kSize; ++i) r.at[i] = from_float<T>(to_float(r.at[i]) + to_float(s.at[i]));
      store(summed + d, r);
    }
    store(normed + d, s);
  }
}

// One row. A head belongs to a group of `lanes` lanes, which hold kSize pairs each; kNorm: none 0, head 1, row 2.
template <typename T, int kSize, int kNorm>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rope_kernel(const T* x, int64_t x_stride, const T* weight, const float* cos, const float* sin,
                        const int32_t* positions, T* out, int64_t out_stride, int heads, int pairs, int lanes,
                        float eps) {
  __shared__ float shared[kWarps];
  const int64_t row = blockIdx.x;
  x += row * x_stride;
  out += row * out_stride;
  cos += static_cast<int64_t>(positions[row]) * pairs;
  sin += static_cast<int64_t>(positions[row]) * pairs;

  float scale = 1;
  if constexpr (kNorm == 2) {
    float squares = 0;
    for (int d = threadIdx.x * kSize; d < heads * 2 * pairs; d += kThreads * kSize) {
      const Pack<T, kSize> s = load<kSize>(x + d);
#pragma unroll
      for (int i = 0; i < kSize; ++i) squares += to_float(s.at[i]) * to_float(s.at[i]);
    }
    scale = 1.0f / sqrtf(block_sum(squares, shared) / static_cast<float>(heads * 2 * pairs) + eps);
  }
  const int groups = kThreads / lanes;
  const int lane = threadIdx.x % lanes;
  for (int first = 0; first < heads; first += groups) {  // the same for the whole block: every lane takes the shuffles
    const int head = first + static_cast<int>(threadIdx.x) / lanes;
    const int start = head < heads ? lane * kSize : pairs;  // a group without a head reads nothing
    const int64_t place = static_cast<int64_t>(head) * 2 * pairs;
    if constexpr (kNorm == 1) {
      float squares = 0;
      for (int p = start; p < pairs; p += lanes * kSize) {
        const Pack<T, kSize> low = load<kSize>(x + place + p);
        const Pack<T, kSize> high = load<kSize>(x + place + p + pairs);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          squares += to_float(low.at[i]) * to_float(low.at[i]) + to_float(high.at[i]) * to_float(high.at[i]);
        }
      }
      scale = 1.0f / sqrtf(group_sum(squares, lanes) / static_cast<float>(2 * pairs) + eps);
    }
    const T* head_weight = kNorm == 2 ? weight + place : weight;
    for (int p = start; p < pairs; p += lanes * kSize) {
      Pack<T, kSize> low = load<kSize>(x + place + p);
      Pack<T, kSize> high = load<kSize>(x + place + p + pairs);
      Pack<T, kSize> weight_low{};
      Pack<T, kSize> weight_high{};
      if constexpr (kNorm != 0) {
        weight_low = load<kSize>(head_weight + p);
        weight_high = load<kSize>(head_weight + p + pairs);
      }
      const Pack<float, kSize> cosines = load<kSize>(cos + p);
      const Pack<float, kSize> sines = load<kSize>(sin + p);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        float a = to_float(low.at[i]);
        float b = to_float(high.at[i]);
        if constexpr (kNorm != 0) {
          a *= scale * to_float(weight_low.at[i]);
          b *= scale * to_float(weight_high.at[i]);
        }
        low.at[i] = from_float<T>(a * cosines.at[i] - b * sines.at[i]);
        high.at[i] = from_float<T>(b * cosines.at[i] + a * sines.at[i]);
      }
      store(out + place + p, low);
      store(out + place + p + pairs, high);
    }
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* out, int64_t out_stride,
                    int columns) {
  const int64_t row = blockIdx.x;
  const int d = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) * kSize;
  if (d >= columns) return;
  Pack<T, kSize> g = load<kSize>(gate + row * gate_stride + d);
  const Pack<T, kSize> u = load<kSize>(up + row * up_stride + d);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float x = to_float(g.at[i]);
    g.at[i] = from_float<T>(x / (1.0f + expf(-x)) * to_float(u.at[i]));
  }
  store(out + row * out_stride + d, g);
}

bool are_aligned(std::initializer_list<Rows> arrays, int64_t columns, Dtype dtype) {
  bool aligned = columns * item_bytes(dtype) % kPackBytes == 0;
  for (const Rows& rows : arrays) aligned = aligned && is_aligned(rows.data, rows.stride * item_bytes(dtype));
  return aligned;
}

// Calls f(T(), std::integral_constant of the pack's size).
template <typename F>
void with_pack(Dtype dtype, bool aligned, const F& f) {
  with_type(dtype, [&](auto zero) {
    constexpr int kSize = kPackBytes / sizeof(zero);
    if (aligned) {
      f(zero, std::integral_constant<int, kSize>());
    } else {
      f(zero, std::integral_constant<int, 1>());
    }
  });
}

}  // namespace

void add_rms_norm(Rows x, Rows residual, const void* weight, Rows normed, Rows summed, int64_t rows, int64_t columns,
                  float eps, bool norm_first, Dtype dtype, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  const Rows weights{const_cast<void*>(weight), 0};
  with_pack(dtype, are_aligned({x, residual, weights, normed, summed}, columns, dtype), [&](auto zero, auto size) {
    using T = decltype(zero);
    add_rms_norm_kernel<T, decltype(size)::value><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
        static_cast<const T*>(x.data), x.stride, static_cast<const T*>(residual.data), residual.stride,
        static_cast<const T*>(weight), static_cast<T*>(normed.data), normed.stride, static_cast<T*>(summed.data),
        summed.stride, static_cast<int>(columns), eps, norm_first);
  });
  check_launch("add_rms_norm", {rows, columns});
}

void qk_norm_rope(Rows x, const void* weight, const float* cos, const float* sin, const int32_t* positions, Rows out,
                  int64_t rows, int64_t heads, int64_t pairs, float eps, bool norm_projection, Dtype dtype,
                  cudaStream_t stream) {
  if (rows == 0 || heads == 0 || pairs == 0) return;
  const Rows weights{const_cast<void*>(weight), 0};
  const bool aligned = are_aligned({x, weights, out}, pairs, dtype) && is_aligned(cos, 0) && is_aligned(sin, 0);
  with_pack(dtype, aligned, [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kSize = decltype(size)::value;
    int lanes = 1;
    while (lanes < kWarp && lanes * kSize < pairs) lanes *= 2;
    const auto launch = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
          static_cast<const T*>(x.data), x.stride, static_cast<const T*>(weight), cos, sin, positions,
          static_cast<T*>(out.data), out.stride, static_cast<int>(heads), static_cast<int>(pairs), lanes, eps);
    };
    if (weight == nullptr) {
      launch(qk_norm_rope_kernel<T, kSize, 0>);
    } else if (!norm_projection) {
      launch(qk_norm_rope_kernel<T, kSize, 1>);
    } else {
      launch(qk_norm_rope_kernel<T, kSize, 2>);
    }
  });
  check_launch("qk_norm_rope", {rows, heads, 2 * pairs});
}

void silu_mul(Rows gate, Rows up, Rows out, int64_t rows, int64_t columns, Dtype dtype, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return;
  with_pack(dtype, are_aligned({gate, up, out}, columns, dtype), [&](auto zero, auto size) {
    using T = decltype(zero);
    constexpr int kSize = decltype(size)::value;
    const int64_t blocks = (columns + kThreads * kSize - 1) / (kThreads * kSize);
    silu_mul_kernel<T, kSize>
        <<<dim3(static_cast<unsigned>(rows), static_cast<unsigned>(blocks)), kThreads, 0, stream>>>(
            static_cast<const T*>(gate.data), gate.stride, static_cast<const T*>(up.data), up.stride,
            static_cast<T*>(out.data), out.stride, static_cast<int>(columns));
  });
  check_launch("silu_mul", {rows, columns});
}

}  // namespace psykern::cuda
