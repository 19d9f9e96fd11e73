// Pruning to an exact count: what csrc/cpu/select.h says, of tensors on the device, and so are the counts and quotas.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

// The kernels, on tensors of one storage.
void launch_digits(int storage, const Rows& rows, uint32_t prefix, int shift, int width, int64_t* out, cudaStream_t stream);
void launch_ties(int storage, const Rows& rows, uint32_t kth, int64_t* out, cudaStream_t stream);
void launch_prune(int storage, const Rows& rows, uint32_t kth, const int64_t* quota, bool keep_moments, cudaStream_t stream);

}  // namespace cuda
}  // namespace fuseopt
