// option_logprobs for one instruction set; included once per set by isa_*.cpp, which name the namespace.
//
// Rows are packed in panels of at most kMaxPanel, [d][row], and a block of the vocabulary in panels of two vectors,
// [d][token], so that the inner loop reads both in order. A block's packed tokens stay in the L2 cache while all rows
// pass; a panel's logits are reduced while they are in the L1 cache, and are gone then.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "option_logprobs.h"
#include "panels.h"
#include "parallel.h"
#include "simd.h"

namespace {

using psykern::FloatType;
using psykern::OptionLogprobs;

constexpr int64_t kBlockBytes = 256 * 1024;            // packed tokens of a block: half an L2 cache
constexpr int64_t kPackedRowBytes = 16 * 1024 * 1024;  // packed rows
constexpr int64_t kChunkColumns = 2048;                // of the vocabulary, for one task
constexpr int64_t kSummed = 256;                       // products that are summed in order
constexpr float kNoToken = -1e30f;                     // logit of the padding behind the vocabulary

struct Partial {  // one row over one chunk; see option_logprobs.h
  double total = 0, moment = 0;
  float maximum = -std::numeric_limits<float>::infinity();
  int32_t argmax = 0;
};

// tile[i][0..kColumns) = sum over d of rows[d][i] * tokens[d][..], of kSummed products in order and then of those sums:
// the rounding of one long sum grows with the root of its length, to five times torch's at 4,096 products.
template <int kRows>
void multiply_panels(const float* __restrict rows, const float* __restrict tokens, int64_t depth,
                     float* __restrict tile, int64_t tile_stride) {
  int64_t d = 0;
  do {
    const bool is_first = d == 0;
    const int64_t end = std::min(d + kSummed, depth);
    Vec sums[kRows][2] = {};
    for (; d < end; ++d) {
      const Vec t0 = load(tokens + d * kColumns), t1 = load(tokens + d * kColumns + kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const Vec h = broadcast(rows[d * kRows + i]);
        sums[i][0] += h * t0;
        sums[i][1] += h * t1;
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      float* out = tile + i * tile_stride;
      store(out, is_first ? sums[i][0] : load(out) + sums[i][0]);
      store(out + kLanes, is_first ? sums[i][1] : load(out + kLanes) + sums[i][1]);
    }
  } while (d < depth);
}

using MultiplyPanels = void (*)(const float*, const float*, int64_t, float*, int64_t);

template <int... kRows>
constexpr std::array<MultiplyPanels, sizeof...(kRows)> multiply_table(std::integer_sequence<int, kRows...>) {
  return {&multiply_panels<kRows + 1>...};
}

// tokens[0..count) of `weight`, count <= kColumns, to packed[d][token]; missing tokens are zeros.
template <typename T>
void pack_tokens(const T* weight, int64_t stride, int64_t count, int64_t depth, float* packed) {
  for (int64_t first = 0; first < kColumns; first += kLanes) {
    const int64_t present = std::clamp<int64_t>(count - first, 0, kLanes);
    pack_half_panel([&](int64_t i) { return weight + (first + i) * stride; }, present, depth, packed + first);
  }
}

// One row's logits z[0..count), padded with kNoToken to whole vectors, into its partial result.
void reduce_logits(const float* z, int64_t count, int64_t first_token, Partial& partial) {
  Vec highest = load(z);
  for (int64_t i = kLanes; i < count; i += kLanes) highest = maximum(highest, load(z + i));
  const float maximum_here = max_lane(highest);
  if (maximum_here > partial.maximum) {
    if (partial.total > 0) {
      const double shift = static_cast<double>(partial.maximum) - maximum_here, scale = std::exp(shift);
      partial.moment = (partial.moment + partial.total * shift) * scale;
      partial.total *= scale;
    }
    partial.maximum = maximum_here;
    partial.argmax = static_cast<int32_t>(first_token + (std::find(z, z + count, maximum_here) - z));
  }
  const Vec shift = broadcast(partial.maximum);
  Vec total = {}, moment = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec below = load(z + i) - shift, weight = exp_nonpositive(below);
    total += weight;
    moment += weight * below;
  }
  partial.total += sum(total);
  partial.moment += sum(moment);
}

Buffer pack_rows(const OptionLogprobs& p, int64_t first_row, const RowPanels& panels, int num_threads) {
  Buffer packed = allocate(panels.num_rows * p.hidden_size);
  psykern::parallel_for(panels.count, num_threads, [&](int64_t panel) {
    const int64_t begin = panels.start(panel), rows = panels.start(panel + 1) - begin;
    float* out = packed.get() + begin * p.hidden_size;
    for (int64_t d = 0; d < p.hidden_size; ++d) {
      for (int64_t i = 0; i < rows; ++i) out[d * rows + i] = p.hidden[(first_row + begin + i) * p.hidden_stride + d];
    }
  });
  return packed;
}

// Targets of every row in order of token, so that a block's targets are neighbours: indices into token_ids.
std::vector<int64_t> sort_targets(const OptionLogprobs& p) {
  std::vector<int64_t> order(static_cast<size_t>(p.token_offsets[p.num_rows]));
  std::iota(order.begin(), order.end(), 0);
  for (int64_t row = 0; row < p.num_rows; ++row) {
    std::sort(order.begin() + p.token_offsets[row], order.begin() + p.token_offsets[row + 1],
              [&](int64_t a, int64_t b) { return p.token_ids[a] < p.token_ids[b]; });
  }
  return order;
}

template <typename T>
void score_chunk(const OptionLogprobs& p, int64_t first_row, const RowPanels& panels, const float* packed_rows,
                 const std::vector<int64_t>& order, int64_t first_token, int64_t last_token, Partial* partials) {
  static constexpr auto kMultiply = multiply_table(std::make_integer_sequence<int, kMaxPanel>{});
  const int64_t depth = p.hidden_size;
  const int64_t fitting = kBlockBytes / (kColumns * depth * static_cast<int64_t>(sizeof(float)));
  const int64_t block = kColumns * std::clamp<int64_t>(fitting, 1, kChunkColumns / kColumns);
  const Buffer packed = allocate(block * depth), tile = allocate(kMaxPanel * block);
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t begin = first_token; begin < last_token; begin += block) {
    const int64_t count = std::min(block, last_token - begin);
    for (int64_t t = 0; t < count; t += kColumns) {
      pack_tokens(weight + (begin + t) * p.weight_stride, p.weight_stride, count - t, depth, packed.get() + t * depth);
    }
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t start = panels.start(panel), rows = panels.start(panel + 1) - start;
      for (int64_t t = 0; t < count; t += kColumns) {
        kMultiply[static_cast<size_t>(rows - 1)](packed_rows + start * depth, packed.get() + t * depth, depth,
                                                 tile.get() + t, block);
      }
      for (int64_t i = 0; i < rows; ++i) {
        float* z = tile.get() + i * block;
        const int64_t row = first_row + start + i;
        const auto targets_end = order.begin() + p.token_offsets[row + 1];
        auto target = std::lower_bound(order.begin() + p.token_offsets[row], targets_end, begin,
                                       [&](int64_t a, int64_t token) { return p.token_ids[a] < token; });
        for (; target != targets_end && p.token_ids[*target] < begin + count; ++target) {
          p.logits[*target] = z[p.token_ids[*target] - begin];
        }
        std::fill(z + count, z + (count + kColumns - 1) / kColumns * kColumns, kNoToken);
        reduce_logits(z, count, begin, partials[start + i]);
      }
    }
  }
}

void combine(const OptionLogprobs& p, int64_t row, int64_t chunks, const Partial* partials, int64_t stride) {
  Partial all;
  for (int64_t c = 0; c < chunks; ++c) {
    const Partial& part = partials[c * stride];
    if (part.maximum > all.maximum) {
      all.maximum = part.maximum;
      all.argmax = part.argmax;
    }
  }
  for (int64_t c = 0; c < chunks; ++c) {
    const Partial& part = partials[c * stride];
    const double shift = static_cast<double>(part.maximum) - all.maximum, scale = std::exp(shift);
    all.total += part.total * scale;
    all.moment += (part.moment + part.total * shift) * scale;
  }
  const double log_total = std::log(all.total);
  p.lse[row] = static_cast<float>(all.maximum + log_total);
  p.entropy[row] = static_cast<float>(log_total - all.moment / all.total);
  p.argmax[row] = all.argmax;
}

void option_logprobs_isa(const OptionLogprobs& p, int num_threads) {
  const std::vector<int64_t> order = sort_targets(p);
  const int64_t chunks = (p.vocab_size + kChunkColumns - 1) / kChunkColumns;
  const int64_t most_rows = std::max<int64_t>(kPackedRowBytes / (p.hidden_size * 4) / kMaxPanel, 1) * kMaxPanel;
  for (int64_t first = 0; first < p.num_rows; first += most_rows) {
    const RowPanels panels(std::min(most_rows, p.num_rows - first));
    const Buffer packed_rows = pack_rows(p, first, panels, num_threads);
    std::vector<Partial> partials(static_cast<size_t>(chunks * panels.num_rows));
    psykern::parallel_for(chunks, num_threads, [&](int64_t c) {
      const auto score = p.weight_type == FloatType::kFloat32 ? &score_chunk<float> : &score_chunk<uint16_t>;
      score(p, first, panels, packed_rows.get(), order, c * kChunkColumns,
            std::min((c + 1) * kChunkColumns, p.vocab_size), partials.data() + c * panels.num_rows);
    });
    for (int64_t row = 0; row < panels.num_rows; ++row) {
      combine(p, first + row, chunks, partials.data() + row, panels.num_rows);
    }
  }
}

}  // namespace
