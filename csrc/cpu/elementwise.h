// The elementwise operations: one pass over memory each, rows in parallel; psykern/kernels/__init__.py has the
// contracts. Arrays of activations are of one `type`, fp32 or bf16; arithmetic is fp32.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace psykern {

// norm(s) = weight * s / sqrt(mean(s^2) + eps). norm_first: normed = norm(x), summed = residual + normed; else
// summed = x + residual, normed = norm(summed).
struct AddRmsNorm {
  FloatType type;
  const void* x;                                                    // [num_rows, size]
  const void* residual;                                             // [num_rows, size] or null: nothing is added
  const float* weight;                                              // [size]
  void* normed;                                                     // [num_rows, size] or null: not wanted
  void* summed;                                                     // [num_rows, size] or null: not wanted
  int64_t x_stride, residual_stride, normed_stride, summed_stride;  // numbers from row to row
  int64_t num_rows, size;
  float eps;
  bool norm_first;
};

// Optional norm of each head (weight_size == head_dim) or of the whole row (num_heads * head_dim), then rotation of the
// pairs (x[i], x[i + head_dim / 2]) by the angle of the row's position.
struct QkNormRope {
  FloatType type;
  const void* x;        // [num_rows, num_heads, head_dim]
  const float* weight;  // [weight_size] or null: no norm
  const float* cos;     // [.., head_dim / 2] by position
  const float* sin;
  const int32_t* positions;      // [num_rows]
  void* out;                     // like x; may be x
  int64_t x_stride, out_stride;  // numbers from row to row
  int64_t num_rows, num_heads, head_dim, weight_size;
  float eps;
};

// out = gate / (1 + exp(-gate)) * up
struct SiluMul {
  FloatType type;
  const void* gate;  // [num_rows, size]
  const void* up;
  void* out;  // may be gate or up
  int64_t gate_stride, up_stride, out_stride;
  int64_t num_rows, size;
};

// total[n] = total[n] + Σ_j weights[n, j] x[n * top_k + j], in the order of j, rounded once.
struct AddWeighted {
  FloatType type;
  const void* x;         // [num_rows * top_k, size]
  const float* weights;  // [num_rows, top_k]
  void* total;           // [num_rows, size]
  int64_t x_stride, total_stride;
  int64_t num_rows, top_k, size;
};

}  // namespace psykern
