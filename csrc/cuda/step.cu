// The pass over memory: stages 1 to 12 on one block of one tensor.
#include "block.h"
#include "kernels.h"
#include "launch.h"

namespace fuseopt {
namespace cuda {
namespace {

// The scalars of a block, in shared memory: registers are scarce, and one thread rounds each.
template <class T>
struct Scalars {
  T rule[kMaxScalars];
  StageScalars<T> stage;
  T ema_weight[kMaxEma];

  template <class Rule>
  __device__ __forceinline__ const typename Rule::template Scalars<T>& of() const {
    return *reinterpret_cast<const typename Rule::template Scalars<T>*>(rule);
  }

  // A threshold is for prunable parameters alone.
  __device__ __forceinline__ void load(const TensorScalars& from, bool prunable) {
    constexpr int count = sizeof(TensorScalars) / sizeof(double);
    static_assert(sizeof(Scalars) == count * sizeof(T), "the same members, of another type");
    const int k = int(threadIdx.x);
    if (k >= count) return;
    T* at = reinterpret_cast<T*>(this) + k;
    *at = T(reinterpret_cast<const double*>(&from)[k]);
    if (!prunable && at == &stage.prune_below) *at = T(0);
  }
};

constexpr int kSums = 3;  // of squares: gradient, parameter, change

// Stage 12: what a thread adds up of its elements. Sums of squares go to the lanes in shared memory.
template <class S>
struct Statistics {
  using T = typename S::compute;
  double* lanes;  // nullptr: they are off
  int zeros = 0, nonfinite = 0;

  __device__ __forceinline__ explicit Statistics(double* shared) : lanes(shared) {
    for (int k = 0; lanes && k < kSums * kVector<S>; ++k) lanes[k * kThreads<S> + threadIdx.x] = 0;
  }

  // Element j of the vector; `free`: the step may change it.
  __device__ __forceinline__ void add(int j, T g, bool free, T before, T after, StageScalars<T> s) {
    s.clip = T(1);  // the norm is of the gradient before clipping
    const double x = effective_grad(g, free, s), w = after;
    add_square(0, j, x), add_square(1, j, w), add_square(2, j, w - double(before));
    zeros += w == 0;
    nonfinite += !(x - x == 0);
  }

  __device__ __forceinline__ void store(SumRow* out) const {
    __shared__ int counts[2];
    if (threadIdx.x == 0) counts[0] = counts[1] = 0;
    for (int k = 0; k < kSums; ++k) add_lanes_of_block<kVector<S>>(lanes + k * kLanes);
    atomicAdd(&counts[0], zeros);
    atomicAdd(&counts[1], nonfinite);
    __syncthreads();
    if (threadIdx.x == 0) *out = {lanes[0], lanes[kLanes], lanes[2 * kLanes], double(counts[0]), double(counts[1])};
  }

 private:
  __device__ __forceinline__ void add_square(int k, int j, double x) {
    lanes[(k * kVector<S> + j) * kThreads<S> + threadIdx.x] += x * x;
  }
};

// Stages 1 to 10 on a vector, and 12; returns the bits of what is pruned now.
template <class Rule, class S, int slots>
__device__ __forceinline__ uint32_t step_vector(Vector<typename S::raw, kVector<S>>& p,
                                                Vector<typename S::raw, kVector<S>>& g,
                                                Vector<typename S::raw, kVector<S>> (&slot)[slots], const Bits& bits,
                                                uint32_t frozen, const StageScalars<typename S::compute>& stage,
                                                const typename Rule::template Scalars<typename S::compute>& rule,
                                                Statistics<S>& statistics) {
  constexpr int n = kVector<S>;
  uint32_t pruned = 0;
#pragma unroll 1
  for (int first = 0; first < n; first += kUnrolled) {
#pragma unroll
    for (int j = 0; j < kUnrolled && j < n; ++j) {
      const int at = first + j;
      const bool keep = bits.keep >> at & 1, was_pruned = bits.pruned >> at & 1;
      const typename S::raw before = p.get(j), grad = g.get(j);
      typename S::raw after = before, moment[slots];
      for (int k = 0; k < Rule::slots; ++k) moment[k] = slot[k].get(j);
      const bool prune =
          step_element<Rule, S, true>(after, grad, moment, keep, frozen >> at & 1, was_pruned, stage, rule);
      pruned |= uint32_t(prune) << at;
      p.set(j, after);
      for (int k = 0; k < Rule::slots; ++k) slot[k].set(j, moment[k]);
      if (statistics.lanes && (bits.live >> at & 1))
        statistics.add(at, S::load(grad), keep && !was_pruned, S::load(before), S::load(after), stage);
    }
    turn(p), turn(g);
    for (int k = 0; k < Rule::slots; ++k) turn(slot[k]);
  }
  return pruned & bits.live;
}

// Stage 11, for an average in storage type E.
template <class S, class E>
__device__ __forceinline__ void update_average(void* average, int64_t i, int count,
                                               Vector<typename S::raw, kVector<S>>& p,
                                               typename S::compute weight, uint32_t pruned, uint32_t frozen) {
  auto* at = static_cast<typename E::raw*>(average) + i;
  Vector<typename E::raw, kVector<S>> e;
  read(e, at, count);
#pragma unroll 1
  for (int first = 0; first < kVector<S>; first += kUnrolled) {
#pragma unroll
    for (int j = 0; j < kUnrolled && j < kVector<S>; ++j) {
      const int bit = first + j;
      e.set(j, ema_element<E>(e.get(j), S::load(p.get(j)), weight, pruned >> bit & 1, frozen >> bit & 1));
    }
    turn(e), turn(p);
  }
  write(at, e, count);
}

// Threads that a multiprocessor must hold at once: enough to keep its memory busy, few enough for every kernel to live
// without spills.
constexpr int kResident = 640;

template <class Rule, class S>
__global__ void __launch_bounds__(kThreads<S>, kResident / kThreads<S>) update(const UpdateArgs __grid_constant__ a) {
  if (a.memory.control->skip != 0) return;
  using T = typename S::compute;
  using raw = typename S::raw;
  constexpr int n = kVector<S>, slots = Rule::slots > 0 ? Rule::slots : 1;
  __shared__ Scalars<T> scalars;
  __shared__ Runs runs;
  const Rows& rows = a.rows;
  const Place place(rows);
  const int row = place.row;
  const Head& head = rows.head(row);
  place.start(rows, runs);
  scalars.load(a.memory.scalars[head.tensor], rows.masked && rows.masks(row).pruned);
  Statistics<S> statistics(a.memory.sums ? dynamic_shared() : nullptr);
  __syncthreads();
  const auto& rule = scalars.template of<Rule>();

#pragma unroll 1
  for (int lane = int(threadIdx.x) * n; lane < kBlock; lane += int(kLanes)) {
    const int64_t i = place.begin + lane;
    if (i >= head.n) break;
    const int count = head.n - i < n ? int(head.n - i) : n;
    const Bits bits = place.bits<n>(rows, runs, lane, count);
    const uint32_t frozen = head.freeze ? bits.live & ~bits.keep : 0;
    const bool idle = frozen == bits.live;
    if (idle && !statistics.lanes && rows.averages == 0) continue;
    Vector<raw, n> p, g{}, slot[slots]{};
    read(p, static_cast<const raw*>(head.p) + i, count);
    if (!idle) {
      read(g, static_cast<const raw*>(head.g) + i, count);
      for (int k = 0; k < Rule::slots; ++k) read(slot[k], static_cast<const raw*>(rows.slot(row, k)) + i, count);
    }
    const uint32_t pruned = step_vector<Rule, S>(p, g, slot, bits, frozen, scalars.stage, rule, statistics);
    if (!idle) {
      write(static_cast<raw*>(head.p) + i, p, count);
      for (int k = 0; k < Rule::slots; ++k) write(static_cast<raw*>(rows.slot(row, k)) + i, slot[k], count);
      if (pruned != bits.pruned && rows.masked)
        atomicOr(&rows.masks(row).pruned[i >> 5], (pruned & ~bits.pruned) << (i & 31));
    }
    for (int k = 0; k < rows.averages; ++k) {
      void* average = rows.average(row, k);
      const T weight = scalars.ema_weight[k];
      if (!average || (weight == T(0) && pruned == 0)) continue;
      if (sizeof(raw) < sizeof(T) && (head.narrow >> k & 1))
        update_average<S, S>(average, i, count, p, weight, pruned, frozen);
      else
        update_average<S, typename Wide<S>::type>(average, i, count, p, weight, pruned, frozen);
    }
  }
  if (statistics.lanes) statistics.store(&a.memory.sums[head.table_block + place.block]);
}

}  // namespace

void launch_update(int rule, int storage, const UpdateArgs& args, cudaStream_t stream) {
#define FUSEOPT_ROW(Rule, name) {update<Rule, F32>, update<Rule, F64>, update<Rule, BF16>, update<Rule, F16>},
  static constexpr decltype(&update<Adam, F32>) kernels[kRules][kStorages] = {FUSEOPT_RULES(FUSEOPT_ROW)};
#undef FUSEOPT_ROW
  const size_t shared = args.memory.sums ? kSums * kLanes * sizeof(double) : 0;
  launch_with(shared, kernels[rule][storage], args.rows.blocks, threads_of(storage), stream, args);
}

}  // namespace cuda
}  // namespace fuseopt
