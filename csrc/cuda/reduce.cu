// The sum of squares of each block's gradient, for the norm.
#include "block.h"
#include "kernels.h"
#include "launch.h"

namespace fuseopt {
namespace cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(kThreads<S>, 1024 / kThreads<S>) squares(const SquaresArgs __grid_constant__ a) {
  using T = typename S::compute;
  using raw = typename S::raw;
  constexpr int n = kVector<S>;
  __shared__ Runs runs;
  const Place place(a.rows);
  const Head& head = a.rows.head(place.row);
  place.start(a.rows, runs);
  StageScalars<T> stage{};
  stage.inv_grad_scale = T(inv_grad_scale(a.amp, a.inv_grad_scale));
  stage.direction = stage.clip = T(1);
  __syncthreads();
  double sum[n] = {};

#pragma unroll 1
  for (int lane = int(threadIdx.x) * n; lane < kBlock; lane += int(kLanes)) {
    const int64_t i = place.begin + lane;
    if (i >= head.n) break;
    const int count = head.n - i < n ? int(head.n - i) : n;
    const Bits bits = place.bits<n>(a.rows, runs, lane, count);
    const uint32_t free = bits.keep & ~bits.pruned;
    if (free == 0) continue;
    Vector<raw, n> g;
    read(g, static_cast<const raw*>(head.g) + i, count, head.aligned && count == n);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const double x = effective_grad(S::load(g.get(j)), free >> j & 1, stage);
      sum[j] += x * x;
    }
  }
  __shared__ double lanes[kLanes];
  for (int j = 0; j < n; ++j) lanes[j * kThreads<S> + threadIdx.x] = sum[j];
  const double total = add_lanes_of_block<n>(lanes);
  if (threadIdx.x == 0) a.memory.squares[head.table_block + place.block] = total;
}

}  // namespace

void launch_squares(int storage, const SquaresArgs& args, cudaStream_t stream) {
  static constexpr decltype(&squares<F32>) kernels[kStorages] = {squares<F32>, squares<F64>, squares<BF16>,
                                                             squares<F16>};
  launch(kernels[storage], args.rows.blocks, threads_of(storage), stream, args);
}

}  // namespace cuda
}  // namespace fuseopt
