// The Python module fuseopt._CUDA. Importing it needs no driver. Addresses of device memory come as integers.
#include <cuda_runtime.h>

#include "../table_bindings.h"
#include "launch.h"
#include "pattern.h"
#include "select.h"
#include "step.h"

namespace py = pybind11;
using namespace fuseopt;

namespace {

template <class T>
T* at(intptr_t address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(intptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// In the order of fuseopt/cuda.py.
using Addresses = std::tuple<intptr_t, intptr_t, intptr_t, intptr_t, intptr_t>;

cuda::Memory memory(const Addresses& a) {
  return {at<cuda::Control>(std::get<0>(a)), at<cuda::TensorScalars>(std::get<1>(a)), at<double>(std::get<2>(a)),
          at<cuda::SumRow>(std::get<3>(a)), at<float>(std::get<4>(a))};
}

void run(TensorTable& table, const Addresses& addresses, intptr_t found_inf, intptr_t grad_scale, intptr_t squares,
         bool advance, intptr_t stream) {
  check_ready(table);
  py::gil_scoped_release release;
  cuda::step(table, memory(addresses), {at<float>(found_inf), at<float>(grad_scale)}, at<double>(squares), advance,
             stream_of(stream));
}

void squares(TensorTable& table, const Addresses& addresses, intptr_t grad_scale, intptr_t stream) {
  check_ready(table);
  py::gil_scoped_release release;
  cuda::squares(table, memory(addresses), {nullptr, at<float>(grad_scale)}, stream_of(stream));
}

void histogram(const TensorTable& table, uint32_t prefix, int shift, int width, intptr_t counts, intptr_t stream) {
  cuda::count_digits(table, prefix, shift, width, at<int64_t>(counts), stream_of(stream));
}

void ties(const TensorTable& table, uint32_t kth, intptr_t of_block, intptr_t stream) {
  cuda::count_ties(table, kth, at<int64_t>(of_block), stream_of(stream));
}

void prune(const TensorTable& table, uint32_t kth, intptr_t quota_of_block, intptr_t stream) {
  cuda::prune_up_to(table, kth, at<int64_t>(quota_of_block), stream_of(stream));
}

void n_m(const TensorTable& table, int n, int m, int64_t channels, int64_t stride, intptr_t stream) {
  cuda::prune_n_m(table, n, m, channels, stride, stream_of(stream));
}

std::vector<int> blocks(const TensorTable& table) {
  std::vector<int> out(table.tensors.size());
  for (const Block& b : table.blocks) ++out[b.tensor];
  return out;
}

// What the CUDA driver says: "" if it drives a GPU.
std::string driver() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error != cudaSuccess ? cudaGetErrorString(error) : count == 0 ? "it drives no GPU" : "";
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
  m.doc() = "fuseopt's step in CUDA.";
  bind_table(m, false)
      .def("blocks", &blocks, "The number of blocks of each tensor.")
      .def_property_readonly("block_count", [](const TensorTable& t) { return t.blocks.size(); })
      .def("squares", &squares, "The sum of squares of each block's gradient, into its place in the memory.")
      .def("run", &run, "One step. Nothing waits for the GPU.")
      .def("histogram", &histogram)
      .def("ties", &ties)
      .def("prune", &prune)
      .def("prune_n_m", &n_m);
  m.def("driver", &driver);
  m.def("problem", [](int device) {
    const cuda::OnDevice on(device);
    return cuda::problem();
  }, "Why the driver does not load the kernels for a GPU; empty if it does.");
  m.def("architectures", [] { return std::vector<int>{FUSEOPT_CUDA_ARCHS}; },
        "10 * major + minor of the GPUs with machine code here; one whose PTX is here too comes negative.");
  m.attr("CONTROL") = sizeof(cuda::Control) / sizeof(double);
  m.attr("SCALARS") = sizeof(cuda::TensorScalars) / sizeof(double);
  m.attr("SUMS") = sizeof(cuda::SumRow) / sizeof(double);
}
