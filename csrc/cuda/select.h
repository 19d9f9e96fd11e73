// Pruning to an exact count: what csrc/cpu/select.h says, of tensors on the device, and so are the counts and quotas.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../streams.h"

namespace fuseopt {

class TensorTable;

namespace cuda {

struct Rows;
constexpr int kMaxDigit = 11;  // bits; their bins lie in shared memory

// Adds to out[0 .. 2^width - 1].
void count_digits(const TensorTable& table, uint32_t prefix, int shift, int width, int64_t* out, cudaStream_t stream);

// out[b]: the ties in block b of the table.
void count_ties(const TensorTable& table, uint32_t kth, int64_t* out, cudaStream_t stream);

// Of the ties in block b the first quota[b] go.
void prune_up_to(const TensorTable& table, uint32_t kth, const int64_t* quota, cudaStream_t stream);

// The kernels, by storage. Blocks of kThreads<S> threads.
using DigitKernel = void (*)(const Rows __grid_constant__, uint32_t prefix, int shift, int width, unsigned long long* out);
using TieKernel = void (*)(const Rows __grid_constant__, uint32_t kth, int64_t* out);
using PruneKernel = void (*)(const Rows __grid_constant__, uint32_t kth, const int64_t* quota, bool keep_moments);
extern const DigitKernel digit_kernels[kStorages];
extern const TieKernel tie_kernels[kStorages];
extern const PruneKernel prune_kernels[kStorages];

}  // namespace cuda
}  // namespace fuseopt
