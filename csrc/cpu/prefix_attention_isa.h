// prefix_attention for one instruction set; included once per set by kernels_isa.cpp.
//
// A task is a run of queries that stand side by side in q, of one segment or of several whose paths begin alike, for
// one head of keys. Its rows are (query, head of the group). Keys are taken in tiles: places [t K, (t + 1) K) of the
// path, wherever they stand in the store. A tile is packed once for all rows of the task that see the same keys in it;
// then each panel of rows, at most kMaxPanel, computes its scores, the softmax so far, and adds to its output.
//
// Tiles begin at multiples of K on every path, and keys that a row does not see add nothing: a row's bits depend on
// neither the threads nor the other queries of the call.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "panels.h"
#include "parallel.h"
#include "prefix_attention.h"
#include "simd.h"

namespace {

using psykern::PrefixAttention;

constexpr int64_t kTileKeys = 256;               // K, a multiple of kColumns
constexpr int64_t kTaskQueryBytes = 256 * 1024;  // of a task's rows of q
constexpr int64_t kMostTaskRows = 768;
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
constexpr float kLowest = std::numeric_limits<float>::lowest();
static_assert(kMaxPanel <= kLanes && kTileKeys % kColumns == 0, "a panel's maxima fit one vector");

// A product of rows with columns in panels of kColumns, [panel][depth][kColumns], one `stride` behind the other.
struct Columns {
  const float* panels;
  int64_t count, stride, depth;
};

// out[i][c] = scale[i] * out[i][c] + sum over d of rows[i][d] * columns[d][c]; without kAdd the sum alone.
template <int kRows, bool kAdd>
void multiply_rows(const float* const* rows, const Columns& columns, float* const* out, const float* scale) {
  const float* row[kRows];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) row[i] = rows[i];
  for (int64_t panel = 0; panel < columns.count; ++panel) {
    const float* __restrict column = columns.panels + panel * columns.stride;
    const int64_t offset = panel * kColumns, depth = columns.depth;
    Vec sums[kRows][2] = {};
    for (int64_t d = 0; d < depth; ++d) {
      const Vec c0 = load(column + d * kColumns), c1 = load(column + d * kColumns + kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kRows; ++i) {
        const Vec x = broadcast(row[i][d]);
        sums[i][0] += x * c0;
        sums[i][1] += x * c1;
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      if (kAdd) {  // now, not before: the rounding of one sum over all tiles grows with the root of their number
        const Vec factor = broadcast(scale[i]);
        sums[i][0] += factor * load(out[i] + offset);
        sums[i][1] += factor * load(out[i] + offset + kLanes);
      }
      store(out[i] + offset, sums[i][0]);
      store(out[i] + offset + kLanes, sums[i][1]);
    }
  }
}

using MultiplyRows = void (*)(const float* const*, const Columns&, float* const*, const float*);

template <bool kAdd, int... kRows>
constexpr std::array<MultiplyRows, sizeof...(kRows)> multiply_rows_table(std::integer_sequence<int, kRows...>) {
  return {&multiply_rows<kRows + 1, kAdd>...};
}

inline void prefetch(const float* p, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(p + i);
}

// Queries of one segment.
struct Piece {
  int64_t segment, first_query, last_query;
  int64_t common;  // leading keys of its path that are those of the piece before
};

// What all tasks of a call read: the queries in pieces, neighbours of one task side by side.
struct Plan {
  std::vector<int64_t> range_places;  // place on its path where each range begins
  std::vector<Piece> pieces;
  std::vector<size_t> tasks;  // first piece of each task, and the end
  int64_t most_queries;       // of a task
};

// Leading places at which the paths of two segments have the same rows of the store.
int64_t common_keys(const PrefixAttention& p, int64_t a, int64_t b) {
  const int32_t *x = p.key_ranges + 2 * p.range_offsets[a], *x_end = p.key_ranges + 2 * p.range_offsets[a + 1];
  const int32_t *y = p.key_ranges + 2 * p.range_offsets[b], *y_end = p.key_ranges + 2 * p.range_offsets[b + 1];
  int64_t common = 0, x_used = 0, y_used = 0;
  while (x != x_end && y != y_end) {
    const int64_t x_left = x[1] - x[0] - x_used, y_left = y[1] - y[0] - y_used, step = std::min(x_left, y_left);
    if (step > 0 && x[0] + x_used != y[0] + y_used) break;
    common += step;
    x_used += step;
    y_used += step;
    if (step == x_left) x += 2, x_used = 0;
    if (step == y_left) y += 2, y_used = 0;
  }
  return common;
}

Plan plan_tasks(const PrefixAttention& p, int num_threads) {
  Plan plan;
  for (int64_t s = 0; s < p.num_segments; ++s) {
    int64_t place = 0;
    for (int64_t r = p.range_offsets[s]; r < p.range_offsets[s + 1]; ++r) {
      plan.range_places.push_back(place);
      place += p.key_ranges[2 * r + 1] - p.key_ranges[2 * r];
    }
  }
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t most_rows = kTaskQueryBytes / (p.head_dim * static_cast<int64_t>(sizeof(float)));
  // Small enough for four tasks a thread, large enough for two panels of rows.
  const int64_t fair_rows = p.query_offsets[p.num_segments] * p.num_heads / (4 * num_threads);
  const int64_t rows = std::min({std::max<int64_t>(fair_rows, 2 * kMaxPanel), most_rows, kMostTaskRows});
  plan.most_queries = std::max<int64_t>(rows / group, 1);
  int64_t before = -1, queries = 0;  // the segment of the piece before, the queries of the task so far
  for (int64_t s = 0; s < p.num_segments; ++s) {
    const int64_t first = p.query_offsets[s], count = p.query_offsets[s + 1] - first;
    const int64_t cuts = (count + plan.most_queries - 1) / plan.most_queries;
    for (int64_t i = 0; i < cuts; ++i) {
      const Piece piece{s, first + count * i / cuts, first + count * (i + 1) / cuts,
                        i > 0 ? kNoLimit : (before < 0 ? 0 : common_keys(p, before, s))};
      const int64_t size = piece.last_query - piece.first_query, keys = p.positions[piece.last_query - 1] + 1;
      if (plan.pieces.empty() || queries + size > plan.most_queries || piece.common < keys / 2) {
        plan.tasks.push_back(plan.pieces.size());
        queries = 0;
      }
      plan.pieces.push_back(piece);
      queries += size;
      before = s;
    }
  }
  plan.tasks.push_back(plan.pieces.size());
  return plan;
}

// One task at work. The arrays are parts of one buffer of the thread.
class Task {
 public:
  Task(const PrefixAttention& problem, const Plan& call, size_t task, int64_t kv_head)
      : p(problem),
        plan(call),
        pieces(&call.pieces[call.tasks[task]]),
        num_pieces(call.tasks[task + 1] - call.tasks[task]),
        group(problem.num_heads / problem.num_kv_heads),
        width((problem.head_dim + kColumns - 1) / kColumns * kColumns),
        first_query(pieces[0].first_query),
        k(problem.k + kv_head * problem.head_dim),
        v(problem.v + kv_head * problem.head_dim),
        q(problem.q + kv_head * group * problem.head_dim),
        out(problem.out + kv_head * group * problem.head_dim) {}

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
  int64_t first_seen(int64_t query) const { return p.positions[query] - p.window + 1; }

  void take_memory(int64_t num_rows) {
    static thread_local Buffer memory;
    static thread_local int64_t capacity = 0;
    const int64_t sizes[] = {num_rows * p.head_dim,  num_rows * width,  num_rows * kLanes,     num_rows,
                             p.head_dim * kTileKeys, width * kTileKeys, kMaxPanel * kTileKeys, num_rows};
    float** const parts[] = {&queries, &outputs, &totals, &maxima, &keys, &values, &scores};
    int64_t needed = 0;
    for (const int64_t size : sizes) needed += (size + 15) / 16 * 16;
    if (needed > capacity) {
      memory = allocate(needed);
      capacity = needed;
    }
    float* next = memory.get();
    for (size_t i = 0; i < std::size(parts); ++i) {
      *parts[i] = next;
      next += (sizes[i] + 15) / 16 * 16;
    }
    run_rows = reinterpret_cast<int32_t*>(next);
  }

  void load_queries(int64_t num_rows) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const float* from = q + (first_query + row / group) * p.q_stride + row % group * p.head_dim;
      float* to = queries + row * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; ++d) to[d] = from[d] * p.scale;
    }
    std::fill(outputs, outputs + num_rows * width, 0.0f);
    std::fill(totals, totals + num_rows * kLanes, 0.0f);
    std::fill(maxima, maxima + num_rows, kLowest);
  }

  void store_outputs(int64_t num_rows) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const float *from = outputs + row * width, total = sum(load(totals + row * kLanes));
      float* to = out + (first_query + row / group) * p.out_stride + row % group * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; ++d) to[d] = from[d] / total;
    }
  }

  // Rows whose pieces agree on the keys that they see in the tile go together, with the keys of the longest of them.
  void attend_tile() {
    packed_end = begin;
    values_are_finite = true;
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
    pack(source.segment, std::max(begin, std::min(usable, packed_end) / kLanes * kLanes), end);
    packed_end = end;
    const RowPanels panels(num_rows);
    for (int64_t i = 0; i < panels.count; ++i) {
      attend_panel(run_rows + panels.start(i), panels.start(i + 1) - panels.start(i));
    }
  }

  // Keys and values at places [first, last) of the segment's path; `first` is a multiple of kLanes.
  void pack(int64_t segment, int64_t first, int64_t last) {
    int64_t rows[kTileKeys];
    const auto begin_places = plan.range_places.begin() + p.range_offsets[segment];
    const auto end_places = plan.range_places.begin() + p.range_offsets[segment + 1];
    int64_t range = std::upper_bound(begin_places, end_places, first) - plan.range_places.begin() - 1;
    for (int64_t place = first; place < last; ++range) {
      const int64_t row = p.key_ranges[2 * range] - plan.range_places[static_cast<size_t>(range)];
      const int64_t stop = std::min(last, p.key_ranges[2 * range + 1] - row);
      for (; place < stop; ++place) rows[place - first] = row + place;
    }
    Vec zero = {};
    for (int64_t i = 0; i < last - first; i += kLanes) {
      const int64_t column = first + i - begin, here = std::min<int64_t>(last - first - i, kLanes);
      for (int64_t j = i + kLanes; j < std::min<int64_t>(i + 2 * kLanes, last - first); ++j) {
        prefetch(k + rows[j] * p.k_stride, p.head_dim);
        prefetch(v + rows[j] * p.v_stride, p.head_dim);
      }
      pack_half_panel([&](int64_t j) { return k + rows[i + j] * p.k_stride; }, here, p.head_dim,
                      keys + column / kColumns * kColumns * p.head_dim + column % kColumns);
      for (int64_t j = 0; j < here; ++j)
        zero += pack_values(v + rows[i + j] * p.v_stride, values + (column + j) * kColumns);
    }
    if (!(sum(zero) == 0.0f)) values_are_finite = false;
  }

  // One key's values, in panels of columns. Gives zero, or NaN where one is not finite.
  Vec pack_values(const float* from, float* to) {
    Vec zero = {};
    int64_t d = 0;
    for (; d + kLanes <= p.head_dim; d += kLanes) {
      const Vec x = load(from + d);
      zero += x - x;
      store(to + d / kColumns * kColumns * kTileKeys + d % kColumns, x);
    }
    for (; d < width; ++d) {
      const float x = d < p.head_dim ? from[d] : 0.0f;
      zero[0] += x - x;
      to[d / kColumns * kColumns * kTileKeys + d % kColumns] = x;
    }
    return zero;
  }

  void attend_panel(const int32_t* rows, int64_t count) {
    static constexpr auto kMultiply = multiply_rows_table<false>(std::make_integer_sequence<int, kMaxPanel>{});
    static constexpr auto kMultiplyAdd = multiply_rows_table<true>(std::make_integer_sequence<int, kMaxPanel>{});
    const float *query[kMaxPanel] = {}, *weight[kMaxPanel] = {};
    float *score[kMaxPanel] = {}, *output[kMaxPanel] = {};
    int64_t low[kMaxPanel], high[kMaxPanel];  // columns of the tile that the row sees
    int64_t first = kTileKeys, last = 0;      // that any row of the panel sees
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = first_query + rows[i] / group;
      query[i] = queries + rows[i] * p.head_dim;
      output[i] = outputs + rows[i] * width;
      low[i] = std::max<int64_t>(first_seen(n) - begin, 0);
      high[i] = std::min<int64_t>(p.positions[n] + 1 - begin, kTileKeys);
      first = std::min(first, low[i]);
      last = std::max(last, high[i]);
    }
    const int64_t first_column = first / kColumns * kColumns, end_column = (last + kColumns - 1) / kColumns * kColumns;
    const int64_t columns = end_column - first_column;
    for (int64_t i = 0; i < count; ++i) score[i] = scores + i * kTileKeys + first_column;
    const size_t rows_of_panel = static_cast<size_t>(count - 1);
    kMultiply[rows_of_panel](query,
                             {keys + first_column * p.head_dim, columns / kColumns, p.head_dim * kColumns, p.head_dim},
                             score, nullptr);
    bool is_masked = false;
    for (int64_t i = 0; i < count; ++i) {
      if (low[i] > first_column || high[i] < end_column) {
        mask(score[i], columns, low[i] - first_column, high[i] - first_column);
        is_masked = true;
      }
    }
    float scale[kLanes];
    reweigh(rows, count, score, columns, scale);
    if (is_masked && !values_are_finite) {  // row by row: 0 times NaN is not 0
      for (int64_t i = 0; i < count; ++i) {
        weight[i] = scores + i * kTileKeys + low[i];
        kMultiplyAdd[0](weight + i, values_at(low[i], high[i]), output + i, scale + i);
      }
    } else {
      for (int64_t i = 0; i < count; ++i) weight[i] = scores + i * kTileKeys + first;
      kMultiplyAdd[rows_of_panel](weight, values_at(first, last), output, scale);
    }
  }

  Columns values_at(int64_t first, int64_t last) const {
    return {values + first * kColumns, width / kColumns, kTileKeys * kColumns, last - first};
  }

  static void mask(float* z, int64_t columns, int64_t low, int64_t high) {
    if (low > 0) std::fill(z, z + low, -std::numeric_limits<float>::infinity());
    if (high < columns) std::fill(z + high, z + columns, -std::numeric_limits<float>::infinity());
  }

  // Scores become weights exp(z - maximum); gives the factor that brings each row's earlier sums to the new maximum.
  void reweigh(const int32_t* rows, int64_t count, float* const* z, int64_t columns, float* scale) {
    Vec highest[kLanes];
    float maximum_before[kLanes] = {}, maximum_now[kLanes];
    for (int64_t i = 0; i < count; ++i) {
      Vec a = load(z[i]), b = load(z[i] + kLanes);
      for (int64_t c = kColumns; c < columns; c += kColumns) {
        a = maximum(a, load(z[i] + c));
        b = maximum(b, load(z[i] + c + kLanes));
      }
      highest[i] = maximum(a, b);
      maximum_before[i] = maxima[rows[i]];
    }
    for (int64_t i = count; i < kLanes; ++i) highest[i] = Vec{};
    transpose(highest);
    const Vec before = load(maximum_before);
    Vec now = before;
    for (int i = 0; i < kLanes; ++i) now = maximum(now, highest[i]);
    store(maximum_now, now);
    store(scale, exp_nonpositive(before - now));
    for (int64_t i = 0; i < count; ++i) {
      maxima[rows[i]] = maximum_now[i];
      const Vec shift = broadcast(maximum_now[i]);
      Vec a = {}, b = {};
      for (int64_t c = 0; c < columns; c += kColumns) {
        const Vec x = exp_nonpositive(load(z[i] + c) - shift), y = exp_nonpositive(load(z[i] + c + kLanes) - shift);
        store(z[i] + c, x);
        store(z[i] + c + kLanes, y);
        a += x;
        b += y;
      }
      store(totals + rows[i] * kLanes, broadcast(scale[i]) * load(totals + rows[i] * kLanes) + (a + b));
    }
  }

  const PrefixAttention& p;
  const Plan& plan;
  const Piece* pieces;
  size_t num_pieces;
  int64_t group, width, first_query;  // width: head_dim in whole panels of columns
  const float *k, *v, *q;             // of the task's heads
  float* out;

  float* queries;     // [rows, head_dim], times scale
  float* outputs;     // [rows, width], not yet divided by the totals
  float* totals;      // [rows, kLanes], of the weights
  float* maxima;      // [rows], of the scores
  float* keys;        // [kTileKeys / kColumns, head_dim, kColumns]
  float* values;      // [width / kColumns, kTileKeys, kColumns]
  float* scores;      // [kMaxPanel, kTileKeys], then weights
  int32_t* run_rows;  // that see the packed keys

  int64_t begin = 0;       // place of the tile
  int64_t packed_end = 0;  // of the keys that are packed
  bool values_are_finite = true;
};

void prefix_attention_isa(const PrefixAttention& p, int num_threads) {
  const Plan plan = plan_tasks(p, num_threads);
  const int64_t num_tasks = static_cast<int64_t>(plan.tasks.size()) - 1;
  psykern::parallel_for(num_tasks * p.num_kv_heads, num_threads, [&](int64_t i) {
    const int64_t task = num_tasks - 1 - i / p.num_kv_heads;  // those with the most keys first
    Task(p, plan, static_cast<size_t>(task), i % p.num_kv_heads).run();
  });
}

}  // namespace
