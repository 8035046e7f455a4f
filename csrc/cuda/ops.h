// The operations of psykern on a GPU. Pointers are of the current device, sizes and strides in elements unless a name
// says bytes, rows are dense; every call only enqueues work on `stream`, none where there is nothing to do. A launch
// that fails throws std::runtime_error with the operation's name, its shapes and CUDA's words.
//
// Each row is computed by one block in an order that depends on the row's length alone: no atomics, and a row alone
// gives the bits that it gives in a batch. Arithmetic is fp32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace psykern::cuda {

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

constexpr int64_t item_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Rows of one dtype: `data` + row * stride.
struct Rows {
  void* data;
  int64_t stride;
};

// normed = norm(summed), summed = x + residual, or with `norm_first` normed = norm(x), summed = residual + normed;
// norm(s) = weight * s / sqrt(mean(s^2) + eps). The sum is rounded to `dtype` before its norm. residual.data and
// summed.data may be null, both or neither. [rows, columns] all, weight [columns]; outputs may be inputs.
void add_rms_norm(Rows x, Rows residual, const void* weight, Rows normed, Rows summed, int64_t rows, int64_t columns,
                  float eps, bool norm_first, Dtype dtype, cudaStream_t stream);

// x, out: [rows, heads, 2 * pairs]; cos, sin: [P, pairs] fp32; positions: [rows] int32. weight: null, [2 * pairs], or
// with `norm_projection` [heads * 2 * pairs] and one norm over all heads. (x[i], x[i + pairs]) is rotated.
void qk_norm_rope(Rows x, const void* weight, const float* cos, const float* sin, const int32_t* positions, Rows out,
                  int64_t rows, int64_t heads, int64_t pairs, float eps, bool norm_projection, Dtype dtype,
                  cudaStream_t stream);

// out = gate / (1 + exp(-gate)) * up, [rows, columns].
void silu_mul(Rows gate, Rows up, Rows out, int64_t rows, int64_t columns, Dtype dtype, cudaStream_t stream);

// State of the online softmax, [rows] each: m the maximum so far, total = sum exp(z - m), moment = sum exp(z - m) *
// (z - m), best the first token of the maximum.
struct SoftmaxState {
  float* maximum;
  float* total;
  float* moment;
  int64_t* best;
};

// Takes the logits z [rows, width], dense, of the tokens first .. first + width - 1 into the state, which is begun
// where first is 0, and copies those that token_ids (CSR by token_offsets [rows + 1]) name to wanted.
void online_softmax_chunk(const float* z, int64_t rows, int64_t width, int64_t first, const int64_t* token_offsets,
                          const int32_t* token_ids, float* wanted, SoftmaxState state, cudaStream_t stream);

// lse = m + log total and entropy = log total - moment / total, [rows].
void finish_softmax(SoftmaxState state, float* lse, float* entropy, int64_t rows, cudaStream_t stream);

// out[b, i] = source[b, rows[i]] of rows of row_bytes, strides in bytes; rows: [count] int64.
void gather_rows(const void* source, const int64_t* rows, void* out, int64_t batches, int64_t count, int64_t row_bytes,
                 int64_t source_batch_bytes, int64_t out_batch_bytes, cudaStream_t stream);

}  // namespace psykern::cuda
