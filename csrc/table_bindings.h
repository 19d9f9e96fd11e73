// The Python face of TensorTable and of torch's memory, which both modules have.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "raw_view.h"
#include "tensor_table.h"
#include "tensor_view.h"

namespace fuseopt {

namespace py = pybind11;

inline py::list gather(TensorTable& table, py::list groups, py::dict state, py::dict grads, double inv_grad_scale,
                       int device, int first) {
  table.gather(groups.ptr(), state.ptr(), grads.ptr(), inv_grad_scale, device, first);
  py::list problems;
  for (const Problem& p : table.problems) problems.append(py::make_tuple(p.group, p.index, p.is_new));
  return problems;
}

inline py::list params(const TensorTable& table) {
  py::list out(table.params.size());
  for (size_t k = 0; k < table.params.size(); ++k)
    out[k] = py::reinterpret_borrow<py::object>(table.params[k]);
  return out;
}

// Bumps the version of every parameter that was updated; `increment` does those that torch must bump.
inline void mark_written(const TensorTable& table, py::object increment) {
  py::list rest;
  for (PyObject* param : table.params)
    if (!raw_bump_version(param)) rest.append(py::reinterpret_borrow<py::object>(param));
  if (rest.size() > 0) increment(rest);
}

inline void check_ready(const TensorTable& table) {
  if (!table.problems.empty()) throw std::runtime_error("fuseopt: the table has unsolved problems");
}

inline py::dict schema() {
  py::dict out;
  py::list rules;
#define FUSEOPT_NAME_OF(Rule, name) rules.append(py::make_tuple(name, int(Rule::slots)));
  FUSEOPT_RULES(FUSEOPT_NAME_OF)
#undef FUSEOPT_NAME_OF
  py::list storages;
#define FUSEOPT_STORAGE_NAME(S) storages.append(#S);
  FUSEOPT_STORAGES(FUSEOPT_STORAGE_NAME)
#undef FUSEOPT_STORAGE_NAME
  out["rules"] = rules;
  out["storages"] = storages;
  out["stage_scalars"] = kStageScalars;
  out["bits"] = kBits;
  out["max_ema"] = kMaxEma;
  return out;
}

// Each module has a class of its own, so that both can be imported.
inline py::class_<TensorTable> bind_table(py::module_& m, bool on_host) {
  m.def("set_torch", [](py::object tensor, py::object parameter, py::object describe,
                        const std::vector<intptr_t>& functions, py::ssize_t offset) {
    set_torch(tensor.ptr(), parameter.ptr(), describe.ptr(), functions, offset);
  });
  m.def("set_layout", [](py::object tensor, py::object parameter, py::ssize_t handle,
                         const std::vector<int64_t>& layout, const std::vector<intptr_t>& functions) {
    set_layout(tensor.ptr(), parameter.ptr(), handle, layout, functions);
  });
  m.def("schema", &schema);
  py::class_<TensorTable> table(m, "TensorTable", py::module_local());
  table.def(py::init([on_host] { return new TensorTable(on_host); }))
      .def("gather", &gather, "Reads groups, state and gradients; returns (group, index, whether it only lacks state) of what it cannot take.",
           py::arg("groups"), py::arg("state"), py::arg("grads"), py::arg("inv_grad_scale"), py::arg("device") = kHost,
           py::arg("first") = 0)
      .def("__len__", [](const TensorTable& t) { return t.tensors.size(); })
      .def("release", &TensorTable::release, "Lets go of the parameters and gradients of the last gather().")
      .def("params", &params, "The parameters that the next run() will update.")
      .def("mark_written", &mark_written, "Bumps the versions of params(); the function given does those that torch must bump.")
      .def_readonly("sharded", &TensorTable::sharded, "Whether the last gather() met a DTensor.");
  return table;
}

}  // namespace fuseopt
