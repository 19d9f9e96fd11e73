// How a kernel is launched: the only place that says so, for nvcc and for a compiler that stands in for it.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace fuseopt {
namespace cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("fuseopt: CUDA says: ") + cudaGetErrorString(error));
}

// A large parameter is written `const Rows __grid_constant__ rows`, in this order: see tests/emulation/cuda_runtime.h.
template <class... P>
void launch(void (*kernel)(P...), int blocks, int threads, cudaStream_t stream, const std::common_type_t<P>&... args) {
  if (blocks == 0) return;
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), addresses, 0, stream));
}

}  // namespace cuda
}  // namespace fuseopt
