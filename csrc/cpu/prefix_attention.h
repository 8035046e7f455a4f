// Attention of queries in segments to the keys on each segment's path; psykern/kernels/__init__.py has the contract.
//
//   out[i] = Σ_j softmax_j(scale q[i] · k[j]) v[j]    over keys j of i's path with position in (p_i − window, p_i]
//
// Segment s has the queries [query_offsets[s], query_offsets[s + 1]) and the keys of its ranges, which concatenated are
// its path: the key at place j has position j. Softmax is computed online over tiles of keys, in fp32: sums within a
// tile, then of the tiles.
#pragma once

#include <cstdint>

namespace psykern {

struct PrefixAttention {
  const float* q;                                    // [num_queries, num_heads, head_dim]
  const float* k;                                    // [.., num_kv_heads, head_dim]
  const float* v;                                    // likewise
  float* out;                                        // like q; may be q
  int64_t q_stride, k_stride, v_stride, out_stride;  // floats from row to row; heads and head_dim are dense
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
