// The Python functions of products with weights; see bind_kernels.cpp.
#include <cstdint>
#include <utility>
#include <vector>

#include "arrays.h"
#include "bind_kernels.h"
#include "isa.h"

namespace {

using psykern::FloatType;
using MaybeArray = std::optional<py::array>;

const float* get_bias(const char* name, const MaybeArray& bias, int64_t columns) {
  return bias ? get_values<const float>(name, *bias, {columns}) : nullptr;
}

// First and one-past-last byte of rows.
using Span = std::pair<const char*, const char*>;
Span span(const void* data, int64_t stride, FloatType type, const py::array& array) {
  const int64_t item = type == FloatType::kFloat32 ? 4 : 2, count = array.shape(0);
  const auto* begin = static_cast<const char*>(data);
  return {begin, count == 0 ? begin : begin + ((count - 1) * stride + array.shape(1)) * item};
}

// One layer of a call: (weight, bias or None, up or None, up_bias or None, out).
using Part = std::tuple<py::array, MaybeArray, MaybeArray, MaybeArray, py::array>;

psykern::WeightRows get_weight(const char* name, const py::array& weight, const Size& columns, int64_t depth) {
  if (weight.dtype().kind() == 'f' && weight.itemsize() == 2) {  // fp16, which C++ has no type for
    check_shape(name, weight, {columns, depth}, "");
    const auto rows = as_rows<const uint16_t>(name, weight);
    return {rows.data, rows.stride, FloatType::kFloat16};
  }
  const FloatRows rows = get_float_rows(name, weight, {columns, depth});
  return {rows.data, rows.stride, rows.type};
}

// A product with what it is to know of x, each of whose rows it has once.
psykern::Linear get_x(const py::array& x) {
  const FloatRows rows = get_float_rows("x", x, {"N", "K"});
  expect(x.shape(1) > 0, "x", "[N, K] with K at least 1", shape_text(x));
  psykern::Linear p{};
  p.x = rows.data, p.x_stride = rows.stride, p.type = rows.type;
  p.num_rows = x.shape(0), p.depth = x.shape(1), p.top_k = 1;
  return p;
}

FloatRows get_out(const py::array& out, const psykern::Linear& p, const py::array& x, int64_t columns) {
  const FloatRows rows = get_float_rows("out", out, {p.num_rows, columns});
  expect(rows.type == p.type, "out", "the dtype of x", dtype_text(out.dtype()));
  expect(out.writeable(), "out", "an array to write to", "a read-only one");
  const auto [x_begin, x_end] = span(p.x, p.x_stride, p.type, x);
  const auto [begin, end] = span(rows.data, rows.stride, rows.type, out);
  expect(end <= x_begin || begin >= x_end, "out", "an array apart from x", "one that shares memory with it");
  return rows;
}

void linear(const py::array& x, const std::vector<Part>& parts, const std::string& epilogue, int num_threads,
            const Isa& isa) {
  psykern::Linear p = get_x(x);
  const bool is_gated = epilogue == "silu_mul";
  expect(is_gated || epilogue == "add" || epilogue == "store", "epilogue", "store, add or silu_mul", epilogue);
  p.epilogue = is_gated ? psykern::Epilogue::kSiluMul
                        : (epilogue == "add" ? psykern::Epilogue::kAdd : psykern::Epilogue::kStore);
  std::vector<psykern::LinearPart> of;
  for (const auto& [weight, bias, up, up_bias, out] : parts) {
    psykern::LinearPart part{};
    expect(up.has_value() == is_gated, "up", "a weight with silu_mul alone", up ? "one" : "none");
    part.weight = get_weight("weight", weight, "M", p.depth);
    const int64_t columns = part.columns = weight.shape(0);
    if (up) part.up = get_weight("up", *up, columns, p.depth);
    part.bias = get_bias("bias", bias, columns);
    part.up_bias = get_bias("up_bias", up_bias, columns);
    const FloatRows rows = get_out(out, p, x, columns);
    part.out = rows.data, part.out_stride = rows.stride;
    of.push_back(part);
  }
  const psykern::RowGroup all{0, p.num_rows, of.data(), static_cast<int64_t>(of.size())};
  p.groups = &all, p.num_groups = 1;
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.linear(p, num_threads);
}

// Of the experts of a mixture, each a weight [M, K] or [F, K].
using Weights = std::vector<py::array>;

// `count` slots, each of which is there once: they are followed, and all of `out` is to be written.
const int32_t* get_slots(const py::array& array, int64_t count) {
  const int32_t* slots = get_values<const int32_t>("slots", array, {count});
  check_range("slots", slots, count, count);
  std::vector<bool> seen(static_cast<size_t>(count));
  for (const int32_t* slot = slots; slot < slots + count; ++slot) {
    if (seen[static_cast<size_t>(*slot)]) fail("slots", "each once", std::to_string(*slot) + " again");
    seen[static_cast<size_t>(*slot)] = true;
  }
  return slots;
}

// `p`: all but the groups of its rows; with `ups`, of SwiGLU, `weights` are the gates.
void multiply_experts(psykern::Linear p, const py::array& x, const Weights& weights, const Weights* ups,
                      const py::array& offsets, const py::array& out, int num_threads, const Isa& isa) {
  const char* name = ups != nullptr ? "gates" : "weights";
  const auto num_experts = static_cast<int64_t>(weights.size());
  expect(num_experts > 0, name, "at least one", "none");
  expect(weights[0].ndim() == 2, name, "[M, K] each", shape_text(weights[0]));
  const int64_t columns = weights[0].shape(0);
  expect(ups == nullptr || ups->size() == weights.size(), "ups", std::to_string(num_experts) + " like gates",
         ups == nullptr ? "" : std::to_string(ups->size()));
  const auto* ends = get_values<const int32_t>("offsets", offsets, {num_experts + 1});
  check_ascending("offsets", ends, num_experts + 1, p.num_rows);
  expect(ends[0] == 0 && ends[num_experts] == p.num_rows, "offsets", "0 to " + std::to_string(p.num_rows),
         std::to_string(ends[0]) + " to " + std::to_string(ends[num_experts]));
  const FloatRows rows = get_out(out, p, x, columns);
  std::vector<psykern::LinearPart> parts(weights.size());
  std::vector<psykern::RowGroup> groups;
  for (size_t e = 0; e < weights.size(); ++e) {
    parts[e].columns = columns, parts[e].out = rows.data, parts[e].out_stride = rows.stride;
    parts[e].weight = get_weight(name, weights[e], columns, p.depth);
    if (ups != nullptr) parts[e].up = get_weight("ups", (*ups)[e], columns, p.depth);
    groups.push_back({ends[e], ends[e + 1], &parts[e], 1});
  }
  p.groups = groups.data(), p.num_groups = num_experts;
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.linear(p, num_threads);
}

void expert_swiglu(const py::array& x, const Weights& gates, const Weights& ups, const py::array& slots,
                   const py::array& offsets, const py::array& out, int64_t top_k, int num_threads, const Isa& isa) {
  psykern::Linear p = get_x(x);
  expect(top_k > 0, "top_k", "at least 1", std::to_string(top_k));
  p.num_rows = x.shape(0) * top_k, p.top_k = top_k, p.epilogue = psykern::Epilogue::kSiluMul;
  p.x_slots = get_slots(slots, p.num_rows);
  multiply_experts(p, x, gates, &ups, offsets, out, num_threads, isa);
}

void expert_linear(const py::array& x, const Weights& weights, const py::array& slots, const py::array& offsets,
                   const py::array& out, int num_threads, const Isa& isa) {
  psykern::Linear p = get_x(x);
  p.epilogue = psykern::Epilogue::kStore;
  p.out_slots = get_slots(slots, p.num_rows);
  multiply_experts(p, x, weights, nullptr, offsets, out, num_threads, isa);
}

}  // namespace

void bind_linear(py::module_& m) {
  using py::arg;
  const py::none none;
  m.def("linear", &linear, arg("x"), arg("parts"), py::kw_only(), arg("epilogue"), arg("num_threads"),
        arg("isa") = none);
  m.def("expert_swiglu", &expert_swiglu, arg("x"), arg("gates"), arg("ups"), arg("slots"), arg("offsets"), arg("out"),
        py::kw_only(), arg("top_k"), arg("num_threads"), arg("isa") = none);
  m.def("expert_linear", &expert_linear, arg("x"), arg("weights"), arg("slots"), arg("offsets"), arg("out"),
        py::kw_only(), arg("num_threads"), arg("isa") = none);
}
