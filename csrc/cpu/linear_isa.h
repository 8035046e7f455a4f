// linear for one instruction set; included once per set by kernels_isa.cpp.
//
// A thread takes a block of rows, copies it once, in blocks of depth, and then chunks of the columns until there are no
// more of them for that block; when no block is left, it helps with the others'. For each block of depth the chunk's
// columns are packed, from the file's own rows, and panels of rows pass over them while they are in the L2 cache, a
// panel of rows while it is in the L1 cache. A tile's sums stay in the L2 cache until they are complete and then go
// where they belong, through the epilogue, while the next tile is multiplied.
//
// A block's rows are of one group, so of a mixture a thread has whole experts. Rows are gathered where they are copied,
// and scattered where they are finished.
//
// Weights that were packed before are not faster: 0.95 to 1.07 of the time with 2,048 rows, and they have to be read
// from memory as fp32 where the file has bf16 (Xeon with AVX-512, 2026-11). So nothing of a layer is copied. Neither
// are stores past the caches, nor prefetching the weights to be packed next (0.95 to 1.01 of the rate).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

#include "elementwise_isa.h"
#include "linear.h"
#include "parallel.h"
#include "product_isa.h"

namespace {

using psykern::Epilogue;
using psykern::Linear;
using psykern::LinearPart;
using psykern::WeightRows;

constexpr int64_t kChunkPanels = 8;      // of columns
constexpr int64_t kChunksPerThread = 4;  // at least, of a block, unless they would be empty
// Rows of a block: so many that packing columns for them does not matter, but that their copy stays near.
constexpr int64_t kLeastBlockRows = 192, kMostBlockRows = 768, kCopiedBytes = 8 * 1024 * 1024;

// Panels that a weight of `columns` takes. Gate and up share panels: a vector of one, then the same columns of the
// other.
inline int64_t column_panels(int64_t columns, bool is_gated) {
  const int64_t width = is_gated ? kLanes : kColumns;
  return (columns + width - 1) / width;
}

// f(row_of) for the rows of `weight` as they are stored.
template <typename F>
void with_rows(const WeightRows& weight, int64_t first, const F& f) {
  const auto as = [&](const auto* data) { f([=](int64_t i) { return data + (first + i) * weight.stride; }); };
  if (weight.type == FloatType::kFloat32) {
    as(static_cast<const float*>(weight.data));
  } else if (weight.type == FloatType::kBfloat16) {
    as(static_cast<const uint16_t*>(weight.data));
  } else {
    as(static_cast<const Fp16*>(weight.data));
  }
}

// Panel `panel` at depths [first, first + depth) to packed[padded depth][kColumns].
template <typename Product>
void pack_panel(const WeightRows& weight, const WeightRows& up, int64_t columns, int64_t panel, int64_t first,
                int64_t depth, typename Product::Number* packed) {
  constexpr int64_t kPair = Product::kDepthUnit > 1 ? 2 : 1;  // numbers of a column that stand side by side
  const int64_t padded = padded_depth<Product>(depth);
  if (padded > depth) {
    const int64_t from = depth / kPair * kPair;
    std::fill(packed + from * kColumns, packed + padded * kColumns, typename Product::Number{0});
  }
  for (int half = 0; half < 2; ++half) {
    const bool is_gated = up.data != nullptr;
    const int64_t column = is_gated ? panel * kLanes : panel * kColumns + half * kLanes;
    const int64_t count = std::clamp<int64_t>(columns - column, 0, kLanes);
    with_rows(is_gated && half == 1 ? up : weight, count > 0 ? column : 0, [&](const auto& row_of) {
      Product::pack([&](int64_t i) { return row_of(i) + first; }, count, depth, packed + half * kLanes * kPair);
    });
  }
}

// Panels [first, last) of a part's columns.
struct Chunk {
  const LinearPart* part;
  int64_t first, last;
};

// Those of a group that `threads` share.
inline std::vector<Chunk> chunks_of(const psykern::RowGroup& group, bool is_gated, int64_t threads) {
  std::vector<int64_t> panels;
  for (int64_t i = 0; i < group.num_parts; ++i) panels.push_back(column_panels(group.parts[i].columns, is_gated));
  const int64_t all = std::accumulate(panels.begin(), panels.end(), int64_t{0});
  const int64_t most =
      threads == 1 ? kChunkPanels : std::clamp<int64_t>(all / (kChunksPerThread * threads), 1, kChunkPanels);
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < panels.size(); ++i) {
    const int64_t count = (panels[i] + most - 1) / most;
    for (int64_t j = 0; j < count; ++j) {
      chunks.push_back({group.parts + i, panels[i] * j / count, panels[i] * (j + 1) / count});
    }
  }
  return chunks;
}

// Blocks that a group's rows are cut in: as many for each of `threads`.
inline int64_t count_blocks(int64_t rows, int64_t row_bytes, int64_t panel_rows, int64_t threads) {
  const int64_t near = std::clamp(kCopiedBytes / row_bytes, kLeastBlockRows, kMostBlockRows);
  const int64_t most = near / panel_rows * panel_rows;
  const int64_t count = std::max((rows + most - 1) / most, std::clamp<int64_t>(rows / kLeastBlockRows, 1, threads));
  return count >= threads ? (count + threads - 1) / threads * threads : count;
}

// Rows [first, last), and the chunks that they are multiplied with, [first_chunk, last_chunk) of all.
struct RowBlock {
  int64_t first, last, first_chunk, last_chunk;
};

struct LinearPlan {
  std::vector<Chunk> chunks;
  std::vector<RowBlock> blocks;
};

template <typename Product>
LinearPlan plan_of(const Linear& p, int64_t num_threads) {
  const int64_t row_bytes = p.depth * static_cast<int64_t>(sizeof(typename Product::Number));
  LinearPlan plan;
  for (const psykern::RowGroup* group = p.groups; group < p.groups + p.num_groups; ++group) {
    const int64_t rows = group->last_row - group->first_row, first = static_cast<int64_t>(plan.chunks.size());
    if (rows == 0) continue;
    const int64_t threads = std::max<int64_t>(num_threads * rows / p.num_rows, 1);  // its share of them
    const std::vector<Chunk> chunks = chunks_of(*group, p.epilogue == Epilogue::kSiluMul, threads);
    if (chunks.empty()) continue;
    plan.chunks.insert(plan.chunks.end(), chunks.begin(), chunks.end());
    const int64_t count = count_blocks(rows, row_bytes, Product::kPanelRows, threads);
    for (int64_t i = 0; i < count; ++i) {  // as even as possible
      const int64_t begin = group->first_row + rows * i / count, end = group->first_row + rows * (i + 1) / count;
      plan.blocks.push_back({begin, end, first, static_cast<int64_t>(plan.chunks.size())});
    }
  }
  return plan;
}

template <typename Product, typename T>
class LinearBlock {
 public:
  LinearBlock(const Linear& problem, const RowBlock& block)
      : p(problem),
        first(block.first),
        rows(block.last - block.first),
        panels((rows + Product::kPanelRows - 1) / Product::kPanelRows),
        blocks((p.depth + Product::kDepth - 1) / Product::kDepth) {
    const int64_t slots = panels * Product::kPanelRows;
    const int64_t row_numbers = blocks * slots * Product::kDepth, columns = kChunkPanels * kColumns;
    sums = thread_memory((row_numbers + Product::kDepth * columns) * sizeof(Number) / sizeof(float) + slots * columns);
    copied = reinterpret_cast<Number*>(sums + slots * columns);
    chunk = copied + row_numbers;
    copy_rows();
  }

  void run(const Chunk& chunk) {
    const LinearPart& part = *chunk.part;
    alignas(64) float bias[kChunkPanels * kColumns] = {};
    load_bias(part, chunk.first, chunk.last, bias);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t d = block * Product::kDepth, depth = std::min(Product::kDepth, p.depth - d);
      const int64_t padded = padded_depth<Product>(depth), count = chunk.last - chunk.first;
      for (int64_t c = 0; c < count; ++c) {
        pack_panel<Product>(part.weight, part.up, part.columns, chunk.first + c, d, depth, packed(c));
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t num_rows = start(panel + 1) - start(panel);
        for (int64_t c = 0; c < count; ++c) {
          float* tile = sums_of(c, panel);
          Product::multiply(num_rows, copied_rows(block, panel), packed(c), padded, tile, block == 0);
          if (block == blocks - 1) finish(part, panel, chunk.first + c, tile, bias + c * kColumns);
        }
      }
    }
  }

 private:
  using Number = typename Product::Number;

  static float* thread_memory(int64_t floats) {
    static thread_local Buffer memory;
    static thread_local int64_t capacity = 0;
    if (floats > capacity) {
      memory = allocate(floats);
      capacity = floats;
    }
    return memory.get();
  }

  int64_t start(int64_t panel) const {  // tiles are best when full, panels of vectors when even
    return Product::kHasTiles ? std::min(panel * Product::kPanelRows, rows) : rows * panel / panels;
  }
  Number* copied_rows(int64_t block, int64_t panel) const {
    return copied + (block * panels + panel) * Product::kPanelRows * Product::kDepth;
  }
  Number* packed(int64_t column_panel) const { return chunk + column_panel * Product::kDepth * kColumns; }
  float* sums_of(int64_t column_panel, int64_t panel) const {
    return sums + (column_panel * panels + panel) * Product::kPanelRows * kColumns;
  }

  void copy_rows() {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t count = start(panel + 1) - start(panel);
      const T* x[Product::kPanelRows];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = first + start(panel) + i;
        x[i] = static_cast<const T*>(p.x) + (p.x_slots == nullptr ? row : p.x_slots[row] / p.top_k) * p.x_stride;
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t d = block * Product::kDepth, depth = std::min(Product::kDepth, p.depth - d);
        Number* to = copied_rows(block, panel);
        Product::copy_rows([&](int64_t i) { return x[i] + d; }, count, depth, to);
        if (Product::kHasTiles) {  // rows of the last tile that are none
          std::fill(to + count * Product::kDepth, to + Product::kPanelRows * Product::kDepth, Number{0});
        }
      }
    }
  }

  // The complete sums of a panel of rows and panel c of the part's columns to where they belong.
  void finish(const LinearPart& part, int64_t panel, int64_t c, const float* sum, const float* bias) const {
    const Vec bias0 = load(bias), bias1 = load(bias + kLanes);
    for (int64_t row = start(panel); row < start(panel + 1); ++row, sum += kColumns) {
      const int64_t to = p.out_slots == nullptr ? first + row : p.out_slots[first + row];
      T* out = static_cast<T*>(part.out) + to * part.out_stride;
      const Vec c0 = load(sum) + bias0, c1 = load(sum + kLanes) + bias1;
      if (is_gated()) {
        put_columns(out + c * kLanes, silu(c0) * c1, part.columns - c * kLanes, false);
      } else {
        const int64_t left = part.columns - c * kColumns;
        put_columns(out + c * kColumns, c0, left, p.epilogue == Epilogue::kAdd);
        if (left > kLanes) {
          put_columns(out + c * kColumns + kLanes, c1, left - kLanes, p.epilogue == Epilogue::kAdd);
        }
      }
    }
  }

  // As the panels have their columns; zeros where there is none.
  void load_bias(const LinearPart& part, int64_t first_panel, int64_t last_panel, float* bias) const {
    for (int64_t half = 0; half < 2 * (last_panel - first_panel); ++half) {
      const int64_t panel = first_panel + half / 2;
      const int64_t column = is_gated() ? panel * kLanes : panel * kColumns + half % 2 * kLanes;
      const float* from = is_gated() && half % 2 == 1 ? part.up_bias : part.bias;
      const int64_t count = std::clamp<int64_t>(part.columns - column, 0, kLanes);
      if (from != nullptr) std::copy(from + column, from + column + count, bias + half * kLanes);
    }
  }

  bool is_gated() const { return p.epilogue == Epilogue::kSiluMul; }

  static void put_columns(T* out, Vec c, int64_t left, bool is_added) {
    if (left >= kLanes) {
      store(out, is_added ? load(out) + c : c);
    } else {
      T lanes[kLanes] = {};
      std::copy(out, out + (is_added ? left : 0), lanes);
      store(lanes, is_added ? load(lanes) + c : c);
      std::copy(lanes, lanes + left, out);
    }
  }

  const Linear& p;
  const int64_t first, rows, panels, blocks;  // of the task's rows; of depth
  float* sums;                                // [kChunkPanels, panels, kPanelRows, kColumns]
  Number* copied;                             // [blocks, panels, kPanelRows, kDepth]
  Number* chunk;                              // [kChunkPanels, kDepth, kColumns] of weights that came as they are
};

template <typename Product, typename T>
void linear_as(const Linear& p, int num_threads) {
  const LinearPlan plan = plan_of<Product>(p, num_threads);
  const auto num_blocks = static_cast<int64_t>(plan.blocks.size());
  if (num_blocks == 0) return;
  std::vector<std::atomic<int64_t>> taken(plan.blocks.size());  // chunks of each block
  std::atomic<int64_t> next_block{0};
  const auto work_on = [&](int64_t i) {
    const RowBlock& block = plan.blocks[static_cast<size_t>(i)];
    std::atomic<int64_t>& next = taken[static_cast<size_t>(i)];
    int64_t chunk = block.first_chunk + next++;
    if (chunk >= block.last_chunk) return;
    LinearBlock<Product, T> of_rows(p, block);
    for (; chunk < block.last_chunk; chunk = block.first_chunk + next++) {
      of_rows.run(plan.chunks[static_cast<size_t>(chunk)]);
    }
  };
  psykern::parallel_for(num_threads, num_threads, [&](int64_t thread) {
    const typename Product::Session session;
    for (int64_t block = next_block++; block < num_blocks; block = next_block++) work_on(block);
    for (int64_t i = 0; i < num_blocks; ++i) work_on((thread * num_blocks / num_threads + i) % num_blocks);
  });
}

void linear_isa(const Linear& p, int num_threads) {
  if (p.type == FloatType::kBfloat16) {
    linear_as<Bf16Product, uint16_t>(p, num_threads);
  } else {
    linear_as<Fp32Product, float>(p, num_threads);
  }
}

}  // namespace
