// prefix_attention for one instruction set; included once per set by kernels_isa.cpp.
//
// A task (prefix_attention_plan.h) has one head of keys; its rows are (query, head of the group). Keys are taken in
// tiles: places [t K, (t + 1) K) of the path, wherever they stand in the store. A tile is packed once for all rows of
// the task that see the same keys in it; then each panel of rows computes its scores, the softmax so far, and adds to
// its output.
//
// Tiles begin at multiples of K on every path, and keys that a row does not see add nothing: a row's bits depend on
// neither the threads nor the other queries of the call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "key_tile_isa.h"
#include "panels.h"
#include "parallel.h"
#include "prefix_attention.h"
#include "prefix_attention_plan.h"
#include "product_isa.h"
#include "simd.h"

namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kLargeScore = 1 << 20;  // a product's rounding above it is no longer small beside 1

// Weights 2^x go to `to`, and are added to the sums of all.
template <int kVectors>
void put_weights(float* to, Vec (&x)[kVectors], Vec (&sums)[2]) {
  exp2_nonpositive(x);
  for_each<kVectors>([&](int i) {
    store(to + i * kLanes, x[i]);
    sums[i % 2] += x[i];
  });
}
#if defined(__AVX512BF16__)
// Rounded, and the sum is of what was rounded: then the weights of an output add up to 1, and rounding moves it by
// their errors times (v - output), not times v.
template <int kVectors>
void put_weights(uint16_t* to, Vec (&x)[kVectors], Vec (&sums)[2]) {
  exp2_coarse(x);
  for_each<kVectors / 2>([&](int i) {
    const auto first = reinterpret_cast<__m512>(x[2 * i]), second = reinterpret_cast<__m512>(x[2 * i + 1]);
    const __m512bh pairs = _mm512_cvtne2ps_pbh(second, first),
                   ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    std::memcpy(to + i * kColumns, &pairs, sizeof pairs);
    sums[0] = reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[0]), pairs, ones));
  });
}
#endif

// One task at work. The arrays are parts of one buffer of the thread.
template <typename Product, typename T>
class AttentionTask {
 public:
  AttentionTask(const PrefixAttention& problem, const Plan& call, size_t task, int64_t kv_head)
      : p(problem),
        plan(call),
        pieces(&call.pieces[call.tasks[task]]),
        num_pieces(call.tasks[task + 1] - call.tasks[task]),
        tile(problem, kv_head),
        group(problem.num_heads / problem.num_kv_heads),
        first_query(pieces[0].first_query),
        q(static_cast<const T*>(problem.q) + kv_head * group * problem.head_dim),
        out(static_cast<T*>(problem.out) + kv_head * group * problem.head_dim),
        score_scale(static_cast<float>(static_cast<double>(problem.scale) * 1.4426950408889634)) {}

  void run() {
    const int64_t num_rows = (pieces[num_pieces - 1].last_query - first_query) * group;
    take_memory(num_rows);
    load_queries(num_rows);
    int64_t first = kNoLimit, last = 0;  // places that any query sees
    for (size_t i = 0; i < num_pieces; ++i) {
      first = std::min(first, first_seen(pieces[i].first_query));
      last = std::max<int64_t>(last, p.positions[pieces[i].last_query - 1] + 1);
    }
    for (begin = std::max<int64_t>(first, 0) / kTileKeys * kTileKeys; begin < last; begin += kTileKeys) attend_tile();
    store_outputs(num_rows);
  }

 private:
  using Number = typename Product::Number;
  static constexpr int64_t kRows = Product::kPanelRows, kDepth = Product::kDepth;
  static_assert(kTileKeys <= kDepth, "the weights of a row are one block");

  // Rows of the task that see the packed keys, as one panel, and which columns of the tile.
  struct Panel {
    const int32_t* rows;
    int64_t count;
    int32_t low[kRows], high[kRows];   // that the row sees
    int64_t first, last;               // that any of them sees
    int64_t first_column, end_column;  // the same in whole panels of columns
    bool is_masked;                    // a row does not see all of these
  };

  int64_t first_seen(int64_t query) const { return p.positions[query] - p.window + 1; }

  void take_memory(int64_t num_rows) {
    static thread_local Buffer memory;
    static thread_local int64_t capacity = 0;
    const int64_t needed = lay_out(nullptr, num_rows);
    if (needed > capacity) {
      memory = allocate(needed);
      capacity = needed;
    }
    lay_out(memory.get(), num_rows);
  }

  // Gives each array its part of `memory`, unless that is null, and the number of floats that they take.
  int64_t lay_out(float* memory, int64_t num_rows) {
    int64_t used = 0;
    const auto take = [&](auto*& array, int64_t count) {
      if (memory != nullptr) array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory + used);
      used += (count * static_cast<int64_t>(sizeof(*array)) + 63) / 64 * 16;
    };
    query_block = (num_rows + kRows) * kDepth;  // a product reads a whole panel
    take(outputs, num_rows * tile.width);
    take(totals, num_rows * kLanes);
    take(maxima, num_rows);
    take(row_positions, num_rows);
    take(run_rows, num_rows);
    take(queries, (p.head_dim + kDepth - 1) / kDepth * query_block);
    take(panel_queries, kRows * kDepth);
    take(scores, kRows * kTileKeys);
    take(weights, kRows * kDepth);
    take(sums, kRows * kColumns);
    take(tile.keys, tile.depth * kTileKeys);
    take(tile.values, tile.width * kTileKeys);
    take(tile.seen_values, kTileKeys * kColumns);
    return used;
  }

  void load_queries(int64_t num_rows) {
    for (int64_t row = 0, n = first_query; row < num_rows; ++n) {
      for (int64_t head = 0; head < group; ++head, ++row) {
        const T* from = q + n * p.q_stride + head * p.head_dim;
        for (int64_t d = 0; d < p.head_dim; d += kDepth) {
          const int64_t here = std::min(kDepth, p.head_dim - d);
          Number* to = queries + d / kDepth * query_block + row * kDepth;
          Product::copy_row(from + d, here, to);
        }
        row_positions[row] = p.positions[n];
      }
    }
    std::fill(outputs, outputs + num_rows * tile.width, 0.0f);
    std::fill(totals, totals + num_rows * kLanes, 0.0f);
    std::fill(maxima, maxima + num_rows, kLowest);
    tile.clear_padding();
  }

  void store_outputs(int64_t num_rows) {
    for (int64_t row = 0, n = first_query; row < num_rows; ++n) {
      for (int64_t head = 0; head < group; ++head, ++row) {
        const float *from = outputs + row * tile.width, total = sum(load(totals + row * kLanes));
        T* to = out + n * p.out_stride + head * p.head_dim;
        int64_t d = 0;
        for (; d + kLanes <= p.head_dim; d += kLanes) store(to + d, load(from + d) / broadcast(total));
        for (; d < p.head_dim; ++d) put(to + d, from[d] / total);
      }
    }
  }
  static void put(float* to, float x) { *to = x; }
  static void put(uint16_t* to, float x) { *to = narrow(x); }

  // Rows whose pieces agree on the keys that they see in the tile go together, with the keys of the longest of them.
  void attend_tile() {
    packed_end = begin;
    tile.values_are_finite = true;
    int64_t num_rows = 0;
    const Piece* source = nullptr;  // of the run's keys, which are needed up to `end`
    int64_t end = begin, common_with_source = 0, common_with_packed = kNoLimit, usable = 0;
    for (const Piece* piece = pieces; piece != pieces + num_pieces; ++piece) {
      common_with_source = std::min(common_with_source, piece->common);
      common_with_packed = std::min(common_with_packed, piece->common);
      const int32_t* position = p.positions;
      const int64_t first =
          std::lower_bound(position + piece->first_query, position + piece->last_query, begin) - position;
      int64_t last = piece->last_query;
      while (last > first && first_seen(last - 1) >= begin + kTileKeys) --last;
      if (first == last) continue;
      const int64_t piece_end = std::min<int64_t>(position[last - 1] + 1, begin + kTileKeys);
      if (num_rows > 0 && common_with_source < std::min(end, piece_end)) {
        attend_run(*source, usable, end, num_rows);
        common_with_packed = common_with_source;
        num_rows = 0;
      }
      if (num_rows == 0 || piece_end > end) {
        source = piece;
        end = piece_end;
        usable = common_with_packed;
        common_with_source = kNoLimit;
      }
      for (int64_t row = (first - first_query) * group; row < (last - first_query) * group; ++row) {
        run_rows[num_rows++] = static_cast<int32_t>(row);
      }
    }
    if (num_rows > 0) attend_run(*source, usable, end, num_rows);
  }

  // The rows of run_rows with the keys of `source` at places [begin, end), of which those before `usable` are packed
  // already as far as anything is.
  void attend_run(const Piece& source, int64_t usable, int64_t end, int64_t num_rows) {
    const int64_t first = std::max(begin, std::min(usable, packed_end) / kLanes * kLanes);
    int64_t rows[kTileKeys];
    plan.find_rows(p, source.segment, first, end, rows);
    tile.pack(rows, first - begin, end - first);
    packed_end = end;
    const RowPanels panels(num_rows, kRows, Product::kHasTiles);
    for (int64_t i = 0; i < panels.count; ++i) {
      attend_panel(run_rows + panels.start(i), panels.start(i + 1) - panels.start(i));
    }
  }

  void attend_panel(const int32_t* rows, int64_t count) {
    const Panel panel = find_columns(rows, count);
    for (int64_t d = 0; d < tile.depth; d += kDepth) {
      const Number *query = queries_of(panel, d / kDepth), *key = tile.keys + d * kColumns;
      const int64_t here = std::min(kDepth, tile.depth - d);
      for (int64_t c = panel.first_column; c < panel.end_column; c += kColumns) {
        Product::multiply(count, query, key + c * tile.depth, here, scores_of(c, 0), d == 0);
      }
    }
    for (int64_t i = 0; i < count && panel.is_masked; ++i) mask(panel, i);
    float scale[kRows];
    for (int64_t i = 0; i < count; i += kLanes) weigh(panel, i, std::min<int64_t>(count - i, kLanes), scale);
    add_values(panel, scale);
  }

  // Weights times values, to the outputs, which are scaled before.
  void add_values(const Panel& panel, const float* scale) {
    const int64_t first = panel.first / Product::kDepthUnit * Product::kDepthUnit;
    const int64_t keys = padded_depth<Product>(panel.last) - first;
    for (int64_t d = 0; d < tile.width; d += kColumns) {
      if (!panel.is_masked || tile.values_are_finite) {
        const Number* columns = tile.values + d * kTileKeys + first * kColumns;
        Product::multiply(panel.count, weights + first, columns, keys, sums, true);
        for (int64_t i = 0; i < panel.count; ++i) add_sums(panel.rows[i], i, d, scale[i]);
        continue;
      }
      for (int64_t i = 0; i < panel.count; ++i) {  // row by row: 0 times NaN is not 0
        const Number* columns = tile.only_seen_values(d, panel.low[i], panel.high[i]) + first * kColumns;
        Product::multiply(panel.count, weights + first, columns, keys, sums, true);
        add_sums(panel.rows[i], i, d, scale[i]);
      }
    }
  }

  Panel find_columns(const int32_t* rows, int64_t count) const {
    Panel panel;
    panel.rows = rows, panel.count = count;
    const auto place = static_cast<int32_t>(begin), window = static_cast<int32_t>(p.window);
    int32_t first = kTileKeys, last = 0, highest_low = 0, lowest_high = kTileKeys;
    for (int64_t i = 0; i < count; ++i) {
      panel.low[i] = std::max(row_positions[rows[i]] - place + (1 - window), 0);
      panel.high[i] = std::min<int32_t>(row_positions[rows[i]] - place + 1, kTileKeys);
      first = std::min(first, panel.low[i]);
      last = std::max(last, panel.high[i]);
      highest_low = std::max(highest_low, panel.low[i]);
      lowest_high = std::min(lowest_high, panel.high[i]);
    }
    panel.first = first, panel.last = last;
    panel.first_column = panel.first / kColumns * kColumns;
    panel.end_column = (panel.last + kColumns - 1) / kColumns * kColumns;
    panel.is_masked = highest_low > panel.first_column || lowest_high < panel.end_column;
    return panel;
  }

  // A block of the depth of the panel's queries, one behind the other.
  const Number* queries_of(const Panel& panel, int64_t block) {
    const Number* from = queries + block * query_block;
    if (panel.rows[panel.count - 1] - panel.rows[0] == panel.count - 1) return from + panel.rows[0] * kDepth;
    for (int64_t i = 0; i < panel.count; ++i) {
      std::memcpy(panel_queries + i * kDepth, from + panel.rows[i] * kDepth,
                  static_cast<size_t>(std::min(tile.depth, kDepth)) * sizeof(Number));
    }
    return panel_queries;
  }

  float* scores_of(int64_t column, int64_t i) const { return scores + column * kRows + i * kColumns; }

  // The scores of keys that row i does not see become -inf.
  void mask(const Panel& panel, int64_t i) {
    constexpr float kUnseen = -std::numeric_limits<float>::infinity();
    const int64_t low = panel.low[i], high = panel.high[i];
    for (int64_t c = panel.first_column; c < low; c += kColumns) {
      float* z = scores_of(c, i);
      std::fill(z, z + std::min<int64_t>(low - c, kColumns), kUnseen);
    }
    for (int64_t c = high / kColumns * kColumns; c < panel.end_column; c += kColumns) {
      float* z = scores_of(c, i);
      std::fill(z + std::max<int64_t>(high - c, 0), z + kColumns, kUnseen);
    }
  }

  // Scores of rows [first, first + count) of the panel, at most kLanes, become weights 2^(z - maximum), z in units of
  // log 2; gives the factor that brings each row's earlier sums to the new maximum.
  void weigh(const Panel& panel, int64_t first, int64_t count, float* scale) {
    Vec highest[kLanes];
    float maximum_before[kLanes] = {}, maximum_now[kLanes];
    for (int64_t i = 0; i < count; ++i) {
      Vec a = load(scores_of(panel.first_column, first + i)),
          b = load(scores_of(panel.first_column, first + i) + kLanes);
      for (int64_t c = panel.first_column + kColumns; c < panel.end_column; c += kColumns) {
        a = maximum(a, load(scores_of(c, first + i)));
        b = maximum(b, load(scores_of(c, first + i) + kLanes));
      }
      highest[i] = maximum(a, b);
      maximum_before[i] = maxima[panel.rows[first + i]];
    }
    for (int64_t i = count; i < kLanes; ++i) highest[i] = Vec{};
    transpose(highest);
    Vec now = highest[0];
    for (int i = 1; i < kLanes; ++i) now = maximum(now, highest[i]);
    const Vec before = load(maximum_before);
    now = maximum(before, now * broadcast(score_scale));
    store(maximum_now, now);
    Vec factor[1] = {before - now};
    exp2_nonpositive(factor);
    store(maximum_before, factor[0]);
    for (int64_t i = 0; i < count; ++i) {
      maxima[panel.rows[first + i]] = maximum_now[i];
      scale[first + i] = maximum_before[i];
      weigh_row(panel, first + i, maximum_now[i], maximum_before[i]);
    }
  }

  void weigh_row(const Panel& panel, int64_t i, float maximum_now, float scale) {
    const bool is_large = std::abs(maximum_now) > kLargeScore;
    if (is_large) {  // rounded like the maximum
      for (int64_t c = panel.first_column; c < panel.end_column; c += kLanes) {
        float* z = scores_of(c / kColumns * kColumns, i) + c % kColumns;
        store(z, load(z) * broadcast(score_scale));
      }
    }
    const Vec factor = broadcast(is_large ? 1.0f : score_scale), shift = broadcast(maximum_now);
    const float* z = scores_of(panel.first_column, i);
    Number* to = weights + i * kDepth + panel.first_column;
    Vec added[2] = {};
    int64_t c = panel.first_column;
    for (; c + 2 * kColumns <= panel.end_column; c += 2 * kColumns, z += 2 * kColumns * kRows, to += 2 * kColumns) {
      Vec x[4];
      for_each<4>([&](int j) { x[j] = load(z + j / 2 * kColumns * kRows + j % 2 * kLanes) * factor - shift; });
      put_weights(to, x, added);
    }
    if (c < panel.end_column) {
      Vec x[2] = {load(z) * factor - shift, load(z + kLanes) * factor - shift};
      put_weights(to, x, added);
    }
    float* total = totals + panel.rows[i] * kLanes;
    store(total, broadcast(scale) * load(total) + (added[0] + added[1]));
  }

  // Row i of `sums`, of columns from d on, to the output of `row`.
  void add_sums(int64_t row, int64_t i, int64_t d, float scale) {
    float* output = outputs + row * tile.width + d;
    const float* from = sums + i * kColumns;
    store(output, broadcast(scale) * load(output) + load(from));
    store(output + kLanes, broadcast(scale) * load(output + kLanes) + load(from + kLanes));
  }

  const PrefixAttention& p;
  const Plan& plan;
  const Piece* pieces;
  const size_t num_pieces;
  KeyTile<Product, T> tile;
  const int64_t group, first_query;
  const T* q;  // of the task's heads
  T* out;
  const float score_scale;  // from a product to a score in units of log 2

  float* outputs = nullptr;          // [rows, tile.width], not yet divided by the totals
  float* totals = nullptr;           // [rows, kLanes], of the weights
  float* maxima = nullptr;           // [rows], of the scores
  int32_t* row_positions = nullptr;  // [rows]
  int32_t* run_rows = nullptr;       // that see the packed keys
  Number* queries = nullptr;         // [head_dim / kDepth, rows + kRows, kDepth]
  int64_t query_block = 0;           // numbers of the last two dimensions
  Number* panel_queries = nullptr;   // [kRows, kDepth] of a panel whose rows lie apart
  float* scores = nullptr;           // [kTileKeys / kColumns, kRows, kColumns] of a panel
  Number* weights = nullptr;         // [kRows, kDepth] of a panel
  float* sums = nullptr;             // [kRows, kColumns] of a panel, weights times values

  int64_t begin = 0;       // place of the tile
  int64_t packed_end = 0;  // of the keys that are packed
};

template <typename Product, typename T>
void prefix_attention_as(const PrefixAttention& p, int num_threads) {
  const Plan plan = plan_tasks(p, Product::kPanelRows, num_threads);
  const int64_t num_tasks = static_cast<int64_t>(plan.tasks.size()) - 1;
  psykern::parallel_for(num_tasks * p.num_kv_heads, num_threads, [&](int64_t i) {
    const int64_t task = num_tasks - 1 - i / p.num_kv_heads;  // those with the most keys first
    const typename Product::Session session;
    AttentionTask<Product, T>(p, plan, static_cast<size_t>(task), i % p.num_kv_heads).run();
  });
}

void prefix_attention_isa(const PrefixAttention& p, int num_threads) {
  if (p.type == psykern::FloatType::kBfloat16) {
    prefix_attention_as<Bf16RowProduct, uint16_t>(p, num_threads);
  } else {
    prefix_attention_as<Fp32RowProduct, float>(p, num_threads);
  }
}

}  // namespace
