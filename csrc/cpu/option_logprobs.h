// Log-softmax over the vocabulary of hidden · weightᵀ, gathered, without an array of [R, V].
//
//   z[r, v] = Σ_d hidden[r, d] weight[v, d]            fp32, summed by blocks of d in order, then those sums
//   lse[r] = m + log s, entropy[r] = log s − t / s     m = max z, s = Σ exp(z − m), t = Σ exp(z − m) (z − m)
//   logits[i] = z[r, token_ids[i]] for token_offsets[r] <= i < token_offsets[r + 1];  argmax[r]: the first maximum
//
// The vocabulary is cut into fixed chunks, each with its own m, s, t, which are combined in order: the bits of a row
// depend neither on the number of threads nor on the other rows. Where both are bf16 and the instruction set multiplies
// bf16, they are multiplied as they are; else both are widened.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace psykern {

struct OptionLogprobs {
  const void* hidden;     // [num_rows, hidden_size] of hidden_type
  int64_t hidden_stride;  // elements from row to row
  FloatType hidden_type;
  const void* weight;     // [vocab_size, hidden_size] of weight_type
  int64_t weight_stride;  // elements from row to row
  FloatType weight_type;
  int64_t num_rows, vocab_size, hidden_size;
  const int64_t* token_offsets;  // [num_rows + 1]
  const int32_t* token_ids;      // [token_offsets[num_rows]], each in [0, vocab_size)
  float* lse;                    // [num_rows]
  float* logits;                 // [token_offsets[num_rows]]
  int64_t* argmax;               // [num_rows]
  float* entropy;                // [num_rows]
};

}  // namespace psykern
