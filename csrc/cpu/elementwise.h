// The elementwise operations: one pass over memory each, rows in parallel; psykern/kernels/__init__.py has the
// contracts.
#pragma once

#include <cstdint>

namespace psykern {

// norm(s) = weight * s / sqrt(mean(s^2) + eps). norm_first: normed = norm(x), summed = residual + normed; else
// summed = x + residual, normed = norm(summed).
struct AddRmsNorm {
  const float* x;                                                   // [num_rows, size]
  const float* residual;                                            // [num_rows, size] or null: nothing is added
  const float* weight;                                              // [size]
  float* normed;                                                    // [num_rows, size] or null: not wanted
  float* summed;                                                    // [num_rows, size] or null: not wanted
  int64_t x_stride, residual_stride, normed_stride, summed_stride;  // floats from row to row
  int64_t num_rows, size;
  float eps;
  bool norm_first;
};

// Optional norm of each head (weight_size == head_dim) or of the whole row (num_heads * head_dim), then rotation of the
// pairs (x[i], x[i + head_dim / 2]) by the angle of the row's position.
struct QkNormRope {
  const float* x;       // [num_rows, num_heads, head_dim]
  const float* weight;  // [weight_size] or null: no norm
  const float* cos;     // [.., head_dim / 2] by position
  const float* sin;
  const int32_t* positions;      // [num_rows]
  float* out;                    // like x; may be x
  int64_t x_stride, out_stride;  // floats from row to row
  int64_t num_rows, num_heads, head_dim, weight_size;
  float eps;
};

// out = gate / (1 + exp(-gate)) * up
struct SiluMul {
  const float* gate;  // [num_rows, size]
  const float* up;
  float* out;  // may be gate or up
  int64_t gate_stride, up_stride, out_stride;
  int64_t num_rows, size;
};

}  // namespace psykern
