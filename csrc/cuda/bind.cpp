// Python bindings of the operations on a GPU. Tensors come as addresses, sizes, strides in elements and a dtype code,
// so that no Torch header is needed; what can be told of these without the device is checked here. Values behind the
// addresses (ids, positions, rows) are the caller's.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace {

using psykern::cuda::Dtype;
using psykern::cuda::Rows;

// Of a row in elements, where an int may count a block beyond the end, and of a grid in rows.
constexpr int64_t kMaxSize = 1 << 30;
constexpr int64_t kMaxBatches = 65535;        // of a grid's second dimension
constexpr int64_t kMaxColumns = 65535 * 256;  // of silu_mul, whose rows are cut along a grid's second dimension

void expect(bool holds, const char* name, const std::string& expected, const std::string& got) {
  if (!holds) throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

Dtype get_dtype(int code) {
  expect(code >= 0 && code <= 2, "dtype", "0 (float32), 1 (bfloat16) or 2 (float16)", std::to_string(code));
  return static_cast<Dtype>(code);
}

void check_size(const char* name, int64_t size, int64_t limit = kMaxSize) {
  expect(size >= 0 && size <= limit, name, "0 to " + std::to_string(limit), std::to_string(size));
}

// An address of `count` items, which may be null where there are none.
void* get_pointer(const char* name, std::uintptr_t address, int64_t count, int64_t item) {
  expect(address != 0 || count == 0, name, "an address on the device", "null");
  expect(address % static_cast<std::uintptr_t>(item) == 0, name, "an address divisible by " + std::to_string(item),
         std::to_string(address));
  return reinterpret_cast<void*>(address);
}

template <typename T>
T* get_values(const char* name, std::uintptr_t address, int64_t count) {
  return static_cast<T*>(get_pointer(name, address, count, static_cast<int64_t>(sizeof(T))));
}

// Rows of `columns` items that do not overlap.
Rows get_rows(const char* name, std::uintptr_t address, int64_t stride, int64_t rows, int64_t columns, Dtype dtype) {
  expect(rows <= 1 || stride >= columns, name, "a stride of at least " + std::to_string(columns),
         std::to_string(stride));
  return {get_pointer(name, address, rows * columns, psykern::cuda::item_bytes(dtype)), stride};
}

cudaStream_t get_stream(std::uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void add_rms_norm(std::uintptr_t x, int64_t x_stride, std::uintptr_t residual, int64_t residual_stride,
                  std::uintptr_t weight, std::uintptr_t normed, int64_t normed_stride, std::uintptr_t summed,
                  int64_t summed_stride, int64_t rows, int64_t columns, float eps, bool norm_first, int dtype,
                  std::uintptr_t stream) {
  const Dtype type = get_dtype(dtype);
  check_size("rows", rows);
  check_size("columns", columns);
  const Rows x_rows = get_rows("x", x, x_stride, rows, columns, type);
  const void* weights = get_pointer("weight", weight, rows * columns, psykern::cuda::item_bytes(type));
  const Rows normed_rows = get_rows("normed", normed, normed_stride, rows, columns, type);
  Rows residual_rows{}, summed_rows{};
  if (residual != 0) {
    residual_rows = get_rows("residual", residual, residual_stride, rows, columns, type);
    summed_rows = get_rows("summed", summed, summed_stride, rows, columns, type);
  } else {
    expect(summed == 0, "summed", "null, as residual is", "an address");
  }
  const py::gil_scoped_release release;
  psykern::cuda::add_rms_norm(x_rows, residual_rows, weights, normed_rows, summed_rows, rows, columns, eps, norm_first,
                              type, get_stream(stream));
}

void qk_norm_rope(std::uintptr_t x, int64_t x_stride, std::uintptr_t weight, std::uintptr_t cos, std::uintptr_t sin,
                  std::uintptr_t positions, std::uintptr_t out, int64_t out_stride, int64_t rows, int64_t heads,
                  int64_t pairs, float eps, bool norm_projection, int dtype, std::uintptr_t stream) {
  const Dtype type = get_dtype(dtype);
  check_size("rows", rows);
  check_size("heads", heads);
  check_size("pairs", pairs);
  const int64_t columns = heads * 2 * pairs;
  expect(columns <= kMaxSize, "heads", "heads * 2 * pairs up to " + std::to_string(kMaxSize), std::to_string(columns));
  const Rows x_rows = get_rows("x", x, x_stride, rows, columns, type);
  const Rows out_rows = get_rows("out", out, out_stride, rows, columns, type);
  const void* weights = get_pointer("weight", weight, 0, psykern::cuda::item_bytes(type));
  const auto* cosines = get_values<const float>("cos", cos, rows * pairs);
  const auto* sines = get_values<const float>("sin", sin, rows * pairs);
  const auto* places = get_values<const int32_t>("positions", positions, rows);
  const py::gil_scoped_release release;
  psykern::cuda::qk_norm_rope(x_rows, weights, cosines, sines, places, out_rows, rows, heads, pairs, eps,
                              norm_projection, type, get_stream(stream));
}

void silu_mul(std::uintptr_t gate, int64_t gate_stride, std::uintptr_t up, int64_t up_stride, std::uintptr_t out,
              int64_t out_stride, int64_t rows, int64_t columns, int dtype, std::uintptr_t stream) {
  const Dtype type = get_dtype(dtype);
  check_size("rows", rows);
  check_size("columns", columns, kMaxColumns);
  const Rows gate_rows = get_rows("gate", gate, gate_stride, rows, columns, type);
  const Rows up_rows = get_rows("up", up, up_stride, rows, columns, type);
  const Rows out_rows = get_rows("out", out, out_stride, rows, columns, type);
  const py::gil_scoped_release release;
  psykern::cuda::silu_mul(gate_rows, up_rows, out_rows, rows, columns, type, get_stream(stream));
}

void online_softmax_chunk(std::uintptr_t z, int64_t rows, int64_t width, int64_t first, std::uintptr_t token_offsets,
                          std::uintptr_t token_ids, std::uintptr_t wanted, std::uintptr_t maximum, std::uintptr_t total,
                          std::uintptr_t moment, std::uintptr_t best, std::uintptr_t stream) {
  check_size("rows", rows);
  check_size("width", width);
  check_size("first", first);
  const auto* logits = get_values<const float>("z", z, rows * width);
  const auto* offsets = get_values<const int64_t>("token_offsets", token_offsets, rows);
  const auto* ids = get_values<const int32_t>("token_ids", token_ids, 0);
  auto* gathered = get_values<float>("wanted", wanted, 0);
  const psykern::cuda::SoftmaxState state{
      get_values<float>("maximum", maximum, rows), get_values<float>("total", total, rows),
      get_values<float>("moment", moment, rows), get_values<int64_t>("best", best, rows)};
  const py::gil_scoped_release release;
  psykern::cuda::online_softmax_chunk(logits, rows, width, first, offsets, ids, gathered, state, get_stream(stream));
}

void finish_softmax(std::uintptr_t maximum, std::uintptr_t total, std::uintptr_t moment, std::uintptr_t lse,
                    std::uintptr_t entropy, int64_t rows, std::uintptr_t stream) {
  check_size("rows", rows);
  const psykern::cuda::SoftmaxState state{get_values<float>("maximum", maximum, rows),
                                          get_values<float>("total", total, rows),
                                          get_values<float>("moment", moment, rows), nullptr};
  auto* lses = get_values<float>("lse", lse, rows);
  auto* entropies = get_values<float>("entropy", entropy, rows);
  const py::gil_scoped_release release;
  psykern::cuda::finish_softmax(state, lses, entropies, rows, get_stream(stream));
}

void gather_rows(std::uintptr_t source, std::uintptr_t rows, std::uintptr_t out, int64_t batches, int64_t count,
                 int64_t row_bytes, int64_t source_batch_bytes, int64_t out_batch_bytes, std::uintptr_t stream) {
  check_size("batches", batches, kMaxBatches);
  check_size("count", count);
  check_size("row_bytes", row_bytes);
  const int64_t bytes = count * row_bytes;
  expect(batches <= 1 || out_batch_bytes >= bytes, "out_batch_bytes", "at least " + std::to_string(bytes),
         std::to_string(out_batch_bytes));
  expect(batches <= 1 || source_batch_bytes >= 0, "source_batch_bytes", "at least 0",
         std::to_string(source_batch_bytes));
  const void* from = get_pointer("source", source, batches * bytes, 1);
  const auto* indices = get_values<const int64_t>("rows", rows, count);
  void* to = get_pointer("out", out, batches * bytes, 1);
  const py::gil_scoped_release release;
  psykern::cuda::gather_rows(from, indices, to, batches, count, row_bytes, source_batch_bytes, out_batch_bytes,
                             get_stream(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using py::arg;
  m.doc() = "The operations on a GPU: addresses, sizes and strides in, work on a stream out. See csrc/cuda/ops.h.";
  m.def("add_rms_norm", &add_rms_norm, py::kw_only(), arg("x"), arg("x_stride"), arg("residual"),
        arg("residual_stride"), arg("weight"), arg("normed"), arg("normed_stride"), arg("summed"), arg("summed_stride"),
        arg("rows"), arg("columns"), arg("eps"), arg("norm_first"), arg("dtype"), arg("stream"));
  m.def("qk_norm_rope", &qk_norm_rope, py::kw_only(), arg("x"), arg("x_stride"), arg("weight"), arg("cos"), arg("sin"),
        arg("positions"), arg("out"), arg("out_stride"), arg("rows"), arg("heads"), arg("pairs"), arg("eps"),
        arg("norm_projection"), arg("dtype"), arg("stream"));
  m.def("silu_mul", &silu_mul, py::kw_only(), arg("gate"), arg("gate_stride"), arg("up"), arg("up_stride"), arg("out"),
        arg("out_stride"), arg("rows"), arg("columns"), arg("dtype"), arg("stream"));
  m.def("online_softmax_chunk", &online_softmax_chunk, py::kw_only(), arg("z"), arg("rows"), arg("width"), arg("first"),
        arg("token_offsets"), arg("token_ids"), arg("wanted"), arg("maximum"), arg("total"), arg("moment"), arg("best"),
        arg("stream"));
  m.def("finish_softmax", &finish_softmax, py::kw_only(), arg("maximum"), arg("total"), arg("moment"), arg("lse"),
        arg("entropy"), arg("rows"), arg("stream"));
  m.def("gather_rows", &gather_rows, py::kw_only(), arg("source"), arg("rows"), arg("out"), arg("batches"),
        arg("count"), arg("row_bytes"), arg("source_batch_bytes"), arg("out_batch_bytes"), arg("stream"));
}
