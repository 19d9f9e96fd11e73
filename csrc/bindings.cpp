// The Python module fuseopt._C. It speaks in Python tensors and tuples; no torch headers are needed.
#include <omp.h>

#include "cpu/kernels.h"
#include "cpu/pattern.h"
#include "cpu/select.h"
#include "cpu/step.h"
#include "cpu/threads.h"
#include "table_bindings.h"

using namespace fuseopt;

namespace {

// A list of rows, each of `width` numbers.
py::list rows(const std::vector<double>& flat, size_t width) {
  py::list out(flat.size() / width);
  for (size_t k = 0; k < out.size(); ++k) {
    py::tuple row(width);
    for (size_t j = 0; j < width; ++j) row[j] = flat[k * width + j];
    out[k] = row;
  }
  return out;
}

py::list squares(const TensorTable& table) {
  check_ready(table);
  std::vector<double> out(table.tensors.size());
  {
    py::gil_scoped_release release;
    grad_squares(table, out.data());
  }
  return rows(out, 1);
}

py::list run(TensorTable& table, double norm, bool with_statistics) {
  check_ready(table);
  constexpr size_t width = sizeof(Statistics) / sizeof(double);
  std::vector<double> out(with_statistics ? table.tensors.size() * width : 0);
  {
    py::gil_scoped_release release;
    step(table, norm, with_statistics ? reinterpret_cast<Statistics*>(out.data()) : nullptr);
  }
  return rows(out, width);
}

// Addresses of int64 arrays come as integers: of `counts` one for each digit, of `ties` and `quota` one for each tensor
// (of `quota` a single one, if shared).
int64_t histogram(const TensorTable& table, uint32_t first, int shift, int64_t digits, bool sample, intptr_t counts) {
  py::gil_scoped_release release;
  return count_digits(table, first, shift, digits, sample, reinterpret_cast<int64_t*>(counts));
}

void ties(const TensorTable& table, uint32_t kth, intptr_t counts) {
  py::gil_scoped_release release;
  count_ties(table, kth, reinterpret_cast<int64_t*>(counts));
}

void prune(const TensorTable& table, uint32_t kth, intptr_t quota, bool shared) {
  py::gil_scoped_release release;
  prune_up_to(table, kth, reinterpret_cast<const int64_t*>(quota), shared);
}

void n_m(const TensorTable& table, int n, int m, int64_t channels, int64_t stride) {
  py::gil_scoped_release release;
  prune_n_m(table, n, m, channels, stride);
}

// Keys that were unpickled are objects of their own.
bool same_text(PyObject* key, PyObject* text) {
  return key == text || (PyUnicode_Check(key) && PyUnicode_Compare(key, text) == 0);
}

// The keys under which a dict does not hold the very objects of its copy, the key `but` aside; None if the keys differ.
py::object keys_changed(PyObject* now, PyObject* then, PyObject* but) {
  py::list out;
  if (PyDict_Size(now) != PyDict_Size(then)) return py::none();
  Py_ssize_t i = 0, j = 0;
  PyObject *key, *value, *other_key, *other;
  while (PyDict_Next(now, &i, &key, &value) && PyDict_Next(then, &j, &other_key, &other)) {
    if (key != other_key) return py::none();
    if (value != other && !same_text(key, but)) out.append(py::handle(key));
  }
  return out;
}

// (position, keys_changed) of the dicts that are not as their copies.
py::list changed(py::list dicts, py::list copies, py::str but) {
  py::list out;
  for (size_t k = 0; k < dicts.size(); ++k) {
    py::object keys = py::none();
    if (k < copies.size()) keys = keys_changed(dicts[k].ptr(), copies[k].ptr(), but.ptr());
    if (keys.is_none() || py::len(keys) > 0) out.append(py::make_tuple(k, keys));
  }
  return out;
}

// `chosen`: for each tensor the address of words of bits, one bit for each of its rows, and their number.
void rows_of(const TensorTable& table, const std::vector<std::pair<intptr_t, int64_t>>& chosen) {
  std::vector<const uint32_t*> words;
  std::vector<int64_t> counts;
  for (const auto& [address, count] : chosen) words.push_back(reinterpret_cast<const uint32_t*>(address)), counts.push_back(count);
  py::gil_scoped_release release;
  prune_rows(table, words.data(), counts.data());
}

// Addresses of a contiguous matrix and of a double for each of its rows.
void squares_of_rows(intptr_t p, int storage, int64_t rows, int64_t columns, intptr_t out) {
  py::gil_scoped_release release;
  square_rows(reinterpret_cast<const void*>(p), storage, rows, columns, reinterpret_cast<double*>(out));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  watch_forks();
  m.doc() = "fuseopt's compiled CPU step.";
  bind_table(m, true)
      .def("shares_memory", [](TensorTable& t) { return t.in_order = overlapping(t); }, "Whether parameters overlap.")
      .def("squares", &squares, "The sum of squares of each parameter's gradient, as rows of one.")
      .def("run", &run, "One step; returns a row of sums for each parameter, or no rows.", py::arg("norm"), py::arg("statistics"))
      .def("histogram", &histogram)
      .def("ties", &ties)
      .def("prune", &prune)
      .def("prune_n_m", &n_m)
      .def("prune_rows", &rows_of);
  m.def("changed", &changed, "(position, keys) of the dicts that hold other objects than their copies; keys None: other keys.");
  m.def("square_rows", &squares_of_rows);
  m.def("instruction_set", [] { return kernels().name; });
  m.def("set_instruction_set", &set_kernels, "For tests: 'portable', 'avx2', 'avx512'.");
  m.def("max_threads", [] { return omp_get_max_threads(); });
  m.def("pool_lost", &pool_lost, "Whether one thread does everything here: see cpu/threads.h.");
}
