// The Python module fuseopt._C. It speaks in Python tensors and tuples; no torch headers are needed.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "cpu/select.h"
#include "cpu/step.h"
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

py::object run(TensorTable& table, bool with_statistics) {
  if (!table.problems.empty()) throw std::runtime_error("fuseopt: the table has unsolved problems");
  Statistics s;
  {
    py::gil_scoped_release release;
    step(table, with_statistics ? &s : nullptr);
  }
  if (!with_statistics) return py::none();
  py::dict out;
  out["grad_norm"] = s.grad_norm;
  out["param_norm"] = s.param_norm;
  out["update_norm"] = s.update_norm;
  out["zeros"] = s.zeros;
  out["nonfinite"] = s.nonfinite;
  return out;
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
  m.doc() = "fuseopt's compiled CPU step.";
  py::class_<TensorTable>(m, "TensorTable")
      .def(py::init<>())
      .def("gather", &gather, "Reads groups, state and gradients; returns (group, index) of what it cannot take.")
      .def("__len__", [](const TensorTable& t) { return t.tensors.size(); })
      .def("release", &TensorTable::release, "Lets go of the parameters and gradients of the last gather().")
      .def("params", &params, "The parameters that the next run() will update.")
      .def("run", &run, "One step; returns the statistics as a dict, or None.")
      .def("prune_smallest", [](const TensorTable& t, int64_t count) {
        py::gil_scoped_release release;
        return prune_smallest(t, count);
      });
  m.def("set_torch", [](py::object tensor, py::object parameter, py::object describe,
                        const std::vector<intptr_t>& functions, py::ssize_t offset) {
    set_torch(tensor.ptr(), parameter.ptr(), describe.ptr(), functions, offset);
  });
  m.def("schema", &schema);
  m.def("instruction_set", [] { return kernels().name; });
  m.def("set_instruction_set", &set_kernels, "For tests: 'portable', 'avx2', 'avx512'.");
  m.def("max_threads", [] { return omp_get_max_threads(); });
}
