// Attention of queries in segments to the keys on each segment's path; psykern/kernels/__init__.py has the contract.
//
//   out[i] = Σ_j softmax_j(scale q[i] · k[j]) v[j]    over keys j of i's path with position in (p_i − window, p_i]
//
// Segment s has the queries [query_offsets[s], query_offsets[s + 1]) and the keys of its ranges, which concatenated are
// its path: the key at place j has position j. Softmax is computed online over tiles of keys, in fp32: sums within a
// tile, then of the tiles. bf16 is multiplied as it is where the instruction set can, softmax's weights rounded to bf16
// too; else all is widened. Sums are fp32.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace psykern {

struct PrefixAttention {
  const void* q;                                     // [num_queries, num_heads, head_dim]
  const void* k;                                     // [.., num_kv_heads, head_dim]
  const void* v;                                     // likewise
  void* out;                                         // like q; may be q
  FloatType type;                                    // of all four
  int64_t q_stride, k_stride, v_stride, out_stride;  // elements from row to row; heads and head_dim are dense
  int64_t num_heads, num_kv_heads, head_dim;
  const int32_t* positions;      // [num_queries] ascending within a segment
  const int32_t* query_offsets;  // [num_segments + 1]
  const int32_t* range_offsets;  // [num_segments + 1]
  const int32_t* key_ranges;     // [range_offsets[num_segments], 2]
  int64_t num_segments;
  float scale;
  int64_t window;  // keys that a query sees, its own included; at least 1, INT32_MAX for all
};

}  // namespace psykern
