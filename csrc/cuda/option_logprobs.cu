// The softmax behind option_logprobs, chunk by chunk of the vocabulary; see ops.h. A chunk is read twice: for its
// maximum, then, out of the first or second cache, for the sums relative to the maximum so far.
#include <cmath>

#include "common.cuh"

namespace psykern::cuda {
namespace {

struct Best {
  float value;
  int index;
};

// The larger, on ties that of the lower index.
__device__ inline Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

__device__ inline Best block_best(Best best, Best (&shared)[kWarps]) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    best =
        better(best, {__shfl_xor_sync(kAllLanes, best.value, offset), __shfl_xor_sync(kAllLanes, best.index, offset)});
  }
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = best;
  __syncthreads();
  best = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) best = better(best, shared[warp]);
  return best;
}

template <int kSize>
__global__ void __launch_bounds__(kThreads)
    online_softmax_chunk_kernel(const float* z, int width, int64_t first, const int64_t* token_offsets,
                                const int32_t* token_ids, float* wanted, SoftmaxState state) {
  __shared__ Best shared_best[kWarps];
  __shared__ float shared_total[kWarps];
  __shared__ float shared_moment[kWarps];
  const int64_t row = blockIdx.x;
  z += row * width;

  Best best{-INFINITY, 0x7fffffff};
  for (int v = threadIdx.x * kSize; v < width; v += kThreads * kSize) {
    const Pack<float, kSize> pack = load<kSize>(z + v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (pack.at[i] > best.value) best = {pack.at[i], v + i};
    }
  }
  best = block_best(best, shared_best);
  const float before = first == 0 ? -INFINITY : state.maximum[row];
  const float maximum = fmaxf(before, best.value);

  float total = 0;
  float moment = 0;
  for (int v = threadIdx.x * kSize; v < width; v += kThreads * kSize) {
    const Pack<float, kSize> pack = load<kSize>(z + v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float shifted = pack.at[i] - maximum;
      const float weight = expf(shifted);
      total += weight;
      moment += weight * shifted;
    }
  }
  total = block_sum(total, shared_total);
  moment = block_sum(moment, shared_moment);

  for (int64_t j = token_offsets[row] + threadIdx.x; j < token_offsets[row + 1]; j += kThreads) {
    const int64_t place = token_ids[j] - first;
    if (place >= 0 && place < width) wanted[j] = z[place];
  }
  if (threadIdx.x != 0) return;
  if (first != 0) {
    const float shift = before - maximum;
    const float scale = expf(shift);
    // Chunks far below the maximum count nothing: their scale is 0, and shift may be -inf.
    moment += scale == 0 ? state.moment[row] * 0 : (state.moment[row] + state.total[row] * shift) * scale;
    total += state.total[row] * scale;
  }
  if (first == 0 || best.value > before) {  // an earlier chunk wins a tie
    state.best[row] = first + (best.index < width ? best.index : 0);
  }
  state.maximum[row] = maximum;
  state.total[row] = total;
  state.moment[row] = moment;
}

__global__ void __launch_bounds__(kThreads)
    finish_softmax_kernel(SoftmaxState state, float* lse, float* entropy, int64_t rows) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  const float log_total = logf(state.total[row]);
  lse[row] = state.maximum[row] + log_total;
  entropy[row] = log_total - state.moment[row] / state.total[row];
}

}  // namespace

void online_softmax_chunk(const float* z, int64_t rows, int64_t width, int64_t first, const int64_t* token_offsets,
                          const int32_t* token_ids, float* wanted, SoftmaxState state, cudaStream_t stream) {
  if (rows == 0) return;
  const bool aligned = is_aligned(z, width * static_cast<int64_t>(sizeof(float)));
  const auto kernel = aligned ? online_softmax_chunk_kernel<4> : online_softmax_chunk_kernel<1>;
  kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(z, static_cast<int>(width), first, token_offsets,
                                                               token_ids, wanted, state);
  check_launch("option_logprobs: online_softmax_chunk", {rows, width});
}

void finish_softmax(SoftmaxState state, float* lse, float* entropy, int64_t rows, cudaStream_t stream) {
  if (rows == 0) return;
  const int64_t blocks = (rows + kThreads - 1) / kThreads;
  finish_softmax_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(state, lse, entropy, rows);
  check_launch("option_logprobs: finish_softmax", {rows});
}

}  // namespace psykern::cuda
