// The prefix trie of a group of token sequences, laid out in rows and cut into waves.
//
// Sequences (transcripts) are sorted; what a sequence shares with its predecessor is stored once, the rest becomes a
// segment: a run of tokens with one parent, attached after some token of it. A branch (an answer option) is a short
// sequence that continues a transcript after its first `parent` tokens; its last token is only predicted, so it needs
// no row, and what it shares with a transcript or with another branch is stored once too.
//
// Rows are laid out depth first, parents before children, and children that attach late first, so that what later
// rows still need of a segment is always a prefix of it. A wave is a run of rows about as many as its budget. What
// later waves need of earlier ones is carried: `carried` holds those rows as intervals. It is the path to the wave's
// first row.
//
// A carried row is kept for all layers, one of the wave only for the layer in hand. So a wave goes beyond its budget
// where that takes less memory than to end within it: a transcript that is longer than a wave gets one of its own
// length, and what is carried are fronts that many transcripts share.
//
// A sequence may go on from a *root*: tokens that are known, of which only the number matters here (`root_base`).
// Sequences of different roots share nothing. Positions count a root's tokens in; places in a sequence and `parent` do
// not.
#pragma once

#include <cstdint>
#include <vector>

namespace psykern {

struct Sequences {
  const int32_t* token_ids;  // [offsets[count]]
  const int64_t* offsets;    // [count + 1]
  const int64_t* lengths;    // [count] tokens that need a row, at most the sequence's own length
  const int32_t* root;       // [count] what each sequence goes on from
  int64_t count;
  const int32_t* root_base;  // [roots] tokens of each root; 0: nothing comes before
  int64_t roots;
};

struct Branches {
  const int64_t* sequence;   // [count] ascending: the sequence that each branch continues
  const int32_t* parent;     // [count] tokens of the sequence before the branch; 0: it shares none
  const int32_t* scored;     // [count] first scored token of the branch; at least 1 where parent is 0
  const int64_t* offsets;    // [count + 1]
  const int32_t* token_ids;  // [offsets[count]]
  int64_t count;
};

struct WaveBudget {
  int64_t rows;          // that a wave has at most, unless more need less memory
  double carried_price;  // rows of a wave that need the memory of one carried row; 0: no wave has more than `rows`
};

struct Segment {
  const int32_t* token_ids;  // [length] borrowed from the sequences or branches
  int32_t length;            // tokens, at least 1
  int32_t position;          // tokens before its first one on its path, without those of its root
  int32_t parent;            // segment, -1 at the root; it attaches after parent's token `position - 1`
  int32_t root;
  int64_t row;  // first row
};

struct Interval {
  int64_t begin, end;  // rows, half open
};

// The arrays of psykern.core.types.Wave that depend on the trie.
struct WaveArrays {
  std::vector<int32_t> token_ids, positions, batch_offsets, batch_segments, segment_offsets, segment_roots,
      range_offsets, key_ranges;
  std::vector<int64_t> keep_rows;
  int64_t num_carried = 0;
};

class PrefixTrie {
 public:
  // Sequences and branches must outlive the trie. A share of fewer than `min_share` tokens of a segment is not taken.
  // Throws std::invalid_argument for arguments that do not fit together.
  PrefixTrie(const Sequences& sequences, const Branches& branches, int64_t min_share, const WaveBudget& budget);

  int64_t num_rows() const { return num_rows_; }
  int64_t num_segments() const { return static_cast<int64_t>(segments_.size()); }
  int64_t num_waves() const { return static_cast<int64_t>(wave_starts_.size()) - 1; }
  const std::vector<int64_t>& wave_starts() const { return wave_starts_; }
  std::vector<int64_t> carried_rows() const;  // [waves] from the wave before each

  // rows[i] = the row that predicts token `position[i]` of sequence `sequence[i]`; both ascending together.
  void locate(const int64_t* sequence, const int32_t* position, int64_t count, int64_t* rows) const;
  // The row before each scored token of every branch, in order.
  const std::vector<int64_t>& branch_target_rows() const { return branch_target_rows_; }
  // positions[i] of rows[i], in any order.
  void positions_of(const int64_t* rows, int64_t count, int32_t* positions) const;
  // Sum over all rows of the keys each sees: min(position + 1, window).
  int64_t visible_keys(int64_t window) const;

  WaveArrays wave(int64_t index, int64_t batch_tokens) const;

 private:
  struct Place {  // a token: segment and offset within it
    int32_t segment, offset;
  };

  int32_t base(const Segment& segment) const;
  void add_sequences(const Sequences& sequences, int64_t min_share);
  void add_branches(const Sequences& sequences, const Branches& branches);
  void lay_out_rows();
  void cut_waves(const WaveBudget& budget);
  int64_t wave_end(int64_t begin, const WaveBudget& budget) const;
  void find_carried();
  std::vector<int32_t> path_of(int64_t sequence) const;
  int64_t segment_at(int64_t row) const;
  std::vector<Interval> path_rows(int32_t segment, int64_t end) const;

  std::vector<int32_t> root_base_;
  std::vector<Segment> segments_;
  std::vector<int32_t> leaf_;          // [sequences] last segment of each path, -1 for an empty sequence
  std::vector<int32_t> order_;         // [sequences] sorted
  std::vector<Place> branch_targets_;  // place before each scored branch token
  std::vector<int64_t> branch_target_rows_;
  std::vector<int32_t> layout_;           // segments in order of rows
  std::vector<int64_t> wave_starts_;      // [waves + 1] rows
  std::vector<int64_t> carried_offsets_;  // [waves + 1] into carried_
  std::vector<Interval> carried_;
  int64_t num_rows_ = 0;
};

}  // namespace psykern
