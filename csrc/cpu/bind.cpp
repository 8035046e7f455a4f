// Python bindings of csrc/cpu: numpy arrays in, numpy arrays out; the GIL is released while C++ works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "bind_kernels.h"
#include "prefix_trie.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;  // no forcecast: another dtype is an error

template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owner->data();
  const auto size = static_cast<py::ssize_t>(owner->size());
  py::capsule free(owner.release(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(size, data, free);
}

template <typename T>
void check_size(const char* name, const Array<T>& array, int64_t expected) {
  if (array.ndim() != 1 || array.shape(0) != expected) {
    throw py::value_error(std::string(name) + ": expected shape [" + std::to_string(expected) + "], got " +
                          py::cast<std::string>(py::str(array.attr("shape"))));
  }
}

template <typename T>
void check_offsets(const char* name, const Array<T>& offsets, int64_t values) {
  const auto* o = offsets.data();
  bool ascending = offsets.ndim() == 1 && offsets.shape(0) >= 1 && o[0] == 0 && o[offsets.shape(0) - 1] == values;
  for (py::ssize_t i = 1; ascending && i < offsets.shape(0); ++i) ascending = o[i] >= o[i - 1];
  if (!ascending) {
    throw py::value_error(std::string(name) + ": expected to ascend from 0 to " + std::to_string(values));
  }
}

// Keeps the arrays that the trie borrows alive beside it.
class BoundTrie {
 public:
  BoundTrie(Array<int32_t> token_ids, Array<int64_t> offsets, Array<int64_t> lengths, Array<int32_t> root,
            Array<int32_t> root_base, Array<int64_t> branch_sequence, Array<int32_t> branch_parent,
            Array<int32_t> branch_scored, Array<int64_t> branch_offsets, Array<int32_t> branch_token_ids,
            int64_t min_share, int64_t wave_tokens, double carried_price)
      : token_ids_(std::move(token_ids)), branch_token_ids_(std::move(branch_token_ids)) {
    check_offsets("offsets", offsets, token_ids_.size());
    check_offsets("branch_offsets", branch_offsets, branch_token_ids_.size());
    check_size("lengths", lengths, offsets.size() - 1);
    check_size("root", root, offsets.size() - 1);
    check_size("root_base", root_base, root_base.size());
    const int64_t branches = branch_offsets.size() - 1;
    check_size("branch_sequence", branch_sequence, branches);
    check_size("branch_parent", branch_parent, branches);
    check_size("branch_scored", branch_scored, branches);
    const psykern::Sequences s{token_ids_.data(),  offsets.data(),   lengths.data(),  root.data(),
                               offsets.size() - 1, root_base.data(), root_base.size()};
    const psykern::Branches b{branch_sequence.data(), branch_parent.data(),     branch_scored.data(),
                              branch_offsets.data(),  branch_token_ids_.data(), branches};
    py::gil_scoped_release release;
    trie_ = std::make_unique<psykern::PrefixTrie>(s, b, min_share, psykern::WaveBudget{wave_tokens, carried_price});
  }

  const psykern::PrefixTrie& trie() const { return *trie_; }

  py::array_t<int64_t> locate(const Array<int64_t>& sequence, const Array<int32_t>& position) const {
    check_size("position", position, sequence.size());
    std::vector<int64_t> rows(static_cast<size_t>(sequence.size()));
    {
      py::gil_scoped_release release;
      trie_->locate(sequence.data(), position.data(), sequence.size(), rows.data());
    }
    return to_numpy(std::move(rows));
  }

  py::array_t<int32_t> positions_of(const Array<int64_t>& rows) const {
    std::vector<int32_t> positions(static_cast<size_t>(rows.size()));
    {
      py::gil_scoped_release release;
      trie_->positions_of(rows.data(), rows.size(), positions.data());
    }
    return to_numpy(std::move(positions));
  }

  py::dict wave(int64_t index, int64_t batch_tokens) const {
    psykern::WaveArrays arrays;
    {
      py::gil_scoped_release release;
      arrays = trie_->wave(index, batch_tokens);
    }
    py::dict out;
    out["token_ids"] = to_numpy(std::move(arrays.token_ids));
    out["positions"] = to_numpy(std::move(arrays.positions));
    out["num_carried"] = arrays.num_carried;
    out["keep_rows"] = to_numpy(std::move(arrays.keep_rows));
    out["batch_offsets"] = to_numpy(std::move(arrays.batch_offsets));
    out["batch_segments"] = to_numpy(std::move(arrays.batch_segments));
    out["segment_offsets"] = to_numpy(std::move(arrays.segment_offsets));
    out["segment_roots"] = to_numpy(std::move(arrays.segment_roots));
    out["range_offsets"] = to_numpy(std::move(arrays.range_offsets));
    out["key_ranges"] = to_numpy(std::move(arrays.key_ranges)).attr("reshape")(-1, 2);
    return out;
  }

 private:
  Array<int32_t> token_ids_, branch_token_ids_;
  std::unique_ptr<psykern::PrefixTrie> trie_;
};

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "psykern's C++ code for the CPU";
  py::class_<BoundTrie>(m, "PrefixTrie", "Sequences and branches as rows and waves; see csrc/cpu/prefix_trie.h.")
      .def(py::init<Array<int32_t>, Array<int64_t>, Array<int64_t>, Array<int32_t>, Array<int32_t>, Array<int64_t>,
                    Array<int32_t>, Array<int32_t>, Array<int64_t>, Array<int32_t>, int64_t, int64_t, double>(),
           py::kw_only(), py::arg("token_ids").noconvert(), py::arg("offsets").noconvert(),
           py::arg("lengths").noconvert(), py::arg("root").noconvert(), py::arg("root_base").noconvert(),
           py::arg("branch_sequence").noconvert(), py::arg("branch_parent").noconvert(),
           py::arg("branch_scored").noconvert(), py::arg("branch_offsets").noconvert(),
           py::arg("branch_token_ids").noconvert(), py::arg("min_share"), py::arg("wave_tokens"),
           py::arg("carried_price") = 0.0)
      .def_property_readonly("num_rows", [](const BoundTrie& t) { return t.trie().num_rows(); })
      .def_property_readonly("num_segments", [](const BoundTrie& t) { return t.trie().num_segments(); })
      .def_property_readonly("num_waves", [](const BoundTrie& t) { return t.trie().num_waves(); })
      .def_property_readonly("wave_starts",
                             [](const BoundTrie& t) { return to_numpy(std::vector<int64_t>(t.trie().wave_starts())); })
      .def_property_readonly("carried_rows", [](const BoundTrie& t) { return to_numpy(t.trie().carried_rows()); })
      .def_property_readonly(
          "branch_target_rows",
          [](const BoundTrie& t) { return to_numpy(std::vector<int64_t>(t.trie().branch_target_rows())); })
      .def("locate", &BoundTrie::locate, py::arg("sequence").noconvert(), py::arg("position").noconvert())
      .def("positions_of", &BoundTrie::positions_of, py::arg("rows").noconvert())
      .def(
          "visible_keys", [](const BoundTrie& t, int64_t window) { return t.trie().visible_keys(window); },
          py::arg("window"))
      .def("wave", &BoundTrie::wave, py::arg("index"), py::arg("batch_tokens"));
  bind_kernels(m);
  bind_linear(m);
}
