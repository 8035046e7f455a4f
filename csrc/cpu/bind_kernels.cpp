// Python bindings of the operations: numpy arrays in and out without copies. Every argument is checked here, down to
// the indices that the kernels follow, so that no call from Python reads or writes outside its arrays.
#include "bind_kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "isa.h"

namespace py = pybind11;

namespace {

using Isa = std::optional<std::string>;

[[noreturn]] void fail(const std::string& name, const std::string& expected, const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

// Where a message takes longer than the check, and the check is of each array or segment, write `if (…) fail(…)`.
void expect(bool holds, const char* name, const std::string& expected, const std::string& got) {
  if (!holds) fail(name, expected, got);
}

// One size of an expected shape: a number, or a name where any size will do.
struct Size {
  Size(int64_t size) : size(size), text(std::to_string(size)) {}  // NOLINT: implicit
  Size(const char* name) : size(-1), text(name) {}                // NOLINT: implicit
  int64_t size;
  std::string text;
};

template <typename Sizes, typename Text>
std::string shape_text(const Sizes& sizes, const Text& text) {
  std::string all;
  for (const auto& size : sizes) all += (all.empty() ? "" : ", ") + text(size);
  return "[" + all + "]";
}

std::string shape_text(const py::array& array) {
  const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
  return shape_text(shape, [](py::ssize_t size) { return std::to_string(size); });
}

std::string dtype_text(const py::dtype& dtype) { return py::cast<std::string>(py::str(dtype)); }

void check_shape(const char* name, const py::array& array, std::initializer_list<Size> shape, const char* like) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  py::ssize_t d = 0;
  for (const Size* size = shape.begin(); fits && size != shape.end(); ++size, ++d) {
    fits = size->size < 0 || array.shape(d) == size->size;
  }
  if (!fits) fail(name, shape_text(shape, [](const Size& size) { return size.text; }) + like, shape_text(array));
}

// Rows of T, each dense; `stride` is in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

template <typename T>
Rows<T> as_rows(const char* name, const py::array& array) {
  constexpr auto kItem = static_cast<py::ssize_t>(sizeof(T));
  py::ssize_t row_bytes = kItem;
  bool dense = true;
  for (py::ssize_t d = array.ndim() - 1; d > 0; --d) {  // the stride of a dimension of size 1 means nothing
    dense = dense && (array.shape(d) == 1 || array.strides(d) == row_bytes);
    row_bytes *= array.shape(d);
  }
  py::ssize_t stride = array.ndim() > 0 && array.shape(0) > 1 ? array.strides(0) : row_bytes;
  if (array.ndim() == 1) dense = stride == row_bytes;
  if (array.size() == 0) dense = true, stride = row_bytes;
  if (!dense || stride < row_bytes || stride % kItem != 0) {
    fail(name, "rows that are dense and do not overlap",
         "shape " + shape_text(array) + " with strides of " + py::cast<std::string>(py::str(array.attr("strides"))) +
             " bytes");
  }
  const bool aligned = reinterpret_cast<uintptr_t>(array.data()) % alignof(T) == 0;
  expect(aligned, name, "an aligned array", "one that is not");
  if constexpr (!std::is_const_v<T>) expect(array.writeable(), name, "an array to write to", "a read-only one");
  return {static_cast<T*>(const_cast<void*>(array.data())), stride / kItem};
}

// Checks dtype, shape and layout. T is const for inputs; an array for a T that is not must be writable.
template <typename T>
Rows<T> get_rows(const char* name, const py::array& array, std::initializer_list<Size> shape, const char* like = "") {
  using Value = std::remove_const_t<T>;
  if (!py::isinstance<py::array_t<Value>>(array)) {
    fail(name, dtype_text(py::dtype::of<Value>()), dtype_text(array.dtype()));
  }
  check_shape(name, array, shape, like);
  return as_rows<T>(name, array);
}

// As get_rows, for an array without gaps between its rows.
template <typename T>
T* get_values(const char* name, const py::array& array, std::initializer_list<Size> shape, const char* like = "") {
  const Rows<T> rows = get_rows<T>(name, array, shape, like);
  int64_t row_size = 1;
  for (py::ssize_t d = 1; d < array.ndim(); ++d) row_size *= array.shape(d);
  expect(rows.stride == row_size, name, "no gaps between its rows", "a row every " + std::to_string(rows.stride));
  return rows.data;
}

template <typename T>
void check_range(const char* name, const T* values, int64_t count, int64_t limit) {
  if (count == 0) return;
  const auto [low, high] = std::minmax_element(values, values + count);
  expect(*low >= 0 && *high < limit, name, "0 to " + std::to_string(limit - 1),
         std::to_string(*low) + " to " + std::to_string(*high));
}

template <typename T>
void check_ascending(const char* name, const T* offsets, int64_t count, int64_t limit) {
  check_range(name, offsets, count, limit + 1);
  const T* drop = std::adjacent_find(offsets, offsets + count, [](T a, T b) { return a > b; });
  expect(drop == offsets + count, name, "ascending offsets", "one that is below the one before");
}

// Checked arguments that every operation takes.
const psykern::Kernels& choose(int num_threads, const Isa& isa) {
  expect(num_threads >= 1, "num_threads", "at least 1", std::to_string(num_threads));
  return psykern::kernels(isa ? isa->c_str() : nullptr);
}

void option_logprobs(const py::array& hidden, const py::array& weight, const py::array& token_offsets,
                     const py::array& token_ids, const py::array& lse, const py::array& logits, const py::array& argmax,
                     const py::array& entropy, int num_threads, const Isa& isa) {
  psykern::OptionLogprobs p{};
  const auto h = get_rows<const float>("hidden", hidden, {"R", "D"});
  p.num_rows = hidden.shape(0), p.hidden_size = hidden.shape(1);
  expect(p.hidden_size > 0, "hidden", "[R, D] with D at least 1", shape_text(hidden));
  p.hidden = h.data, p.hidden_stride = h.stride;

  const std::string like_hidden = " like hidden [.., " + std::to_string(p.hidden_size) + "]";
  const auto set_weight = [&](const auto& w, psykern::WeightType type) {
    p.weight = w.data, p.weight_stride = w.stride, p.weight_type = type;
  };
  check_shape("weight", weight, {"V", p.hidden_size}, like_hidden.c_str());
  p.vocab_size = weight.shape(0);
  if (py::isinstance<py::array_t<float>>(weight)) {
    set_weight(as_rows<const float>("weight", weight), psykern::WeightType::kFloat32);
  } else if (py::isinstance<py::array_t<int16_t>>(weight) || py::isinstance<py::array_t<uint16_t>>(weight)) {
    set_weight(as_rows<const uint16_t>("weight", weight), psykern::WeightType::kBfloat16);
  } else {
    fail("weight", "float32, or bfloat16 as int16 or uint16", dtype_text(weight.dtype()));
  }

  const int64_t num_tokens = token_ids.size();
  p.token_offsets = get_values<const int64_t>("token_offsets", token_offsets, {p.num_rows + 1});
  p.token_ids = get_values<const int32_t>("token_ids", token_ids, {"nnz"});
  check_ascending("token_offsets", p.token_offsets, p.num_rows + 1, num_tokens);
  expect(p.token_offsets[0] == 0 && p.token_offsets[p.num_rows] == num_tokens, "token_offsets",
         "0 to " + std::to_string(num_tokens) + ", the number of token_ids",
         std::to_string(p.token_offsets[0]) + " to " + std::to_string(p.token_offsets[p.num_rows]));
  check_range("token_ids", p.token_ids, num_tokens, p.vocab_size);
  p.lse = get_values<float>("lse", lse, {p.num_rows});
  p.logits = get_values<float>("logits", logits, {num_tokens});
  p.argmax = get_values<int64_t>("argmax", argmax, {p.num_rows});
  p.entropy = get_values<float>("entropy", entropy, {p.num_rows});

  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.option_logprobs(p, num_threads);
}

// Each segment's queries ascend, and one range of its path holds the keys from its first query to its last.
void check_paths(const psykern::PrefixAttention& p) {
  for (int64_t s = 0; s < p.num_segments; ++s) {
    const int32_t *begin = p.positions + p.query_offsets[s], *end = p.positions + p.query_offsets[s + 1];
    if (begin == end) continue;
    const auto of = [s] { return " of segment " + std::to_string(s); };
    if (begin[0] < 0 || !std::is_sorted(begin, end)) {
      fail("positions", "to ascend from 0 or above", "others for the queries" + of());
    }
    bool held = false;
    int64_t place = 0;
    for (int64_t r = p.range_offsets[s]; r < p.range_offsets[s + 1]; ++r) {
      const int64_t length = p.key_ranges[2 * r + 1] - p.key_ranges[2 * r];
      held = held || (place <= begin[0] && end[-1] < place + length);
      place += length;
    }
    if (!held) {
      fail("key_ranges",
           "one range with the keys at " + std::to_string(begin[0]) + " to " + std::to_string(end[-1]) + of(),
           std::to_string(p.range_offsets[s + 1] - p.range_offsets[s]) + " ranges of " + std::to_string(place) +
               " keys");
    }
  }
}

void prefix_attention(const py::array& q, const py::array& k, const py::array& v, const py::array& positions,
                      const py::array& query_offsets, const py::array& range_offsets, const py::array& key_ranges,
                      const py::array& out, float softmax_scale, std::optional<int64_t> window, int num_threads,
                      const Isa& isa) {
  psykern::PrefixAttention p{};
  const auto q_rows = get_rows<const float>("q", q, {"N", "Hq", "Dh"});
  const int64_t num_queries = q.shape(0);
  p.num_heads = q.shape(1), p.head_dim = q.shape(2);
  const auto k_rows = get_rows<const float>("k", k, {"M", "Hkv", p.head_dim}, " like q");
  const int64_t num_keys = k.shape(0);
  p.num_kv_heads = k.shape(1);
  expect(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0, "k",
         "a number of heads that divides the " + std::to_string(p.num_heads) + " of q", shape_text(k));
  const auto v_rows = get_rows<const float>("v", v, {num_keys, p.num_kv_heads, p.head_dim}, " like k");
  const auto out_rows = get_rows<float>("out", out, {num_queries, p.num_heads, p.head_dim}, " like q");
  p.q = q_rows.data, p.q_stride = q_rows.stride;
  p.k = k_rows.data, p.k_stride = k_rows.stride;
  p.v = v_rows.data, p.v_stride = v_rows.stride;
  p.out = out_rows.data, p.out_stride = out_rows.stride;

  p.positions = get_values<const int32_t>("positions", positions, {num_queries});
  p.query_offsets = get_values<const int32_t>("query_offsets", query_offsets, {"S + 1"});
  expect(query_offsets.shape(0) > 0, "query_offsets", "[S + 1]", shape_text(query_offsets));
  p.num_segments = query_offsets.shape(0) - 1;
  p.range_offsets =
      get_values<const int32_t>("range_offsets", range_offsets, {p.num_segments + 1}, " like query_offsets");
  p.key_ranges = get_values<const int32_t>("key_ranges", key_ranges, {"n", 2});
  check_ascending("query_offsets", p.query_offsets, p.num_segments + 1, num_queries);
  check_ascending("range_offsets", p.range_offsets, p.num_segments + 1, key_ranges.shape(0));
  check_range("key_ranges", p.key_ranges, key_ranges.size(), num_keys + 1);
  for (py::ssize_t r = 0; r < key_ranges.shape(0); ++r) {
    const int32_t begin = p.key_ranges[2 * r], end = p.key_ranges[2 * r + 1];
    if (begin > end)
      fail("key_ranges", "ranges from low to high", std::to_string(begin) + " to " + std::to_string(end));
  }
  check_paths(p);
  expect(!window || *window >= 1, "window", "at least 1", window ? std::to_string(*window) : "");
  p.scale = softmax_scale;
  p.window = std::min<int64_t>(window.value_or(INT32_MAX), INT32_MAX);

  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.prefix_attention(p, num_threads);
}

void add_rms_norm(const py::array& x, const std::optional<py::array>& residual, const py::array& weight,
                  const std::optional<py::array>& normed, const std::optional<py::array>& summed, float eps,
                  bool norm_first, int num_threads, const Isa& isa) {
  psykern::AddRmsNorm p{};
  const auto x_rows = get_rows<const float>("x", x, {"N", "D"});
  const Size rows = x.shape(0), size = x.shape(1);
  p.num_rows = rows.size, p.size = size.size, p.eps = eps, p.norm_first = norm_first;
  p.x = x_rows.data, p.x_stride = x_rows.stride;
  if (residual) {
    const auto r = get_rows<const float>("residual", *residual, {rows, size}, " like x");
    p.residual = r.data, p.residual_stride = r.stride;
  }
  p.weight = get_values<const float>("weight", weight, {size});
  if (normed) {
    const auto n = get_rows<float>("normed", *normed, {rows, size}, " like x");
    p.normed = n.data, p.normed_stride = n.stride;
  }
  if (summed) {
    const auto s = get_rows<float>("summed", *summed, {rows, size}, " like x");
    p.summed = s.data, p.summed_stride = s.stride;
  }
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.add_rms_norm(p, num_threads);
}

void qk_norm_rope(const py::array& x, const std::optional<py::array>& weight, const py::array& cos,
                  const py::array& sin, const py::array& positions, const py::array& out, float eps, int num_threads,
                  const Isa& isa) {
  psykern::QkNormRope p{};
  const auto x_rows = get_rows<const float>("x", x, {"N", "H", "Dh"});
  expect(x.shape(2) % 2 == 0, "x", "[N, H, Dh] with even Dh", shape_text(x));
  p.num_rows = x.shape(0), p.num_heads = x.shape(1), p.head_dim = x.shape(2), p.eps = eps;
  p.x = x_rows.data, p.x_stride = x_rows.stride;
  if (weight) {
    p.weight = get_values<const float>("weight", *weight, {"Dh or H * Dh"});
    p.weight_size = weight->shape(0);
    const int64_t row_size = p.num_heads * p.head_dim;
    expect(p.weight_size == p.head_dim || p.weight_size == row_size, "weight",
           "[" + std::to_string(p.head_dim) + "] or [" + std::to_string(row_size) + "]", shape_text(*weight));
  }
  p.cos = get_values<const float>("cos", cos, {"P", p.head_dim / 2});
  p.sin = get_values<const float>("sin", sin, {cos.shape(0), p.head_dim / 2}, " like cos");
  p.positions = get_values<const int32_t>("positions", positions, {p.num_rows});
  check_range("positions", p.positions, p.num_rows, cos.shape(0));
  const auto out_rows = get_rows<float>("out", out, {p.num_rows, p.num_heads, p.head_dim}, " like x");
  p.out = out_rows.data, p.out_stride = out_rows.stride;
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.qk_norm_rope(p, num_threads);
}

void silu_mul(const py::array& gate, const py::array& up, const py::array& out, int num_threads, const Isa& isa) {
  const auto g = get_rows<const float>("gate", gate, {"N", "F"});
  const Size rows = gate.shape(0), size = gate.shape(1);
  const auto u = get_rows<const float>("up", up, {rows, size}, " like gate");
  const auto o = get_rows<float>("out", out, {rows, size}, " like gate");
  const psykern::SiluMul p{g.data, u.data, o.data, g.stride, u.stride, o.stride, rows.size, size.size};
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.silu_mul(p, num_threads);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    try {
      found.emplace_back(psykern::kernels(name).name);
    } catch (const std::invalid_argument&) {  // not of this machine or build
    }
  }
  return found;
}

}  // namespace

void bind_kernels(py::module_& m) {
  using py::arg;
  const py::none none;
  m.def("instruction_sets", &instruction_sets, "Values of `isa` that this machine and build have, slowest first.");
  m.def("option_logprobs", &option_logprobs, arg("hidden"), arg("weight"), arg("token_offsets"), arg("token_ids"),
        arg("lse"), arg("logits"), arg("argmax"), arg("entropy"), py::kw_only(), arg("num_threads"), arg("isa") = none);
  m.def("prefix_attention", &prefix_attention, arg("q"), arg("k"), arg("v"), arg("positions"), arg("query_offsets"),
        arg("range_offsets"), arg("key_ranges"), arg("out"), py::kw_only(), arg("softmax_scale"), arg("window") = none,
        arg("num_threads"), arg("isa") = none);
  m.def("add_rms_norm", &add_rms_norm, arg("x"), arg("residual").none(true), arg("weight"), arg("normed").none(true),
        arg("summed").none(true), py::kw_only(), arg("eps"), arg("norm_first"), arg("num_threads"), arg("isa") = none);
  m.def("qk_norm_rope", &qk_norm_rope, arg("x"), arg("weight").none(true), arg("cos"), arg("sin"), arg("positions"),
        arg("out"), py::kw_only(), arg("eps"), arg("num_threads"), arg("isa") = none);
  m.def("silu_mul", &silu_mul, arg("gate"), arg("up"), arg("out"), py::kw_only(), arg("num_threads"),
        arg("isa") = none);
}
