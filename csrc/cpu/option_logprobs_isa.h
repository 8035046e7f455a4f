// option_logprobs for one instruction set; included once per set by kernels_isa.cpp.
//
// Rows are copied in panels once, and a block of the vocabulary is packed as products take it. Its packed tokens stay
// in the L2 cache while all panels of rows pass; a panel's logits are reduced while they are in the L1 cache, and are
// gone then.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "linear_isa.h"
#include "option_logprobs.h"
#include "panels.h"
#include "parallel.h"
#include "product_isa.h"
#include "simd.h"

namespace {

using psykern::OptionLogprobs;

constexpr int64_t kBlockBytes = 512 * 1024;            // packed tokens of a block: half an L2 cache
constexpr int64_t kPackedRowBytes = 16 * 1024 * 1024;  // copied rows
constexpr int64_t kChunkColumns = 2048;                // of the vocabulary, for one task
constexpr float kNoToken = -1e30f;                     // logit of the padding behind the vocabulary

struct Partial {  // one row over one chunk; see option_logprobs.h
  double total = 0, moment = 0;
  float maximum = -std::numeric_limits<float>::infinity();
  int32_t argmax = 0;
};

// One row's logits, in panels of kColumns that stand `stride` apart.
struct Logits {
  float* z;
  int64_t stride;
  float& of(int64_t i) const { return z[i / kColumns * stride + i % kColumns]; }
};

// `count` logits of a row, padded with kNoToken to whole panels, into its partial result.
void reduce_logits(const Logits& logits, int64_t count, int64_t first_token, Partial& partial) {
  const float *begin = logits.z, *end = begin + (count + kColumns - 1) / kColumns * logits.stride;
  Vec highest[2] = {load(begin), load(begin + kLanes)};
  for (const float* z = begin + logits.stride; z < end; z += logits.stride) {
    highest[0] = maximum(highest[0], load(z));
    highest[1] = maximum(highest[1], load(z + kLanes));
  }
  const float maximum_here = max_lane(maximum(highest[0], highest[1]));
  if (maximum_here > partial.maximum) {
    if (partial.total > 0) {
      const double shift = static_cast<double>(partial.maximum) - maximum_here, scale = std::exp(shift);
      partial.moment = (partial.moment + partial.total * shift) * scale;
      partial.total *= scale;
    }
    partial.maximum = maximum_here;
    int64_t first = 0;
    while (first < count && logits.of(first) != maximum_here) ++first;
    partial.argmax = static_cast<int32_t>(first_token + first);
  }
  const Vec shift = broadcast(partial.maximum), log2_e = broadcast(1.44269504f);
  Vec totals[2] = {}, moments[2] = {};
  for (const float* z = begin; z < end; z += logits.stride) {
    Vec below[2], weights[2];
    for_each<2>([&](int i) { below[i] = load(z + i * kLanes) - shift; });
    for_each<2>([&](int i) { weights[i] = below[i] * log2_e; });
    exp2_nonpositive(weights);
    for_each<2>([&](int i) {
      totals[i] += weights[i];
      moments[i] += weights[i] * below[i];
    });
  }
  partial.total += sum(totals[0] + totals[1]);
  partial.moment += sum(moments[0] + moments[1]);
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

// Rows [first_row, first_row + panels.num_rows) of hidden, of type T, against the vocabulary.
template <typename Product, typename T>
class HeadRows {
 public:
  HeadRows(const OptionLogprobs& problem, const std::vector<int64_t>& sorted_targets, int64_t first, int64_t count)
      : p(problem),
        order(sorted_targets),
        first_row(first),
        panels(count, Product::kPanelRows, Product::kHasTiles),
        depth(padded_depth<Product>(p.hidden_size)),
        panel_numbers(blocks_of(p.hidden_size) * kPanel),
        copied(allocate_numbers(panels.count * panel_numbers)) {}

  static int64_t most_rows(int64_t hidden_size) {
    const int64_t bytes = blocks_of(hidden_size) * kPanel * static_cast<int64_t>(sizeof(Number));
    return std::max<int64_t>(kPackedRowBytes / bytes, 1) * Product::kPanelRows;
  }

  int64_t num_panels() const { return panels.count; }

  void copy_panel(int64_t panel) {
    const int64_t begin = panels.start(panel), count = panels.start(panel + 1) - begin;
    const T* rows = static_cast<const T*>(p.hidden) + (first_row + begin) * p.hidden_stride;
    Number* to = rows_of(panel);
    for (int64_t d = 0; d < p.hidden_size; d += Product::kDepth, to += kPanel) {
      Product::copy_rows([&](int64_t i) { return rows + i * p.hidden_stride + d; }, count,
                         std::min(Product::kDepth, p.hidden_size - d), to);
    }
  }

  // Tokens [first_token, last_token), into a partial result of each row.
  void score_chunk(int64_t first_token, int64_t last_token, Partial* partials) const {
    const int64_t fitting = kBlockBytes / (kColumns * depth * static_cast<int64_t>(sizeof(Number)));
    const int64_t block = kColumns * std::clamp<int64_t>(fitting, 1, kChunkColumns / kColumns);
    const Buffer packed = allocate_numbers(block * depth), tile = allocate(Product::kPanelRows * block);
    Number* columns = reinterpret_cast<Number*>(packed.get());
    const typename Product::Session session;
    for (int64_t begin = first_token; begin < last_token; begin += block) {
      const int64_t count = std::min(block, last_token - begin);
      for (int64_t t = 0; t < count; t += kColumns) pack_tokens(begin + t, columns + t * depth);
      for (int64_t panel = 0; panel < panels.count; ++panel) {
        multiply(panel, columns, count, tile.get());
        for (int64_t row = panels.start(panel); row < panels.start(panel + 1); ++row) {
          float* z = tile.get() + (row - panels.start(panel)) * kColumns;
          finish_row(row, {z, Product::kPanelRows * kColumns}, begin, count, partials[row]);
        }
      }
    }
  }

 private:
  using Number = typename Product::Number;
  static constexpr int64_t kPanel = Product::kPanelRows * Product::kDepth;

  static int64_t blocks_of(int64_t hidden_size) { return (hidden_size + Product::kDepth - 1) / Product::kDepth; }
  static Buffer allocate_numbers(int64_t count) {
    return allocate((count * static_cast<int64_t>(sizeof(Number)) + 3) / static_cast<int64_t>(sizeof(float)));
  }
  Number* rows_of(int64_t panel) const { return reinterpret_cast<Number*>(copied.get()) + panel * panel_numbers; }

  void pack_tokens(int64_t token, Number* columns) const {
    const WeightRows weight{p.weight, p.weight_stride, p.weight_type}, none{};
    for (int64_t d = 0; d < p.hidden_size; d += Product::kDepth) {
      pack_panel<Product>(weight, none, p.vocab_size, token / kColumns, d, std::min(Product::kDepth, p.hidden_size - d),
                          columns + d * kColumns);
    }
  }

  // tile[t / kColumns][row][kColumns], for `count` tokens t.
  void multiply(int64_t panel, const Number* columns, int64_t count, float* tile) const {
    const int64_t rows = panels.start(panel + 1) - panels.start(panel);
    const Number* row = rows_of(panel);
    for (int64_t d = 0; d < depth; d += Product::kDepth, row += kPanel) {
      for (int64_t t = 0; t < count; t += kColumns) {
        Product::multiply(rows, row, columns + t * depth + d * kColumns, std::min(Product::kDepth, depth - d),
                          tile + t * Product::kPanelRows, d == 0);
      }
    }
  }

  void finish_row(int64_t row, const Logits& logits, int64_t first_token, int64_t count, Partial& partial) const {
    const auto targets_end = order.begin() + p.token_offsets[first_row + row + 1];
    auto target = std::lower_bound(order.begin() + p.token_offsets[first_row + row], targets_end, first_token,
                                   [&](int64_t a, int64_t token) { return p.token_ids[a] < token; });
    for (; target != targets_end && p.token_ids[*target] < first_token + count; ++target) {
      p.logits[*target] = logits.of(p.token_ids[*target] - first_token);
    }
    for (int64_t i = count; i % kColumns != 0; ++i) logits.of(i) = kNoToken;
    reduce_logits(logits, count, first_token, partial);
  }

  const OptionLogprobs& p;
  const std::vector<int64_t>& order;  // see sort_targets
  const int64_t first_row;
  const RowPanels panels;
  const int64_t depth, panel_numbers;  // hidden_size in whole units of depth; numbers of a panel of rows
  const Buffer copied;                 // [panels, blocks of depth, kPanelRows, kDepth]
};

template <typename Product, typename T>
void option_logprobs_as(const OptionLogprobs& p, int num_threads) {
  const std::vector<int64_t> order = sort_targets(p);
  const int64_t chunks = (p.vocab_size + kChunkColumns - 1) / kChunkColumns;
  const int64_t most_rows = HeadRows<Product, T>::most_rows(p.hidden_size);
  for (int64_t first = 0; first < p.num_rows; first += most_rows) {
    const int64_t num_rows = std::min(most_rows, p.num_rows - first);
    HeadRows<Product, T> rows(p, order, first, num_rows);
    psykern::parallel_for(rows.num_panels(), num_threads, [&](int64_t panel) { rows.copy_panel(panel); });
    std::vector<Partial> partials(static_cast<size_t>(chunks * num_rows));
    psykern::parallel_for(chunks, num_threads, [&](int64_t c) {
      const int64_t begin = c * kChunkColumns;
      rows.score_chunk(begin, std::min(begin + kChunkColumns, p.vocab_size), partials.data() + c * num_rows);
    });
    for (int64_t row = 0; row < num_rows; ++row) combine(p, first + row, chunks, partials.data() + row, num_rows);
  }
}

void option_logprobs_isa(const OptionLogprobs& p, int num_threads) {
  if (p.hidden_type == FloatType::kFloat32) {
    option_logprobs_as<Fp32Product, float>(p, num_threads);
  } else if (p.weight_type == FloatType::kBfloat16) {
    option_logprobs_as<Bf16Product, uint16_t>(p, num_threads);
  } else {
    option_logprobs_as<Fp32Product, uint16_t>(p, num_threads);
  }
}

}  // namespace
