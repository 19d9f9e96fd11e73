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

// A large parameter is written `const Rows __grid_constant__ rows`, in this order and in the types of pointers too: see
// tests/emulation/cuda_runtime.h.
// `shared`: bytes of dynamic shared memory.
template <class... P>
void launch_with(size_t shared, void (*kernel)(P...), int blocks, int threads, cudaStream_t stream,
                 const std::common_type_t<P>&... args) {
  if (blocks == 0) return;
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), addresses, shared, stream));
}

template <class... P>
void launch(void (*kernel)(P...), int blocks, int threads, cudaStream_t stream, const std::common_type_t<P>&... args) {
  launch_with(0, kernel, blocks, threads, stream, args...);
}

// Makes a device the current one, and at the end that which was.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (before_ != device) check(cudaSetDevice(device)), changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace cuda
}  // namespace fuseopt
