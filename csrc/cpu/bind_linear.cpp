// The Python functions of linear; see bind_kernels.cpp.
#include <cstdint>
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

// One layer of a call: (columns, packed or None, weight or None, up or None, bias or None, up_bias or None, out).
using Part = std::tuple<int64_t, MaybeArray, MaybeArray, MaybeArray, MaybeArray, MaybeArray, py::array>;

psykern::WeightRows get_weight(const char* name, const MaybeArray& weight, int64_t columns, int64_t depth) {
  if (!weight) return {nullptr, 0, FloatType::kFloat32};
  const FloatRows rows = get_float_rows(name, *weight, {columns, depth});
  return {rows.data, rows.stride, rows.type};
}

const void* get_packed(const py::array& packed, int64_t bytes) {
  const auto* data = get_values<const uint8_t>("packed", packed, {bytes}, ", the bytes of the packed weight");
  expect(reinterpret_cast<uintptr_t>(data) % 64 == 0, "packed", "an array at a multiple of 64 bytes", "another");
  return data;
}

void linear(const py::array& x, const std::vector<Part>& parts, const std::string& epilogue, int num_threads,
            const Isa& isa) {
  const psykern::Kernels& kernels = choose(num_threads, isa);
  psykern::Linear p{};
  const FloatRows rows = get_float_rows("x", x, {"N", "K"});
  p.x = rows.data, p.x_stride = rows.stride, p.type = rows.type;
  p.num_rows = x.shape(0), p.depth = x.shape(1);
  expect(p.depth > 0, "x", "[N, K] with K at least 1", shape_text(x));
  const bool is_gated = epilogue == "silu_mul";
  expect(is_gated || epilogue == "add" || epilogue == "store", "epilogue", "store, add or silu_mul", epilogue);
  p.epilogue = is_gated ? psykern::Epilogue::kSiluMul
                        : (epilogue == "add" ? psykern::Epilogue::kAdd : psykern::Epilogue::kStore);
  std::vector<psykern::LinearPart> of;
  for (const auto& [columns, packed, weight, up, bias, up_bias, out] : parts) {
    psykern::LinearPart part{};
    part.columns = columns;
    expect(packed.has_value() != weight.has_value(), "weight", "either packed or as it is", "both or none");
    expect(packed || up.has_value() == is_gated, "up", "a weight with silu_mul alone", up ? "one" : "none");
    if (packed) part.packed = get_packed(*packed, kernels.packed_linear_bytes(columns, p.depth, is_gated, p.type));
    part.weight = get_weight("weight", weight, columns, p.depth);
    part.up = get_weight("up", up, columns, p.depth);
    part.bias = get_bias("bias", bias, columns);
    part.up_bias = get_bias("up_bias", up_bias, columns);
    const FloatRows out_rows = get_float_rows("out", out, {p.num_rows, columns});
    expect(out_rows.type == p.type, "out", "the dtype of x", dtype_text(out.dtype()));
    expect(out.writeable(), "out", "an array to write to", "a read-only one");
    part.out = out_rows.data, part.out_stride = out_rows.stride;
    of.push_back(part);
  }
  p.parts = of.data(), p.num_parts = static_cast<int64_t>(of.size());
  const py::gil_scoped_release release;
  kernels.linear(p, num_threads);
}

FloatType type_of(bool is_bf16) { return is_bf16 ? FloatType::kBfloat16 : FloatType::kFloat32; }

int64_t packed_linear_bytes(int64_t columns, int64_t depth, bool is_gated, bool is_bf16, const Isa& isa) {
  expect(columns >= 0 && depth > 0, "shape", "[M, K] with K at least 1", std::to_string(depth));
  return choose(1, isa).packed_linear_bytes(columns, depth, is_gated, type_of(is_bf16));
}

void pack_linear(const py::array& weight, const MaybeArray& up, const py::array& packed, bool is_bf16, int num_threads,
                 const Isa& isa) {
  const psykern::Kernels& kernels = choose(num_threads, isa);
  psykern::PackLinear p{};
  const FloatRows rows = get_float_rows("weight", weight, {"M", "K"});
  p.columns = weight.shape(0), p.depth = weight.shape(1), p.type = type_of(is_bf16);
  expect(p.depth > 0, "weight", "[M, K] with K at least 1", shape_text(weight));
  p.weight = {rows.data, rows.stride, rows.type};
  p.up = get_weight("up", up, p.columns, p.depth);
  const void* data = get_packed(packed, kernels.packed_linear_bytes(p.columns, p.depth, up.has_value(), p.type));
  expect(packed.writeable(), "packed", "an array to write to", "a read-only one");
  p.packed = const_cast<void*>(data);
  const py::gil_scoped_release release;
  kernels.pack_linear(p, num_threads);
}

}  // namespace

void bind_linear(py::module_& m) {
  using py::arg;
  const py::none none;
  m.def("linear", &linear, arg("x"), arg("parts"), py::kw_only(), arg("epilogue"), arg("num_threads"),
        arg("isa") = none);
  m.def("packed_linear_bytes", &packed_linear_bytes, arg("columns"), arg("depth"), py::kw_only(), arg("is_gated"),
        arg("is_bf16"), arg("isa") = none);
  m.def("pack_linear", &pack_linear, arg("weight"), arg("up").none(true), arg("packed"), py::kw_only(), arg("is_bf16"),
        arg("num_threads"), arg("isa") = none);
}
