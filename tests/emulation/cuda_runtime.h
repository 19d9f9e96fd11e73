// The part of CUDA that csrc/cuda uses, for g++: device memory is the host's, and a launch runs the kernel at once, block
// after block. The threads of a block are fibers that take turns at __syncthreads(), so each runs alone until it waits;
// who comes first changes from turn to turn, so that a missing barrier shows. `extern __shared__` cannot be written for
// g++: where nvcc is not, kernels call dynamic_shared().
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__ &  // a thread would copy the 32 KB of a `const Rows __grid_constant__ rows`
#define __shared__ static    // blocks do not run at the same time
#define __syncthreads() emulation::wait(__FILE__, __LINE__)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// The types that CUDA has them for; int64_t, which is long, is not among them.
#define EMULATE_ATOMIC(name, T, op) \
  inline T name(T* at, T value) {   \
    const T old = *at;              \
    *at = old op value;             \
    return old;                     \
  }
EMULATE_ATOMIC(atomicAdd, int, +)
EMULATE_ATOMIC(atomicAdd, unsigned, +)
EMULATE_ATOMIC(atomicAdd, unsigned long long, +)
EMULATE_ATOMIC(atomicAdd, float, +)
EMULATE_ATOMIC(atomicAdd, double, +)
EMULATE_ATOMIC(atomicOr, int, |)
EMULATE_ATOMIC(atomicOr, unsigned, |)
#undef EMULATE_ATOMIC
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101, cudaErrorLaunchFailure = 719 };

namespace emulation {

struct Fiber {
  static constexpr size_t kStack = 64 * 1024;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  std::pair<const char*, int> waits_at;  // file and line of the barrier; {}: not begun, or done
};

inline std::mutex one_launch;
inline std::unique_ptr<double[]> shared_memory;  // as much as the launch asked for
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* running;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel;
inline std::string fault;  // of the last launch
inline cudaError_t last = cudaSuccess;

// To a fiber, or from it back to the scheduler; the sanitizer is told which stack it finds itself on.
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline void arrive(void* fake, bool in_fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, in_fiber ? &scheduler_stack : nullptr, in_fiber ? &scheduler_stack_size : nullptr);
#endif
}
inline void swap(ucontext_t* from, ucontext_t* to, const void* stack, size_t size) {
  void* fake = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake, stack, size);
#endif
  swapcontext(from, to);
  arrive(fake, from != &scheduler);
}
inline void resume(Fiber& fiber) {
  running = &fiber;
  swap(&scheduler, &fiber.context, fiber.stack.get(), Fiber::kStack);
}
inline void leave() { swap(&running->context, &scheduler, scheduler_stack, scheduler_stack_size); }

inline void wait(const char* file, int line) {
  running->waits_at = {file, line};
  leave();
}

inline void threads_forever() {  // what a fiber runs: one thread of each block
  for (arrive(nullptr, true);; leave()) {
    (*kernel)();
    running->waits_at = {};
  }
}

inline void make_fibers(size_t count) {
  while (fibers.size() < count) {
    Fiber& fiber = *fibers.emplace_back(new Fiber);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    makecontext(&fiber.context, threads_forever, 0);
  }
}

// False, with `fault` set, if some threads wait where others do not.
inline bool run_block(unsigned threads) {
  for (bool backwards = blockIdx.x % 2;; backwards = !backwards) {
    for (unsigned k = 0; k < threads; ++k) {
      threadIdx.x = backwards ? threads - 1 - k : k;
      resume(*fibers[threadIdx.x]);
    }
    for (unsigned k = 1; k < threads; ++k)
      if (const auto &a = fibers[0]->waits_at, &b = fibers[k]->waits_at; a != b) {
        const auto place = [](auto at) {
          return at.first ? std::string("waits at the barrier ") + at.first + ":" + std::to_string(at.second) : "has ended";
        };
        fault = "in block " + std::to_string(blockIdx.x) + " thread 0 " + place(a) + ", but thread " + std::to_string(k) + " " + place(b);
        return false;
      }
    if (!fibers[0]->waits_at.first) return true;
  }
}

inline cudaError_t run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_launch);
  fault.clear();
  if (grid.x == 0 || block.x == 0 || block.x > 1024 || grid.y * grid.z * block.y * block.z != 1 || shared > 48 * 1024)
    return last = cudaErrorInvalidConfiguration;
  make_fibers(block.x);
  shared_memory.reset(new double[shared / sizeof(double)]);
  kernel = &body, gridDim = grid, blockDim = block;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    if (!run_block(block.x)) return fibers.clear(), last = cudaErrorLaunchFailure;
  return cudaSuccess;
}

template <class... P, size_t... k>
cudaError_t run(void (*body)(P...), dim3 grid, dim3 block, void** args, size_t shared, std::index_sequence<k...>) {
  return run(grid, block, shared, [&] { body(*static_cast<std::remove_reference_t<P>*>(args[k])...); });
}

}  // namespace emulation

inline double* dynamic_shared() { return emulation::shared_memory.get(); }
// How many kernels were launched, for a test to read.
extern "C" __attribute__((visibility("default"))) inline int emulated_launches = 0;

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  ++emulated_launches;
  return emulation::run(kernel, grid, block, args, shared, std::index_sequence_for<P...>());
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return emulation::fault.c_str();
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid configuration argument";
}
struct cudaFuncAttributes {};
template <class Kernel>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }  // any number is this machine
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
