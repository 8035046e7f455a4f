// What the kernels share: packs of 16 bytes, sums over a warp and a block in a fixed order, the check of a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ops.h"

namespace psykern::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

constexpr int kPackBytes = 16;  // of the widest load and store

// `kSize` neighbours, read and written by one instruction where that is 16 bytes or less.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < kPackBytes ? sizeof(T) * kSize : kPackBytes) Pack {
  T at[kSize];
};

template <int kSize, typename T>
__device__ inline Pack<T, kSize> load(const T* pointer) {
  return *reinterpret_cast<const Pack<T, kSize>*>(pointer);
}

template <typename T, int kSize>
__device__ inline void store(T* pointer, const Pack<T, kSize>& pack) {
  *reinterpret_cast<Pack<T, kSize>*>(pointer) = pack;
}

// Sum over groups of `lanes` neighbours, a power of two; every lane of a group gets it.
__device__ inline float group_sum(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// Sum over the block, the same in every thread. `shared` may be used again after the next __syncthreads.
__device__ inline float block_sum(float x, float (&shared)[kWarps]) {
  x = group_sum(x, kWarp);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += shared[warp];
  return total;
}

// Whether rows can be read in packs of 16 bytes.
inline bool is_aligned(const void* data, int64_t stride_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % kPackBytes == 0 && stride_bytes % kPackBytes == 0;
}

// Calls f with a value of the dtype's C++ type.
template <typename F>
void with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) {
    f(float());
  } else if (dtype == Dtype::kBfloat16) {
    f(__nv_bfloat16());
  } else {
    f(__half());
  }
}

inline void check_launch(const char* op, std::initializer_list<int64_t> shape) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  throw std::runtime_error(std::string(op) + " [" + text + "]: launch failed: " + cudaGetErrorString(error));
}

}  // namespace psykern::cuda
