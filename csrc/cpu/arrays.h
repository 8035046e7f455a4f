// The checks of the numpy arrays that reach an operation: dtype, shape, layout, and the values that kernels follow.
// Each error names the argument, what was expected and what was got.
#pragma once

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

#include "float_type.h"
#include "isa.h"

namespace py = pybind11;

namespace {

using Isa = std::optional<std::string>;

[[noreturn]] inline void fail(const std::string& name, const std::string& expected, const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

// Where a message takes longer than the check, and the check is of each array or segment, write `if (…) fail(…)`.
inline void expect(bool holds, const char* name, const std::string& expected, const std::string& got) {
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

inline std::string shape_text(const py::array& array) {
  const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
  return shape_text(shape, [](py::ssize_t size) { return std::to_string(size); });
}

inline std::string dtype_text(const py::dtype& dtype) { return py::cast<std::string>(py::str(dtype)); }

inline void check_shape(const char* name, const py::array& array, std::initializer_list<Size> shape, const char* like) {
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

// Rows of fp32, or of bf16 as int16 or uint16, each dense; `stride` is in elements.
struct FloatRows {
  void* data;
  int64_t stride;
  psykern::FloatType type;
};

inline FloatRows get_float_rows(const char* name, const py::array& array, std::initializer_list<Size> shape,
                                const char* like = "") {
  check_shape(name, array, shape, like);
  if (py::isinstance<py::array_t<float>>(array)) {
    const auto rows = as_rows<const float>(name, array);
    return {const_cast<float*>(rows.data), rows.stride, psykern::FloatType::kFloat32};
  }
  if (py::isinstance<py::array_t<int16_t>>(array) || py::isinstance<py::array_t<uint16_t>>(array)) {
    const auto rows = as_rows<const uint16_t>(name, array);
    return {const_cast<uint16_t*>(rows.data), rows.stride, psykern::FloatType::kBfloat16};
  }
  fail(name, "float32, or bfloat16 as int16 or uint16", dtype_text(array.dtype()));
}

// Checked arguments that every operation takes.
inline const psykern::Kernels& choose(int num_threads, const Isa& isa) {
  expect(num_threads >= 1, "num_threads", "at least 1", std::to_string(num_threads));
  return psykern::kernels(isa ? isa->c_str() : nullptr);
}

}  // namespace
