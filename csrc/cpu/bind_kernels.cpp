// Python bindings of the operations: numpy arrays in and out without copies. Every argument is checked here, down to
// the indices that the kernels follow, so that no call from Python reads or writes outside its arrays.
#include "bind_kernels.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "isa.h"

namespace {

void option_logprobs(const py::array& hidden, const py::array& weight, const py::array& token_offsets,
                     const py::array& token_ids, const py::array& lse, const py::array& logits, const py::array& argmax,
                     const py::array& entropy, int num_threads, const Isa& isa) {
  psykern::OptionLogprobs p{};
  const FloatRows h = get_float_rows("hidden", hidden, {"R", "D"});
  p.num_rows = hidden.shape(0), p.hidden_size = hidden.shape(1);
  expect(p.hidden_size > 0, "hidden", "[R, D] with D at least 1", shape_text(hidden));
  p.hidden = h.data, p.hidden_stride = h.stride, p.hidden_type = h.type;

  const std::string like_hidden = " like hidden [.., " + std::to_string(p.hidden_size) + "]";
  const FloatRows w = get_float_rows("weight", weight, {"V", p.hidden_size}, like_hidden.c_str());
  p.vocab_size = weight.shape(0);
  p.weight = w.data, p.weight_stride = w.stride, p.weight_type = w.type;

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
  const FloatRows q_rows = get_float_rows("q", q, {"N", "Hq", "Dh"});
  const int64_t num_queries = q.shape(0);
  p.num_heads = q.shape(1), p.head_dim = q.shape(2);
  const auto get_like_q = [&](const char* name, const py::array& array, std::initializer_list<Size> shape,
                              const char* like) {
    const FloatRows rows = get_float_rows(name, array, shape, like);
    expect(rows.type == q_rows.type, name, dtype_text(q.dtype()) + " like q", dtype_text(array.dtype()));
    return rows;
  };
  const FloatRows k_rows = get_like_q("k", k, {"M", "Hkv", p.head_dim}, " like q");
  const int64_t num_keys = k.shape(0);
  p.num_kv_heads = k.shape(1);
  expect(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0, "k",
         "a number of heads that divides the " + std::to_string(p.num_heads) + " of q", shape_text(k));
  const FloatRows v_rows = get_like_q("v", v, {num_keys, p.num_kv_heads, p.head_dim}, " like k");
  const FloatRows out_rows = get_like_q("out", out, {num_queries, p.num_heads, p.head_dim}, " like q");
  expect(out.writeable(), "out", "an array to write to", "a read-only one");
  p.type = q_rows.type;
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

// Rows of activations beside others of `type`; written where `is_out`.
FloatRows get_like(const char* name, const py::array& array, psykern::FloatType type, std::initializer_list<Size> shape,
                   const char* like, bool is_out = false) {
  const FloatRows rows = get_float_rows(name, array, shape, like);
  if (rows.type != type) fail(name, std::string("the dtype of ") + (like + sizeof(" like")), dtype_text(array.dtype()));
  if (is_out) expect(array.writeable(), name, "an array to write to", "a read-only one");
  return rows;
}

void add_rms_norm(const py::array& x, const std::optional<py::array>& residual, const py::array& weight,
                  const std::optional<py::array>& normed, const std::optional<py::array>& summed, float eps,
                  bool norm_first, int num_threads, const Isa& isa) {
  psykern::AddRmsNorm p{};
  const FloatRows x_rows = get_float_rows("x", x, {"N", "D"});
  const Size rows = x.shape(0), size = x.shape(1);
  p.type = x_rows.type, p.num_rows = rows.size, p.size = size.size, p.eps = eps, p.norm_first = norm_first;
  p.x = x_rows.data, p.x_stride = x_rows.stride;
  if (residual) {
    const FloatRows r = get_like("residual", *residual, p.type, {rows, size}, " like x");
    p.residual = r.data, p.residual_stride = r.stride;
  }
  p.weight = get_values<const float>("weight", weight, {size});
  if (normed) {
    const FloatRows n = get_like("normed", *normed, p.type, {rows, size}, " like x", true);
    p.normed = n.data, p.normed_stride = n.stride;
  }
  if (summed) {
    const FloatRows s = get_like("summed", *summed, p.type, {rows, size}, " like x", true);
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
  const FloatRows x_rows = get_float_rows("x", x, {"N", "H", "Dh"});
  expect(x.shape(2) % 2 == 0, "x", "[N, H, Dh] with even Dh", shape_text(x));
  p.type = x_rows.type, p.num_rows = x.shape(0), p.num_heads = x.shape(1), p.head_dim = x.shape(2), p.eps = eps;
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
  const FloatRows out_rows = get_like("out", out, p.type, {p.num_rows, p.num_heads, p.head_dim}, " like x", true);
  p.out = out_rows.data, p.out_stride = out_rows.stride;
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.qk_norm_rope(p, num_threads);
}

void silu_mul(const py::array& gate, const py::array& up, const py::array& out, int num_threads, const Isa& isa) {
  const FloatRows g = get_float_rows("gate", gate, {"N", "F"});
  const Size rows = gate.shape(0), size = gate.shape(1);
  const FloatRows u = get_like("up", up, g.type, {rows, size}, " like gate");
  const FloatRows o = get_like("out", out, g.type, {rows, size}, " like gate", true);
  const psykern::SiluMul p{g.type, g.data, u.data, o.data, g.stride, u.stride, o.stride, rows.size, size.size};
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.silu_mul(p, num_threads);
}

void add_weighted(const py::array& x, const py::array& weights, const py::array& total, int num_threads,
                  const Isa& isa) {
  psykern::AddWeighted p{};
  const FloatRows rows = get_float_rows("total", total, {"N", "D"});
  expect(total.writeable(), "total", "an array to write to", "a read-only one");
  p.type = rows.type, p.num_rows = total.shape(0), p.size = total.shape(1);
  p.total = rows.data, p.total_stride = rows.stride;
  p.weights = get_values<const float>("weights", weights, {p.num_rows, "k"});
  p.top_k = weights.shape(1);
  const FloatRows x_rows = get_like("x", x, p.type, {p.num_rows * p.top_k, p.size}, " like total");
  p.x = x_rows.data, p.x_stride = x_rows.stride;
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.add_weighted(p, num_threads);
}

double peak(const std::string& dtype, int64_t num_blocks, int num_threads, const Isa& isa) {
  const bool is_fp32 = dtype == "float32";
  expect(is_fp32 || dtype == "bfloat16", "dtype", "float32 or bfloat16", dtype);
  const psykern::Peak p{is_fp32 ? psykern::FloatType::kFloat32 : psykern::FloatType::kBfloat16, num_blocks};
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  return kernels.peak(p, num_threads);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  for (const char* name : psykern::kKernelNames) {
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
  m.def("instruction_set", [] { return psykern::kernels().name; }, "The value of `isa` that None means.");
  m.def(
      "multiplies_bf16", [](const Isa& isa) { return choose(1, isa).multiplies_bf16; },
      "Whether products of bf16 are of bf16, instead of numbers that are widened first.", arg("isa") = none);
  m.def("peak", &peak, arg("dtype"), arg("num_blocks"), py::kw_only(), arg("num_threads"), arg("isa") = none,
        "Multiply-adds in registers alone; gives the operations done, 0 where the set multiplies no such numbers.");
  m.def("option_logprobs", &option_logprobs, arg("hidden"), arg("weight"), arg("token_offsets"), arg("token_ids"),
        arg("lse"), arg("logits"), arg("argmax"), arg("entropy"), py::kw_only(), arg("num_threads"), arg("isa") = none);
  m.def("prefix_attention", &prefix_attention, arg("q"), arg("k"), arg("v"), arg("positions"), arg("query_offsets"),
        arg("range_offsets"), arg("key_ranges"), arg("out"), py::kw_only(), arg("softmax_scale"), arg("window") = none,
        arg("num_threads"), arg("isa") = none);
  m.def("add_rms_norm", &add_rms_norm, arg("x"), arg("residual").none(true), arg("weight"), arg("normed").none(true),
        arg("summed").none(true), py::kw_only(), arg("eps"), arg("norm_first"), arg("num_threads"), arg("isa") = none);
  m.def("qk_norm_rope", &qk_norm_rope, arg("x"), arg("weight").none(true), arg("cos"), arg("sin"), arg("positions"),
        arg("out"), py::kw_only(), arg("eps"), arg("num_threads"), arg("isa") = none);
  m.def("add_weighted", &add_weighted, arg("x"), arg("weights"), arg("total"), py::kw_only(), arg("num_threads"),
        arg("isa") = none);
  m.def("silu_mul", &silu_mul, arg("gate"), arg("up"), arg("out"), py::kw_only(), arg("num_threads"),
        arg("isa") = none);
}
