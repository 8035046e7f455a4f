// What the packed matrix products share: memory, the split of rows into panels, and the packing of columns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

namespace {

constexpr int kMaxPanel = kLanes == 16 ? 12 : (kLanes == 8 ? 6 : 4);  // rows; 2 accumulators each fill the registers
constexpr int kColumns = 2 * kLanes;                                  // of a panel of columns

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, std::max<size_t>(bytes, 64));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<float*>(p));
}

// A run of rows cut in panels of at most `panel_rows`: panel p holds rows [start(p), start(p + 1)). They are as even as
// possible, which is best for vectors, or full but for the last, which is best for tiles.
struct RowPanels {
  int64_t num_rows, panel_rows, count;
  bool are_full;

  explicit RowPanels(int64_t rows, int64_t most = kMaxPanel, bool full = false)
      : num_rows(rows), panel_rows(most), count((rows + most - 1) / most), are_full(full) {}
  int64_t start(int64_t panel) const {
    return are_full ? std::min(panel * panel_rows, num_rows) : num_rows * panel / count;
  }
};

// The depths [0, result) of pack_half_panel, in whole vectors of the columns' rows.
template <typename RowOf, typename T>
int64_t pack_vectors(const RowOf& row_of, int64_t count, int64_t depth, float* packed, const T*) {
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    Vec rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = i < count ? load(row_of(i) + d) : Vec{};
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) store(packed + (d + i) * kColumns, rows[i]);
  }
  return d;
}

template <typename RowOf>
int64_t pack_vectors(const RowOf& row_of, int64_t count, int64_t depth, float* packed, const uint16_t*) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= depth; d += 2 * kLanes) {
    Vec rows[kLanes];  // of pairs: neighbours in depth stay together until they are widened
    for (int i = 0; i < kLanes; ++i) rows[i] = i < count ? load_pairs(row_of(i) + d) : Vec{};
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) {
      store(packed + (d + 2 * i) * kColumns, widen_first(rows[i]));
      store(packed + (d + 2 * i + 1) * kColumns, widen_second(rows[i]));
    }
  }
  return d;
}

// Half a panel of columns, packed[d][column]: column i < count is row_of(i)[0..depth) widened, the rest zeros.
template <typename RowOf>
void pack_half_panel(const RowOf& row_of, int64_t count, int64_t depth, float* packed) {
  using Pointer = decltype(row_of(0));
  for (int64_t d = pack_vectors(row_of, count, depth, packed, Pointer{}); d < depth; ++d) {
    for (int i = 0; i < kLanes; ++i) packed[d * kColumns + i] = i < count ? widen(row_of(i)[d]) : 0.0f;
  }
}

}  // namespace
