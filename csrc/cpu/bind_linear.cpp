// The Python functions of linear; see bind_kernels.cpp.
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
std::pair<const char*, const char*> span(const FloatRows& rows, const py::array& array) {
  const int64_t item = rows.type == FloatType::kFloat32 ? 4 : 2, count = array.shape(0);
  const auto* begin = static_cast<const char*>(rows.data);
  return {begin, count == 0 ? begin : begin + ((count - 1) * rows.stride + array.shape(1)) * item};
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

void linear(const py::array& x, const std::vector<Part>& parts, const std::string& epilogue, int num_threads,
            const Isa& isa) {
  psykern::Linear p{};
  const FloatRows rows = get_float_rows("x", x, {"N", "K"});
  p.x = rows.data, p.x_stride = rows.stride, p.type = rows.type;
  p.num_rows = x.shape(0), p.depth = x.shape(1);
  expect(p.depth > 0, "x", "[N, K] with K at least 1", shape_text(x));
  const bool is_gated = epilogue == "silu_mul";
  expect(is_gated || epilogue == "add" || epilogue == "store", "epilogue", "store, add or silu_mul", epilogue);
  p.epilogue = is_gated ? psykern::Epilogue::kSiluMul
                        : (epilogue == "add" ? psykern::Epilogue::kAdd : psykern::Epilogue::kStore);
  const auto [x_begin, x_end] = span(rows, x);
  std::vector<psykern::LinearPart> of;
  for (const auto& [weight, bias, up, up_bias, out] : parts) {
    psykern::LinearPart part{};
    expect(up.has_value() == is_gated, "up", "a weight with silu_mul alone", up ? "one" : "none");
    part.weight = get_weight("weight", weight, "M", p.depth);
    const int64_t columns = part.columns = weight.shape(0);
    if (up) part.up = get_weight("up", *up, columns, p.depth);
    part.bias = get_bias("bias", bias, columns);
    part.up_bias = get_bias("up_bias", up_bias, columns);
    const FloatRows out_rows = get_float_rows("out", out, {p.num_rows, columns});
    expect(out_rows.type == p.type, "out", "the dtype of x", dtype_text(out.dtype()));
    expect(out.writeable(), "out", "an array to write to", "a read-only one");
    const auto [begin, end] = span(out_rows, out);
    expect(end <= x_begin || begin >= x_end, "out", "an array apart from x", "one that shares memory with it");
    part.out = out_rows.data, part.out_stride = out_rows.stride;
    of.push_back(part);
  }
  p.parts = of.data(), p.num_parts = static_cast<int64_t>(of.size());
  const psykern::Kernels& kernels = choose(num_threads, isa);
  const py::gil_scoped_release release;
  kernels.linear(p, num_threads);
}

}  // namespace

void bind_linear(py::module_& m) {
  using py::arg;
  const py::none none;
  m.def("linear", &linear, arg("x"), arg("parts"), py::kw_only(), arg("epilogue"), arg("num_threads"),
        arg("isa") = none);
}
