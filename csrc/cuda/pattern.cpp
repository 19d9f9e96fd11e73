#include "pattern.h"

#include "launch.h"
#include "pack.h"

namespace fuseopt {
namespace cuda {

void prune_n_m(const TensorTable& table, int n, int m, int64_t channels, int64_t stride, cudaStream_t stream) {
  const OnDevice on(table.device);
  const Tensor& t = table.tensors[0];
  Pattern pattern{n, m, channels, stride, (channels + m - 1) / m, 0, table.groups[t.group].stage.keep_moments != 0};
  pattern.groups = t.n / channels * pattern.along;
  static thread_local Rows rows;
  pack(table, 0, 1, true, rows, [](const Tensor&) { return true; },
       [&] { launch_pattern(t.storage, rows, pattern, stream); });
}

}  // namespace cuda
}  // namespace fuseopt
