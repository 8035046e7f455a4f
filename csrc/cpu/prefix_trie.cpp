#include "prefix_trie.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace psykern {
namespace {

struct EdgeKey {
  int32_t node, offset, token;  // node: a segment, or a root r as -1 - r
  bool operator==(const EdgeKey& other) const {
    return node == other.node && offset == other.offset && token == other.token;
  }
};

struct EdgeHash {
  size_t operator()(const EdgeKey& key) const {
    uint64_t h = (static_cast<uint64_t>(static_cast<uint32_t>(key.node)) << 32) | static_cast<uint32_t>(key.offset);
    h = (h ^ (h >> 31)) * 0x9E3779B97F4A7C15ULL + static_cast<uint32_t>(key.token);
    return static_cast<size_t>((h ^ (h >> 29)) * 0xBF58476D1CE4E5B9ULL);
  }
};

// Child segment by the token before it and its own first token.
using Edges = std::unordered_map<EdgeKey, int32_t, EdgeHash>;

int64_t common_prefix(const int32_t* a, int64_t a_length, const int32_t* b, int64_t b_length) {
  const int64_t limit = std::min(a_length, b_length);
  return std::mismatch(a, a + limit, b).first - a;
}

// Appends [begin, end), merged with the interval before where they touch.
void append(std::vector<Interval>& intervals, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (!intervals.empty() && intervals.back().end == begin) {
    intervals.back().end = end;
  } else {
    intervals.push_back({begin, end});
  }
}

void check(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

void check_arguments(const Sequences& sequences, const Branches& branches, int64_t min_share,
                     const WaveBudget& budget) {
  check(min_share >= 1, "min_share: expected at least 1 token, got " + std::to_string(min_share));
  check(budget.rows >= 1, "wave_tokens: expected at least 1, got " + std::to_string(budget.rows));
  check(budget.carried_price >= 0 && std::isfinite(budget.carried_price),
        "carried_price: expected a finite number, not negative, got " + std::to_string(budget.carried_price));
  check(sequences.count < INT32_MAX, "a group of at most 2^31 - 2 transcripts can be planned");
  check(sequences.roots < INT32_MAX, "at most 2^31 - 2 roots can be planned");
  for (int64_t r = 0; r < sequences.roots; ++r) {
    check(sequences.root_base[r] >= 0, "root_base[" + std::to_string(r) + "]: expected no negative number of tokens");
  }
  for (int64_t i = 0; i < sequences.count; ++i) {
    check(sequences.root[i] >= 0 && sequences.root[i] < sequences.roots,
          "root[" + std::to_string(i) + "]: expected 0 to " + std::to_string(sequences.roots - 1) + ", got " +
              std::to_string(sequences.root[i]));
    const int64_t own = sequences.offsets[i + 1] - sequences.offsets[i];
    check(sequences.lengths[i] >= 0 && sequences.lengths[i] <= own &&
              own + sequences.root_base[sequences.root[i]] < INT32_MAX,
          "lengths[" + std::to_string(i) + "]: expected 0 to " + std::to_string(own) + " tokens, got " +
              std::to_string(sequences.lengths[i]));
  }
  for (int64_t b = 0; b < branches.count; ++b) {
    const std::string name = "branch " + std::to_string(b) + ": ";
    check(branches.sequence[b] >= 0 && branches.sequence[b] < sequences.count, name + "no such sequence");
    check(b == 0 || branches.sequence[b] >= branches.sequence[b - 1], name + "sequences must ascend");
    check(branches.parent[b] >= 0 && branches.parent[b] <= sequences.lengths[branches.sequence[b]],
          name + "parent: expected 0 to " + std::to_string(sequences.lengths[branches.sequence[b]]) + " tokens, got " +
              std::to_string(branches.parent[b]));
    const int64_t length = branches.offsets[b + 1] - branches.offsets[b];
    const int32_t least = branches.parent[b] == 0 ? 1 : 0;  // the first token of all has nothing before it
    check(branches.scored[b] >= least && branches.scored[b] < length,
          name + "scored: expected " + std::to_string(least) + " to " + std::to_string(length - 1) + ", got " +
              std::to_string(branches.scored[b]));
  }
}

}  // namespace

PrefixTrie::PrefixTrie(const Sequences& sequences, const Branches& branches, int64_t min_share,
                       const WaveBudget& budget) {
  check_arguments(sequences, branches, min_share, budget);
  root_base_.assign(sequences.root_base, sequences.root_base + sequences.roots);
  add_sequences(sequences, min_share);
  add_branches(sequences, branches);
  lay_out_rows();
  cut_waves(budget);
  find_carried();
}

// Tokens of the segment's root.
int32_t PrefixTrie::base(const Segment& segment) const { return root_base_[static_cast<size_t>(segment.root)]; }

// Sorted, each sequence attaches to the path of its predecessor (kept as a stack) where the two part.
void PrefixTrie::add_sequences(const Sequences& sequences, int64_t min_share) {
  auto tokens = [&](int64_t i) { return sequences.token_ids + sequences.offsets[i]; };
  order_.resize(static_cast<size_t>(sequences.count));
  std::iota(order_.begin(), order_.end(), 0);
  std::sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
    if (sequences.root[a] != sequences.root[b]) return sequences.root[a] < sequences.root[b];
    const int64_t length_a = sequences.lengths[a], length_b = sequences.lengths[b];
    const int64_t shared = common_prefix(tokens(a), length_a, tokens(b), length_b);
    if (shared < length_a && shared < length_b) return tokens(a)[shared] < tokens(b)[shared];
    return length_a != length_b ? length_a < length_b : a < b;
  });

  leaf_.assign(static_cast<size_t>(sequences.count), -1);
  std::vector<int32_t> stack;  // segments of the predecessor's path
  for (size_t k = 0; k < order_.size(); ++k) {
    const int64_t i = order_[k], length = sequences.lengths[i];
    int64_t shared = 0;
    if (k > 0 && sequences.root[order_[k - 1]] == sequences.root[i]) {
      shared = common_prefix(tokens(order_[k - 1]), sequences.lengths[order_[k - 1]], tokens(i), length);
    }
    const bool is_prefix = shared == length;  // it needs no tokens of its own, so any share is free
    while (!stack.empty()) {
      const int32_t top = segments_[static_cast<size_t>(stack.back())].position;
      if (top < shared && (is_prefix || shared - top >= min_share)) break;
      shared = std::min<int64_t>(shared, top);
      stack.pop_back();
    }
    if (shared < length) {
      segments_.push_back({tokens(i) + shared, static_cast<int32_t>(length - shared), static_cast<int32_t>(shared),
                           stack.empty() ? -1 : stack.back(), sequences.root[i], 0});
      stack.push_back(static_cast<int32_t>(segments_.size()) - 1);
    }
    leaf_[static_cast<size_t>(i)] = stack.empty() ? -1 : stack.back();
  }
}

std::vector<int32_t> PrefixTrie::path_of(int64_t sequence) const {
  std::vector<int32_t> path;
  for (int32_t s = leaf_[static_cast<size_t>(sequence)]; s >= 0; s = segments_[static_cast<size_t>(s)].parent) {
    path.push_back(s);
  }
  std::reverse(path.begin(), path.end());
  return path;
}

// Follows each branch from its parent token along whatever the trie already holds, then adds the rest.
void PrefixTrie::add_branches(const Sequences& sequences, const Branches& branches) {
  if (branches.count == 0) return;
  Edges edges;
  auto add_edge = [&](int32_t child) {
    const Segment& s = segments_[static_cast<size_t>(child)];
    const int32_t offset = s.parent < 0 ? -1 : s.position - 1 - segments_[static_cast<size_t>(s.parent)].position;
    edges.emplace(EdgeKey{s.parent < 0 ? -1 - s.root : s.parent, offset, s.token_ids[0]}, child);
  };
  for (int32_t s = 0; s < static_cast<int32_t>(segments_.size()); ++s) add_edge(s);

  // The child of `at` by `token`, or segment -1, which as `at` is the root `root`.
  auto step = [&](Place at, int32_t root, int32_t token) -> Place {
    if (at.segment >= 0) {
      const Segment& s = segments_[static_cast<size_t>(at.segment)];
      if (at.offset + 1 < s.length && s.token_ids[at.offset + 1] == token) return {at.segment, at.offset + 1};
    }
    const auto found = edges.find(EdgeKey{at.segment < 0 ? -1 - root : at.segment, at.offset, token});
    return found == edges.end() ? Place{-1, 0} : Place{found->second, 0};
  };

  std::vector<int32_t> path;
  int64_t path_sequence = -1;
  std::vector<Place> places;  // before each token of the branch
  for (int64_t b = 0; b < branches.count; ++b) {
    if (branches.sequence[b] != path_sequence) path = path_of(path_sequence = branches.sequence[b]);
    const int32_t* token_ids = branches.token_ids + branches.offsets[b];
    const int64_t inputs = branches.offsets[b + 1] - branches.offsets[b] - 1;
    const int32_t parent_tok = branches.parent[b] - 1, root = sequences.root[branches.sequence[b]];
    const auto holder = std::partition_point(
        path.begin(), path.end(), [&](int32_t s) { return segments_[static_cast<size_t>(s)].position <= parent_tok; });
    places.assign(1, Place{-1, -1});
    if (parent_tok >= 0) {
      const int32_t segment = *(holder - 1);
      places[0] = {segment, parent_tok - segments_[static_cast<size_t>(segment)].position};
    }
    for (int64_t k = 0; k < inputs; ++k) {
      Place next = step(places.back(), root, token_ids[k]);
      if (next.segment < 0) {
        segments_.push_back({token_ids + k, static_cast<int32_t>(inputs - k),
                             static_cast<int32_t>(branches.parent[b] + k), places.back().segment, root, 0});
        next = {static_cast<int32_t>(segments_.size()) - 1, 0};
        add_edge(next.segment);
      }
      places.push_back(next);
    }
    branch_targets_.insert(branch_targets_.end(), places.begin() + branches.scored[b], places.end());
  }
}

// Depth first; of one parent's children the one that attaches last comes first.
void PrefixTrie::lay_out_rows() {
  const size_t count = segments_.size();
  std::vector<int32_t> by_parent(count);
  std::iota(by_parent.begin(), by_parent.end(), 0);
  std::sort(by_parent.begin(), by_parent.end(), [&](int32_t a, int32_t b) {
    const Segment &x = segments_[static_cast<size_t>(a)], &y = segments_[static_cast<size_t>(b)];
    if (x.parent != y.parent) return x.parent < y.parent;
    if (x.position != y.position) return x.position > y.position;
    return a < b;
  });
  std::vector<size_t> first_child(count + 2, 0);  // index 0 is the root
  for (const Segment& s : segments_) ++first_child[static_cast<size_t>(s.parent + 1) + 1];
  std::partial_sum(first_child.begin(), first_child.end(), first_child.begin());

  layout_.reserve(count);
  std::vector<int32_t> pending;
  auto push_children = [&](size_t node) {
    for (size_t c = first_child[node + 1]; c > first_child[node]; --c) pending.push_back(by_parent[c - 1]);
  };
  push_children(0);
  while (!pending.empty()) {
    const int32_t s = pending.back();
    pending.pop_back();
    layout_.push_back(s);
    segments_[static_cast<size_t>(s)].row = num_rows_;
    num_rows_ += segments_[static_cast<size_t>(s)].length;
    push_children(static_cast<size_t>(s) + 1);
  }
  branch_target_rows_.reserve(branch_targets_.size());
  for (const Place& place : branch_targets_) {
    branch_target_rows_.push_back(segments_[static_cast<size_t>(place.segment)].row + place.offset);
  }
  branch_targets_ = {};
}

void PrefixTrie::cut_waves(const WaveBudget& budget) {
  wave_starts_.assign(1, 0);
  while (wave_starts_.back() != num_rows_) wave_starts_.push_back(wave_end(wave_starts_.back(), budget));
}

// The cheapest end of the wave that begins at row `begin`, in rows: those beyond the budget, and those that the next
// wave carries at their price. These are as many as the depth of the first row behind the end, so an end within a
// segment is worse than one before it, and is taken only where the segment began the wave.
int64_t PrefixTrie::wave_end(int64_t begin, const WaveBudget& budget) const {
  const int64_t full = begin + budget.rows;
  if (full >= num_rows_) return num_rows_;
  auto segment = [&](size_t at) -> const Segment& { return segments_[static_cast<size_t>(layout_[at])]; };
  auto price_of = [&](int64_t carried) { return budget.carried_price * static_cast<double>(carried); };
  size_t at = static_cast<size_t>(segment_at(full));  // the first that is not whole within the budget
  int64_t end = segment(at).row > begin ? segment(at).row : full;
  double price = price_of(segment(at).position + end - segment(at).row);
  while (at < layout_.size()) {
    const bool is_last = ++at == layout_.size();
    const int64_t row = is_last ? num_rows_ : segment(at).row;
    const auto beyond = static_cast<double>(row - full);
    if (beyond >= price) break;
    const double there = beyond + price_of(is_last ? 0 : segment(at).position);
    if (there < price) {
      end = row;
      price = there;
    }
  }
  return end;
}

// Children that attach late come first, so what is still needed at a wave's beginning is the path to its first row.
void PrefixTrie::find_carried() {
  carried_offsets_.assign(1, 0);
  for (int64_t w = 0; w < num_waves(); ++w) {
    const int64_t begin = wave_starts_[static_cast<size_t>(w)];
    const int32_t segment = layout_[static_cast<size_t>(segment_at(begin))];
    for (const Interval& path : path_rows(segment, begin)) carried_.push_back(path);
    carried_offsets_.push_back(static_cast<int64_t>(carried_.size()));
  }
}

std::vector<int64_t> PrefixTrie::carried_rows() const {
  std::vector<int64_t> rows(static_cast<size_t>(num_waves()), 0);
  for (size_t w = 0; w < rows.size(); ++w) {
    for (int64_t c = carried_offsets_[w]; c < carried_offsets_[w + 1]; ++c) {
      rows[w] += carried_[static_cast<size_t>(c)].end - carried_[static_cast<size_t>(c)].begin;
    }
  }
  return rows;
}

void PrefixTrie::locate(const int64_t* sequence, const int32_t* position, int64_t count, int64_t* rows) const {
  std::vector<int32_t> path;
  int64_t path_sequence = -1;
  for (int64_t i = 0; i < count; ++i) {
    check(sequence[i] >= 0 && sequence[i] < static_cast<int64_t>(leaf_.size()), "target: no such sequence");
    if (sequence[i] != path_sequence) path = path_of(path_sequence = sequence[i]);
    const int32_t before = position[i] - 1;
    const auto holder = std::partition_point(
        path.begin(), path.end(), [&](int32_t s) { return segments_[static_cast<size_t>(s)].position <= before; });
    check(before >= 0 && holder != path.begin(),
          "target: position " + std::to_string(position[i]) + " has no row before it");
    const Segment& s = segments_[static_cast<size_t>(*(holder - 1))];
    check(before - s.position < s.length,
          "target: position " + std::to_string(position[i]) + " is beyond the sequence");
    rows[i] = s.row + before - s.position;
  }
}

int64_t PrefixTrie::segment_at(int64_t row) const {
  const auto it = std::partition_point(layout_.begin(), layout_.end(),
                                       [&](int32_t s) { return segments_[static_cast<size_t>(s)].row <= row; });
  return it - layout_.begin() - 1;
}

void PrefixTrie::positions_of(const int64_t* rows, int64_t count, int32_t* positions) const {
  for (int64_t i = 0; i < count; ++i) {
    check(rows[i] >= 0 && rows[i] < num_rows_, "row " + std::to_string(rows[i]) + " is not a row of this plan");
    const Segment& s = segments_[static_cast<size_t>(layout_[static_cast<size_t>(segment_at(rows[i]))])];
    positions[i] = static_cast<int32_t>(base(s) + s.position + rows[i] - s.row);
  }
}

int64_t PrefixTrie::visible_keys(int64_t window) const {
  // The sum of min(j, window) over j = 1..n.
  auto keys_up_to = [&](int64_t n) {
    const int64_t inside = std::min(n, window);
    return inside * (inside + 1) / 2 + (n - inside) * window;
  };
  int64_t total = 0;
  for (const Segment& s : segments_) {
    const int64_t before = int64_t{base(s)} + s.position;
    total += keys_up_to(before + s.length) - keys_up_to(before);
  }
  return total;
}

// Rows of the path up to row `end` of `segment`, from the root on.
std::vector<Interval> PrefixTrie::path_rows(int32_t segment, int64_t end) const {
  std::vector<Interval> leaf_to_root;
  while (segment >= 0) {
    const Segment& s = segments_[static_cast<size_t>(segment)];
    leaf_to_root.push_back({s.row, end});
    segment = s.parent;
    if (segment >= 0) {
      const Segment& parent = segments_[static_cast<size_t>(segment)];
      end = parent.row + s.position - parent.position;
    }
  }
  std::vector<Interval> path;
  for (auto it = leaf_to_root.rbegin(); it != leaf_to_root.rend(); ++it) append(path, it->begin, it->end);
  return path;
}

WaveArrays PrefixTrie::wave(int64_t index, int64_t batch_tokens) const {
  check(index >= 0 && index < num_waves(),
        "wave: expected 0 to " + std::to_string(num_waves() - 1) + ", got " + std::to_string(index));
  check(batch_tokens >= 1, "batch_tokens: expected at least 1, got " + std::to_string(batch_tokens));
  const int64_t begin = wave_starts_[static_cast<size_t>(index)], end = wave_starts_[static_cast<size_t>(index) + 1];
  const int64_t first_carried = carried_offsets_[static_cast<size_t>(index)];
  const int64_t last_carried = carried_offsets_[static_cast<size_t>(index) + 1];
  WaveArrays out;

  std::vector<int64_t> carried_before;  // carried rows before each interval
  for (int64_t c = first_carried; c < last_carried; ++c) {
    carried_before.push_back(out.num_carried);
    out.num_carried += carried_[static_cast<size_t>(c)].end - carried_[static_cast<size_t>(c)].begin;
  }
  auto store_row = [&](int64_t row) {
    if (row >= begin) return out.num_carried + row - begin;
    const auto first = carried_.begin() + first_carried, last = carried_.begin() + last_carried;
    const auto it = std::partition_point(first, last, [&](const Interval& i) { return i.begin <= row; }) - 1;
    return carried_before[static_cast<size_t>(it - first)] + row - it->begin;
  };
  auto append_store = [&](std::vector<Interval>& ranges, int64_t from, int64_t to) {  // both on one side of `begin`
    if (from < to) append(ranges, store_row(from), store_row(from) + to - from);
  };

  const int64_t rows = end - begin, batches = (rows + batch_tokens - 1) / batch_tokens;
  out.token_ids.reserve(static_cast<size_t>(rows));
  out.positions.reserve(static_cast<size_t>(rows));
  out.batch_offsets.push_back(0);
  out.batch_segments.push_back(0);
  out.segment_offsets.push_back(0);
  out.range_offsets.push_back(0);
  int64_t at = segment_at(begin);
  std::vector<Interval> ranges;
  for (int64_t b = 0; b < batches; ++b) {
    const int64_t batch_end = begin + rows * (b + 1) / batches;
    for (int64_t row = begin + rows * b / batches; row < batch_end;) {
      const int32_t segment = layout_[static_cast<size_t>(at)];
      const Segment& s = segments_[static_cast<size_t>(segment)];
      const int64_t piece_end = std::min(batch_end, s.row + s.length);
      for (int64_t r = row; r < piece_end; ++r) {
        out.token_ids.push_back(s.token_ids[r - s.row]);
        out.positions.push_back(static_cast<int32_t>(base(s) + s.position + r - s.row));
      }
      ranges.clear();
      for (const Interval& path : path_rows(segment, piece_end)) {
        append_store(ranges, path.begin, std::min(path.end, begin));
        append_store(ranges, std::max(path.begin, begin), path.end);
      }
      for (const Interval& range : ranges) {
        out.key_ranges.push_back(static_cast<int32_t>(range.begin));
        out.key_ranges.push_back(static_cast<int32_t>(range.end));
      }
      out.range_offsets.push_back(static_cast<int32_t>(out.key_ranges.size() / 2));
      out.segment_offsets.push_back(static_cast<int32_t>(piece_end - begin));
      out.segment_roots.push_back(s.root);
      row = piece_end;
      if (row == s.row + s.length) ++at;
    }
    out.batch_offsets.push_back(static_cast<int32_t>(batch_end - begin));
    out.batch_segments.push_back(static_cast<int32_t>(out.segment_offsets.size()) - 1);
  }
  if (index + 1 < num_waves()) {
    for (int64_t c = last_carried; c < carried_offsets_[static_cast<size_t>(index) + 2]; ++c) {
      for (int64_t r = carried_[static_cast<size_t>(c)].begin; r < carried_[static_cast<size_t>(c)].end; ++r) {
        out.keep_rows.push_back(store_row(r));
      }
    }
  }
  return out;
}

}  // namespace psykern
