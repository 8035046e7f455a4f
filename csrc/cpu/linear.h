// Products of rows with the weights of one or several linear layers, and what a decoder layer does with them.
//
//   c[n, m] = Σ_k x[n, k] weight[m, k] + bias[m]
//
//   kStore:    out = c                      each part to its own array: queries, keys, values
//   kAdd:      out = out + c                the residual
//   kSiluMul:  out = silu(c of gate) * c of up
//
// Rows may be of several groups, each with weights of its own: the experts of a mixture. Their rows of x may stand
// anywhere, and their results go anywhere, by an index.
//
// Sums are fp32. Where x is bf16 and the instruction set multiplies bf16, weights are bf16 too; else both are widened.
// The order of a sum is that of its products, in blocks whose sums are then added in order: it depends neither on the
// number of rows, nor on the block that a row falls in, nor on threads.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace psykern {

enum class Epilogue { kStore, kAdd, kSiluMul };

// A weight [columns, depth] as a file has it: rows of `type`.
struct WeightRows {
  const void* data;
  int64_t stride;  // elements
  FloatType type;
};

// One linear layer, or with kSiluMul gate and up, of which column m of one is multiplied with column m of the other.
struct LinearPart {
  int64_t columns;
  WeightRows weight, up;        // up: with kSiluMul alone
  const float *bias, *up_bias;  // [columns] or null
  void* out;                    // [.., columns] of x's type
  int64_t out_stride;
};

// Rows [first_row, last_row) of a product are multiplied with these parts.
struct RowGroup {
  int64_t first_row, last_row;
  const LinearPart* parts;
  int64_t num_parts;
};

struct Linear {
  const void* x;  // [.., depth]
  int64_t x_stride;
  FloatType type;  // of x and of every out
  int64_t num_rows, depth;
  const RowGroup* groups;  // one behind the other, of all rows
  int64_t num_groups;
  Epilogue epilogue;
  const int32_t* x_slots;    // [num_rows]: row i is row x_slots[i] / top_k of x; or null: row i
  const int32_t* out_slots;  // [num_rows]: row i goes to row out_slots[i] of out, to each another; or null: to row i
  int64_t top_k;
};

}  // namespace psykern
