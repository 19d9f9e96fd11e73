// The pass over memory: stages 1 to 12 on one block of one tensor.
#include "block.h"
#include "kernels.h"

namespace fuseopt {
namespace cuda {
namespace {

// Stage 12: what a thread adds up of its elements. Sums of squares go to the lanes in shared memory.
template <class S>
struct Statistics {
  using T = typename S::compute;
  using Raw = Vector<typename S::raw, kVector<S>>;
  double* lanes;
  int zeros = 0, nonfinite = 0;

  __device__ __forceinline__ explicit Statistics(double* shared) : lanes(shared) {
    if (!lanes) return;
    for (int k = 0; k < kSums * kVector<S>; ++k) lanes[k * kThreads<S> + threadIdx.x] = 0;
  }

  __device__ __forceinline__ void add(const Raw& g, const Raw& before, const Raw& p, const Bits& bits, StageScalars<T> s) {
    s.clip = T(1);  // the norm is of the gradient before clipping
    const uint32_t free = bits.keep & ~bits.pruned;
#pragma unroll
    for (int j = 0; j < kVector<S>; ++j) {
      if (!(bits.live >> j & 1)) break;
      const double x = effective_grad(S::load(g.x[j]), free >> j & 1, s);
      const double w = S::load(p.x[j]), d = w - double(S::load(before.x[j]));
      add_square(0, j, x), add_square(1, j, w), add_square(2, j, d);
      zeros += w == 0;
      nonfinite += !(x - x == 0);
    }
  }

  __device__ __forceinline__ void store(SumRow* out) const {
    __shared__ int counts[2];
    if (threadIdx.x == 0) counts[0] = counts[1] = 0;
    double sum[kSums];
    for (int k = 0; k < kSums; ++k) sum[k] = add_lanes_of_block<kVector<S>>(lanes + k * kLanes);
    if (zeros) atomicAdd(&counts[0], zeros);
    if (nonfinite) atomicAdd(&counts[1], nonfinite);
    __syncthreads();
    if (threadIdx.x == 0) *out = {sum[0], sum[1], sum[2], double(counts[0]), double(counts[1])};
  }

 private:
  __device__ __forceinline__ void add_square(int k, int j, double x) {
    lanes[(k * kVector<S> + j) * kThreads<S> + threadIdx.x] += x * x;
  }
};

// Stages 1 to 10 on a vector; returns the bits of what is pruned now.
template <class Rule, class S, int slots>
__device__ __forceinline__ uint32_t step_vector(Vector<typename S::raw, kVector<S>>& p,
                                                const Vector<typename S::raw, kVector<S>>& g,
                                                Vector<typename S::raw, kVector<S>> (&slot)[slots], const Bits& bits,
                                                uint32_t frozen, const StageScalars<typename S::compute>& stage,
                                                const typename Rule::template Scalars<typename S::compute>& rule) {
  uint32_t pruned = 0;
#pragma unroll
  for (int j = 0; j < kVector<S>; ++j) {
    typename S::raw moment[slots];
    for (int k = 0; k < Rule::slots; ++k) moment[k] = slot[k].x[j];
    const bool prune = step_element<Rule, S, true>(p.x[j], g.x[j], moment, bits.keep >> j & 1, frozen >> j & 1,
                                                   bits.pruned >> j & 1, stage, rule);
    pruned |= uint32_t(prune) << j;
    for (int k = 0; k < Rule::slots; ++k) slot[k].x[j] = moment[k];
  }
  return pruned & bits.live;
}

// Stage 11, for an average in storage type E.
template <class S, class E>
__device__ __forceinline__ void update_average(void* average, int64_t i, int count,
                                               const Vector<typename S::raw, kVector<S>>& p,
                                               typename S::compute weight, uint32_t pruned, uint32_t frozen) {
  auto* at = static_cast<typename E::raw*>(average) + i;
  Vector<typename E::raw, kVector<S>> e;
  read(e, at, count);
#pragma unroll
  for (int j = 0; j < kVector<S>; ++j)
    e.x[j] = ema_element<E>(e.x[j], S::load(p.x[j]), weight, pruned >> j & 1, frozen >> j & 1);
  write(at, e, count);
}

template <class Rule, class S>
__global__ void __launch_bounds__(kThreads<S>) update(const UpdateArgs __grid_constant__ a) {
  if (a.memory.control->skip != 0) return;
  using T = typename S::compute;
  using raw = typename S::raw;
  constexpr int n = kVector<S>, slots = Rule::slots > 0 ? Rule::slots : 1;
  extern __shared__ double lanes[];
  const Rows& rows = a.rows;
  const int row = rows.find(int(blockIdx.x));
  const Head& head = rows.head(row);
  const TensorScalars& scalars = a.memory.scalars[head.tensor];
  const Masks masks = rows.masked ? rows.masks(row) : Masks{};
  const auto rule = rounded<Rule::template Scalars, T>(scalars.rule);
  auto stage = rounded<StageScalars, T>(&scalars.stage.inv_grad_scale);
  if (!masks.pruned) stage.prune_below = T(0);  // a threshold is for prunable parameters alone
  const bool counts = a.memory.sums != nullptr;
  Statistics<S> statistics(counts ? lanes : nullptr);
  const int64_t block = int(blockIdx.x) - head.first_block;

#pragma unroll 1
  for (int lane = int(threadIdx.x) * n; lane < kBlock; lane += int(kLanes)) {
    const int64_t i = block * kBlock + lane;
    if (i >= head.n) break;
    const int count = head.n - i < n ? int(head.n - i) : n;
    const Bits bits = Bits::of<n>(masks, i, count, head.n);
    const uint32_t frozen = head.freeze ? bits.live & ~bits.keep : 0;
    const bool idle = frozen == bits.live;
    if (idle && !counts && rows.averages == 0) continue;
    raw* at = static_cast<raw*>(head.p) + i;
    Vector<raw, n> p, g{}, slot[slots];
    read(p, at, count);
    const Vector<raw, n> before = p;
    uint32_t pruned = bits.pruned;
    if (!idle) {
      read(g, static_cast<const raw*>(head.g) + i, count);
      for (int k = 0; k < Rule::slots; ++k) read(slot[k], static_cast<const raw*>(rows.slot(row, k)) + i, count);
      pruned = step_vector<Rule, S>(p, g, slot, bits, frozen, stage, rule);
      write(at, p, count);
      for (int k = 0; k < Rule::slots; ++k) write(static_cast<raw*>(rows.slot(row, k)) + i, slot[k], count);
      if (masks.pruned && pruned != bits.pruned) atomicOr(&masks.pruned[i >> 5], (pruned & ~bits.pruned) << (i & 31));
    }
    if (counts) statistics.add(g, before, p, bits, stage);
    for (int k = 0; k < rows.averages; ++k) {
      void* average = rows.average(row, k);
      const T weight = T(scalars.ema_weight[k]);
      if (!average || (weight == T(0) && pruned == 0)) continue;
      using Narrow = S;
      if (head.narrow >> k & 1) update_average<S, Narrow>(average, i, count, p, weight, pruned, frozen);
      else update_average<S, typename Wide<S>::type>(average, i, count, p, weight, pruned, frozen);
    }
  }
  if (counts) statistics.store(&a.memory.sums[head.table_block + block]);
}

}  // namespace

#define FUSEOPT_ROW(Rule, name) {update<Rule, F32>, update<Rule, F64>, update<Rule, BF16>, update<Rule, F16>},
const UpdateKernel update_kernels[kRules][kStorages] = {FUSEOPT_RULES(FUSEOPT_ROW)};

}  // namespace cuda
}  // namespace fuseopt
