// The keys and values of one tile of a path for one head, packed as products take them; included once per set.
#pragma once

#include <algorithm>
#include <cstring>

#include "panels.h"
#include "prefix_attention.h"
#include "product_isa.h"
#include "simd.h"

namespace {

using psykern::PrefixAttention;

constexpr int64_t kTileKeys = 256;
static_assert(kTileKeys % kColumns == 0, "a tile has whole panels of keys");

template <typename T>
void prefetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
}

template <typename Product, typename T>
class KeyTile {
 public:
  using Number = typename Product::Number;

  const int64_t head_dim, depth, width;  // depth: head_dim in whole units of depth; width: in whole panels of columns
  Number* keys = nullptr;                // [kTileKeys / kColumns, depth, kColumns]
  Number* values = nullptr;              // [width / kColumns, kTileKeys, kColumns]
  Number* seen_values = nullptr;         // [kTileKeys, kColumns]
  bool values_are_finite = true;

  KeyTile(const PrefixAttention& p, int64_t kv_head)
      : head_dim(p.head_dim),
        depth(padded_depth<Product>(head_dim)),
        width((head_dim + kColumns - 1) / kColumns * kColumns),
        k(static_cast<const T*>(p.k) + kv_head * head_dim),
        v(static_cast<const T*>(p.v) + kv_head * head_dim),
        k_stride(p.k_stride),
        v_stride(p.v_stride) {}

  // Once `keys` has memory.
  void clear_padding() {
    for (Number* panel = keys; panel != keys + depth * kTileKeys; panel += depth * kColumns) {
      std::fill(panel + head_dim / kPair * kPair * kColumns, panel + depth * kColumns, Number{0});
    }
  }

  // The keys that stand in `rows` of the store become columns [first, first + count) of the tile, its last. `first` is
  // a multiple of kLanes.
  void pack(const int64_t* rows, int64_t first, int64_t count) {
    Vec zero = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t column = first + i, here = std::min<int64_t>(count - i, kLanes);
      for (int64_t j = i + kLanes; j < std::min<int64_t>(i + 2 * kLanes, count); ++j) {
        prefetch(k + rows[j] * k_stride, head_dim);
        prefetch(v + rows[j] * v_stride, head_dim);
      }
      Product::pack([&](int64_t j) { return k + rows[i + j] * k_stride; }, here, head_dim,
                    keys + column / kColumns * kColumns * depth + column % kColumns * kPair);
      for (int64_t j = 0; j < here; j += kPair) {
        const T* second = j + 1 < here ? v + rows[i + j + 1] * v_stride : nullptr;
        zero += pack_values(v + rows[i + j] * v_stride, second, values + (column + j) * kColumns);
      }
    }
    // Weights of 0 meet what stands behind the last key, up to a whole unit of depth.
    const int64_t filled = (first + count + kPair - 1) / kPair * kPair, end = padded_depth<Product>(first + count);
    for (int64_t d = 0; d < width && filled < end; d += kColumns) {
      std::fill(values + d * kTileKeys + filled * kColumns, values + d * kTileKeys + end * kColumns, Number{0});
    }
    if (!(sum(zero) == 0.0f)) values_are_finite = false;
  }

  // The values' panel of columns from d on, with 0 for the keys outside [low, high).
  const Number* only_seen_values(int64_t d, int64_t low, int64_t high) {
    for (int64_t key = 0; key < kTileKeys; ++key) {
      for (int64_t c = 0; c < kColumns; ++c) {
        const int64_t place = (key / kPair * kColumns + c) * kPair + key % kPair;
        seen_values[place] = low <= key && key < high ? values[d * kTileKeys + place] : Number{0};
      }
    }
    return seen_values;
  }

 private:
  static constexpr int64_t kPair = Product::kDepthUnit > 1 ? 2 : 1;  // numbers of a column that stand side by side
  static_assert(kTileKeys <= Product::kDepth && kTileKeys % Product::kDepthUnit == 0 && kLanes % kPair == 0);

  // The values of a key, or where pairs are multiplied of two (`second` null: of one), in panels of columns. Gives
  // zero, or NaN where one is not finite.
  Vec pack_values(const T* first, const T* second, Number* to) const {
    Vec zero = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      const Vec x = load_values(first, d);
      zero += x - x;
      Number* place = to + d / kColumns * kColumns * kTileKeys + d % kColumns * kPair;
      if constexpr (kPair == 1) {
        store(place, x);
      } else {
        const Vec y = second == nullptr ? Vec{} : load_values(second, d);
        zero += y - y;
        const Bits pairs = reinterpret_cast<Bits>(x) >> 16 | reinterpret_cast<Bits>(y);
        std::memcpy(place, &pairs, sizeof pairs);
      }
    }
    return zero;
  }

  Vec load_values(const T* from, int64_t d) const {
    if (d + kLanes <= head_dim) return load(from + d);
    T lanes[kLanes] = {};
    if (d < head_dim) std::copy(from + d, from + head_dim, lanes);
    return load(lanes);
  }

  const T *k, *v;  // of the head
  const int64_t k_stride, v_stride;
};

}  // namespace
