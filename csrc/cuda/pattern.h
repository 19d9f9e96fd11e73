// Pruning to a pattern n:m: what csrc/cpu/pattern.h says, of a tensor on the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fuseopt {

class TensorTable;

namespace cuda {

struct Rows;

void prune_n_m(const TensorTable& table, int n, int m, int64_t channels, int64_t stride, cudaStream_t stream);

struct Pattern {
  int n, m;
  int64_t channels, stride;
  int64_t along;   // groups along the channels, the last of which may be short
  int64_t groups;  // of the tensor; one thread each
  bool keep_moments;
};
void launch_pattern(int storage, const Rows& rows, const Pattern& pattern, cudaStream_t stream);

}  // namespace cuda
}  // namespace fuseopt
