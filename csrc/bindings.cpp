// The Python module fuseopt._C. It speaks in Python tensors and tuples; no torch headers are needed.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "cpu/pattern.h"
#include "cpu/select.h"
#include "cpu/step.h"
#include "cpu/threads.h"
#include "raw_view.h"
#include "tensor_view.h"

namespace py = pybind11;
using namespace fuseopt;

namespace {

py::list gather(TensorTable& table, py::list groups, py::dict state, py::dict grads, double inv_grad_scale) {
  table.gather(groups.ptr(), state.ptr(), grads.ptr(), inv_grad_scale);
  py::list problems;
  for (const Problem& p : table.problems) problems.append(py::make_tuple(p.group, p.index));
  return problems;
}

py::list params(const TensorTable& table) {
  py::list out(table.params.size());
  for (size_t k = 0; k < table.params.size(); ++k)
    out[k] = py::reinterpret_borrow<py::object>(table.params[k]);
  return out;
}

// Bumps the version of every parameter that was updated; `increment` does those that torch must bump.
void mark_written(const TensorTable& table, py::object increment) {
  py::list rest;
  for (PyObject* param : table.params)
    if (!raw_bump_version(param)) rest.append(py::reinterpret_borrow<py::object>(param));
  if (rest.size() > 0) increment(rest);
}

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

void check_ready(const TensorTable& table) {
  if (!table.problems.empty()) throw std::runtime_error("fuseopt: the table has unsolved problems");
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

// Addresses of int64 arrays come as integers: of `counts` 2^width, of `ties` and `quota` one for each tensor
// (of `quota` a single one, if shared).
void histogram(const TensorTable& table, uint32_t prefix, int shift, int width, intptr_t counts) {
  py::gil_scoped_release release;
  count_digits(table, prefix, shift, width, reinterpret_cast<int64_t*>(counts));
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

py::dict schema() {
  py::dict out;
  py::list rules;
#define FUSEOPT_NAME_OF(Rule, name) rules.append(py::make_tuple(name, int(Rule::slots)));
  FUSEOPT_RULES(FUSEOPT_NAME_OF)
  py::list storages;
#define FUSEOPT_STORAGE_NAME(S) storages.append(#S);
  FUSEOPT_STORAGES(FUSEOPT_STORAGE_NAME)
  out["rules"] = rules;
  out["storages"] = storages;
  out["stage_scalars"] = kStageScalars;
  out["bits"] = kBits;
  out["max_ema"] = kMaxEma;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  watch_forks();
  m.doc() = "fuseopt's compiled CPU step.";
  py::class_<TensorTable>(m, "TensorTable")
      .def(py::init([] { return new TensorTable(true); }))
      .def("gather", &gather, "Reads groups, state and gradients; returns (group, index) of what it cannot take.")
      .def("__len__", [](const TensorTable& t) { return t.tensors.size(); })
      .def("release", &TensorTable::release, "Lets go of the parameters and gradients of the last gather().")
      .def("params", &params, "The parameters that the next run() will update.")
      .def("mark_written", &mark_written, "Bumps the versions of params(); the function given does those that torch must bump.")
      .def_readonly("sharded", &TensorTable::sharded, "Whether the last gather() met a DTensor.")
      .def("squares", &squares, "The sum of squares of each parameter's gradient, as rows of one.")
      .def("run", &run, "One step; returns a row of sums for each parameter, or no rows.", py::arg("norm"), py::arg("statistics"))
      .def("histogram", &histogram)
      .def("ties", &ties)
      .def("prune", &prune)
      .def("prune_n_m", &n_m);
  m.def("set_torch", [](py::object tensor, py::object parameter, py::object describe,
                        const std::vector<intptr_t>& functions, py::ssize_t offset) {
    set_torch(tensor.ptr(), parameter.ptr(), describe.ptr(), functions, offset);
  });
  m.def("set_layout", [](py::object tensor, py::object parameter, py::ssize_t handle,
                         const std::vector<int64_t>& layout, const std::vector<intptr_t>& functions) {
    set_layout(tensor.ptr(), parameter.ptr(), handle, layout, functions);
  });
  m.def("schema", &schema);
  m.def("instruction_set", [] { return kernels().name; });
  m.def("set_instruction_set", &set_kernels, "For tests: 'portable', 'avx2', 'avx512'.");
  m.def("max_threads", [] { return omp_get_max_threads(); });
}
