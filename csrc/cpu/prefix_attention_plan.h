// How the queries of a call of prefix_attention are cut into tasks; included once per instruction set.
//
// A task is a run of queries that stand side by side in q, of one segment or of several whose paths begin alike.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "prefix_attention.h"

namespace {

using psykern::PrefixAttention;

constexpr int64_t kTaskOutputBytes = 384 * 1024;  // of a task's sums
constexpr int64_t kMostTaskRows = 768;
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

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

  // The store's rows of the keys at places [first, last) of the segment's path.
  void find_rows(const PrefixAttention& p, int64_t segment, int64_t first, int64_t last, int64_t* rows) const {
    const auto begin_places = range_places.begin() + p.range_offsets[segment];
    const auto end_places = range_places.begin() + p.range_offsets[segment + 1];
    int64_t range = std::upper_bound(begin_places, end_places, first) - range_places.begin() - 1;
    for (int64_t place = first; place < last; ++range) {
      const int64_t row = p.key_ranges[2 * range] - range_places[static_cast<size_t>(range)];
      const int64_t stop = std::min(last, p.key_ranges[2 * range + 1] - row);
      for (; place < stop; ++place) rows[place - first] = row + place;
    }
  }
};

// Leading places at which the paths of two segments have the same rows of the store.
inline int64_t common_keys(const PrefixAttention& p, int64_t a, int64_t b) {
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

// `panel_rows`: of the product.
inline Plan plan_tasks(const PrefixAttention& p, int64_t panel_rows, int num_threads) {
  Plan plan;
  for (int64_t s = 0; s < p.num_segments; ++s) {
    int64_t place = 0;
    for (int64_t r = p.range_offsets[s]; r < p.range_offsets[s + 1]; ++r) {
      plan.range_places.push_back(place);
      place += p.key_ranges[2 * r + 1] - p.key_ranges[2 * r];
    }
  }
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t most_rows = kTaskOutputBytes / (p.head_dim * static_cast<int64_t>(sizeof(float)));
  // Small enough for four tasks a thread, large enough for two panels of rows.
  const int64_t fair_rows = p.query_offsets[p.num_segments] * p.num_heads / (4 * num_threads);
  const int64_t rows = std::min({std::max<int64_t>(fair_rows, 2 * panel_rows), most_rows, kMostTaskRows});
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

}  // namespace
