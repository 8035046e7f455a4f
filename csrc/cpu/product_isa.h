// The products behind linear and option_logprobs, for one instruction set: a panel of rows times a panel of columns,
// over a block of their depth. Included once per set.
//
// Rows are copied in blocks of kDepth numbers: of fp32 [depth][rows], so that the inner loop reads on and on (1.06
// times as fast as with one row behind the other), of bf16, and of fp32 where rows are made one by one, [rows][kDepth].
// Columns are packed [depth][kColumns], and where bf16 is multiplied in pairs of neighbours in depth. A product of a
// panel adds up one block in registers, in order, and then adds that sum to what the blocks before gave: the rounding
// of one long sum grows with the root of its length.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "float_type.h"
#include "panels.h"
#include "simd.h"

namespace {

using psykern::FloatType;

constexpr int64_t kFp32Depth = 256, kPairDepth = 512, kTileDepth = 256;  // of a block

// kPacked: rows [depth][kRows], else [kRows][kFp32Depth].
template <int kRows, bool kPacked>
void multiply_fp32_rows(const float* __restrict rows, const float* __restrict columns, int64_t depth,
                        float* __restrict tile, bool is_first) {
  constexpr int64_t kRowStep = kPacked ? 1 : kFp32Depth, kDepthStep = kPacked ? kRows : 1;
  Vec sums[kRows][2] = {};
#pragma GCC unroll 2
  for (int64_t d = 0; d < depth; ++d) {
    const Vec c0 = load(columns + d * kColumns), c1 = load(columns + d * kColumns + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec x = broadcast(rows[i * kRowStep + d * kDepthStep]);
      sums[i][0] += x * c0;
      sums[i][1] += x * c1;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* out = tile + i * kColumns;
    store(out, is_first ? sums[i][0] : load(out) + sums[i][0]);
    store(out + kLanes, is_first ? sums[i][1] : load(out + kLanes) + sums[i][1]);
  }
}

using MultiplyFp32 = void (*)(const float*, const float*, int64_t, float*, bool);
template <bool kPacked, int... kRows>
constexpr std::array<MultiplyFp32, sizeof...(kRows)> multiply_fp32_table(std::integer_sequence<int, kRows...>) {
  return {&multiply_fp32_rows<kRows + 1, kPacked>...};
}

// fp32, multiplied and added at once where the set can.
template <bool kPacked>
struct Fp32Products {
  using Number = float;  // of packed rows and columns
  static constexpr bool kHasTiles = false;
  static constexpr int64_t kPanelRows = kMaxPanel;  // at most
  static constexpr int64_t kDepth = kFp32Depth;     // of a block
  static constexpr int64_t kDepthUnit = 1;          // depths are padded to multiples of it

  // Held by a thread while it multiplies.
  struct Session {
    Session() {}
  };

  // tile[i * kColumns..] = (is_first ? 0 : tile[i]) + sum over d < depth of row i's number d * columns[d][..]
  static void multiply(int64_t num_rows, const float* rows, const float* columns, int64_t depth, float* tile,
                       bool is_first) {
    static constexpr auto kTable = multiply_fp32_table<kPacked>(std::make_integer_sequence<int, kMaxPanel>{});
    kTable[static_cast<size_t>(num_rows - 1)](rows, columns, depth, tile, is_first);
  }

  // A panel's rows row_of(i)[0..depth), i < count, to [depth][count].
  template <typename RowOf>
  static void copy_rows(const RowOf& row_of, int64_t count, int64_t depth, float* to) {
    static_assert(kPacked && kMaxPanel <= kLanes, "a vector has a number of each row");
    int64_t d = 0;
    for (; d + kLanes <= depth; d += kLanes) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = i < count ? load(row_of(i) + d) : Vec{};
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) {  // what goes too far is written again, but for the last
        float lanes[kLanes], *out = to + (d + i) * count;
        const bool fits = (depth - d - i) * count >= kLanes;
        store(fits ? out : lanes, rows[i]);
        if (!fits) std::copy(lanes, lanes + count, out);
      }
    }
    for (; d < depth; ++d) {
      for (int64_t i = 0; i < count; ++i) to[d * count + i] = widen(row_of(i)[d]);
    }
  }

  // One row, where rows stand one behind the other.
  template <typename T>
  static void copy_row(const T* from, int64_t depth, float* to) {
    static_assert(!kPacked);
    int64_t d = 0;
    for (; d + kLanes <= depth; d += kLanes) store(to + d, load(from + d));
    for (; d < depth; ++d) to[d] = widen(from[d]);
  }

  // Half a panel: columns[d][i] = row_of(i)[d] for i < count, else 0.
  template <typename RowOf>
  static void pack(const RowOf& row_of, int64_t count, int64_t depth, float* columns) {
    pack_half_panel(row_of, count, depth, columns);
  }
};
using Fp32Product = Fp32Products<true>;
using Fp32RowProduct = Fp32Products<false>;

#if defined(__AVX512BF16__)
// What products of bf16 share: rows as they are, columns in pairs, [depth / 2][kColumns][2].
template <int64_t kRowDepth, int64_t kUnit>
struct Bf16Packing {
  using Number = uint16_t;
  static constexpr int64_t kDepth = kRowDepth, kDepthUnit = kUnit;

  // A row, padded to whole units.
  static void copy_row(const uint16_t* from, int64_t depth, uint16_t* to) {
    std::memcpy(to, from, static_cast<size_t>(depth) * sizeof(uint16_t));
    std::fill(to + depth, to + (depth + kUnit - 1) / kUnit * kUnit, uint16_t{0});
  }
  template <typename RowOf>
  static void copy_rows(const RowOf& row_of, int64_t count, int64_t depth, uint16_t* to) {
    for (int64_t i = 0; i < count; ++i) copy_row(row_of(i), depth, to + i * kDepth);
  }

  template <typename RowOf>
  static void pack(const RowOf& row_of, int64_t count, int64_t depth, uint16_t* columns) {
    int64_t d = 0;
    for (; d + 2 * kLanes <= depth; d += 2 * kLanes) {
      Vec pairs[kLanes];
      for (int i = 0; i < kLanes; ++i) pairs[i] = i < count ? pairs_of(row_of(i) + d) : Vec{};
      transpose(pairs);
      for (int i = 0; i < kLanes; ++i) std::memcpy(columns + (d + 2 * i) * kColumns, &pairs[i], sizeof(Vec));
    }
    for (; d < depth; ++d) {
      for (int64_t i = 0; i < kLanes; ++i) {
        columns[(d & ~int64_t{1}) * kColumns + 2 * i + (d & 1)] = i < count ? half_of(row_of(i)[d]) : uint16_t{0};
      }
    }
  }

 private:
  static Vec pairs_of(const uint16_t* p) { return load_pairs(p); }
  template <typename T>
  static Vec pairs_of(const T* p) {
    uint16_t halves[2 * kLanes];
    store(halves, load(p));
    store(halves + kLanes, load(p + kLanes));
    return load_pairs(halves);
  }
  static uint16_t half_of(uint16_t x) { return x; }
  template <typename T>
  static uint16_t half_of(T x) {
    return narrow(widen(x));
  }
};
#endif

#if defined(__AMX_BF16__)
// Tiles of bf16: 16 rows of 32 numbers times 32 numbers of 16 columns.
struct Bf16Product : Bf16Packing<kTileDepth, 32> {
  static constexpr bool kHasTiles = true;
  static constexpr int64_t kTile = 16, kPanelRows = 2 * kTile;

  struct Session {
    Session() {
      struct alignas(64) Config {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      };
      static constexpr Config kConfig;
      _tile_loadconfig(&kConfig);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // As Fp32Product::multiply; rows behind num_rows are read up to a whole tile, and their tile rows are written.
  static void multiply(int64_t num_rows, const uint16_t* rows, const uint16_t* columns, int64_t depth, float* tile,
                       bool is_first) {
    if (num_rows > kTile) {
      multiply_two(rows, columns, depth, tile, is_first);
    } else {
      multiply_one(rows, columns, depth, tile, is_first);
    }
  }

 private:
  static constexpr int64_t kRowBytes = kDepth * 2, kColumnBytes = kColumns * 4, kOutBytes = kColumns * 4;

  static void multiply_two(const uint16_t* rows, const uint16_t* columns, int64_t depth, float* tile, bool is_first) {
    float* lower = tile + kTile * kColumns;
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, tile, kOutBytes);
      _tile_loadd(1, tile + kLanes, kOutBytes);
      _tile_loadd(2, lower, kOutBytes);
      _tile_loadd(3, lower + kLanes, kOutBytes);
    }
    for (int64_t d = 0; d < depth; d += kDepthUnit) {
      _tile_loadd(4, rows + d, kRowBytes);
      _tile_loadd(6, columns + d * kColumns, kColumnBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, columns + d * kColumns + 2 * kLanes, kColumnBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, rows + kTile * kDepth + d, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, tile, kOutBytes);
    _tile_stored(1, tile + kLanes, kOutBytes);
    _tile_stored(2, lower, kOutBytes);
    _tile_stored(3, lower + kLanes, kOutBytes);
  }

  static void multiply_one(const uint16_t* rows, const uint16_t* columns, int64_t depth, float* tile, bool is_first) {
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
    } else {
      _tile_loadd(0, tile, kOutBytes);
      _tile_loadd(1, tile + kLanes, kOutBytes);
    }
    for (int64_t d = 0; d < depth; d += kDepthUnit) {
      _tile_loadd(4, rows + d, kRowBytes);
      _tile_loadd(6, columns + d * kColumns, kColumnBytes);
      _tile_loadd(7, columns + d * kColumns + 2 * kLanes, kColumnBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, tile, kOutBytes);
    _tile_stored(1, tile + kLanes, kOutBytes);
  }
};
using Bf16RowProduct = Bf16Product;
constexpr bool kHasBf16Product = true;

#elif defined(__AVX512BF16__)
template <int kRows>
void multiply_pairs_rows(const uint16_t* __restrict rows, const uint16_t* __restrict columns, int64_t depth,
                         float* __restrict tile, bool is_first) {
  __m512 sums[kRows][2] = {};
  for (int64_t d = 0; d < depth; d += 2) {
    const auto c0 = reinterpret_cast<__m512bh>(load_pairs(columns + d * kColumns));
    const auto c1 = reinterpret_cast<__m512bh>(load_pairs(columns + d * kColumns + 2 * kLanes));
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, rows + i * kPairDepth + d, sizeof pair);
      const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, c0);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, c1);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    float* out = tile + i * kColumns;
    const Vec a = reinterpret_cast<Vec>(sums[i][0]), b = reinterpret_cast<Vec>(sums[i][1]);
    store(out, is_first ? a : load(out) + a);
    store(out + kLanes, is_first ? b : load(out + kLanes) + b);
  }
}

using MultiplyPairs = void (*)(const uint16_t*, const uint16_t*, int64_t, float*, bool);
template <int... kRows>
constexpr std::array<MultiplyPairs, sizeof...(kRows)> multiply_pairs_table(std::integer_sequence<int, kRows...>) {
  return {&multiply_pairs_rows<kRows + 1>...};
}

// Pairs of bf16 in vectors.
struct Bf16Product : Bf16Packing<kPairDepth, 2> {
  static constexpr bool kHasTiles = false;
  static constexpr int64_t kPanelRows = kMaxPanel;

  struct Session {
    Session() {}
  };

  static void multiply(int64_t num_rows, const uint16_t* rows, const uint16_t* columns, int64_t depth, float* tile,
                       bool is_first) {
    static constexpr auto kTable = multiply_pairs_table(std::make_integer_sequence<int, kMaxPanel>{});
    kTable[static_cast<size_t>(num_rows - 1)](rows, columns, depth, tile, is_first);
  }
};
using Bf16RowProduct = Bf16Product;
constexpr bool kHasBf16Product = true;

#else
using Bf16Product = Fp32Product;  // both sides widened when they are packed
using Bf16RowProduct = Fp32RowProduct;
constexpr bool kHasBf16Product = false;
#endif

// A depth in whole units of the product.
template <typename Product>
constexpr int64_t padded_depth(int64_t depth) {
  return (depth + Product::kDepthUnit - 1) / Product::kDepthUnit * Product::kDepthUnit;
}

}  // namespace
