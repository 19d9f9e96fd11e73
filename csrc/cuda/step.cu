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

// fn(0), ..., fn(n - 1). Of a loop, even one to be unrolled, nvcc first makes a version for each outcome of the uniform
// conditions in it.
template <int n, class Fn>
__device__ __forceinline__ void each(const Fn& fn) {
  if constexpr (n > 1) each<n - 1>(fn);
  fn(n - 1);
}

template <class S> using Vec = Vector<typename S::raw, kVector<S>>;

constexpr int kSums = 3;  // of squares: gradient, parameter, change

// Stage 12: the lanes of each sum lie in dynamic_shared(); `counts` are of zeros and of what is not finite. Each thread
// clears what it will add to, and one the counts.
__device__ __forceinline__ void clear_sums(int* counts, int threads) {
  if (threadIdx.x == 0) counts[0] = counts[1] = 0;
#pragma unroll 1
  for (int k = int(threadIdx.x); k < kSums * int(kLanes); k += threads) dynamic_shared()[k] = 0;
}

// Adds the elements from i on, whose parameters are not written yet: few steps ask for it, so it is a loop, and reads
// again what the step has just read. `free`: the step may change them.
template <class S>
__device__ __forceinline__ void add_sums(int* counts, const Head& head, int64_t i, int count, Vec<S> after,
                                         uint32_t free, StageScalars<typename S::compute> s) {
  using raw = typename S::raw;
  s.clip = 1;  // the norm is of the gradient before clipping
#pragma unroll 1
  for (int j = 0; j < count; ++j, after.template turn<1>()) {
    const bool keep = free >> j & 1;
    const double x = effective_grad(keep ? S::load(static_cast<const raw*>(head.g)[i + j]) : 0, keep, s);
    const double w = S::load(after.get(0)), change = w - double(S::load(static_cast<const raw*>(head.p)[i + j]));
    double* lane = dynamic_shared() + j * kThreads<S> + threadIdx.x;
    lane[0] += x * x, lane[kLanes] += w * w, lane[2 * kLanes] += change * change;
    if (w == 0) atomicAdd(&counts[0], 1);
    if (!(x - x == 0)) atomicAdd(&counts[1], 1);
  }
}

template <int n>
__device__ __forceinline__ void store_sums(const int* counts, SumRow* out) {
  const double* lanes = dynamic_shared();
#pragma unroll 1
  for (int k = 0; k < kSums; ++k) add_lanes_of_block<n>(dynamic_shared() + k * kLanes);
  if (threadIdx.x == 0) *out = {lanes[0], lanes[kLanes], lanes[2 * kLanes], double(counts[0]), double(counts[1])};
}

// Of a vector kUnrolled elements at a time go through the arithmetic, which so is half as long for 8, and lets fp64,
// whose divisions are long, do with the registers that there are.
template <class S> constexpr int kUnrolled = sizeof(typename S::raw) == 8 ? 1 : 2;

// Members [first, last) of scalars in shared memory, read at this very place: those that the compiler reads ahead and
// keeps take the registers that the rule needs.
template <class Out, class T>
__device__ __forceinline__ Out reread(const T* scalars, int first = 0, int last = sizeof(Out) / sizeof(T)) {
  Out out;
#pragma unroll
  for (int k = first; k < last; ++k) reinterpret_cast<T*>(&out)[k] = const_cast<const volatile T*>(scalars)[k];
  return out;
}

// What step_element of pipeline.h does, for the first elements of a vector, those from `at` on; returns the bits of
// what is pruned now. The rule is looked at here, not made a parameter of the kernel: with a kernel for each rule the
// module would be several times as large.
template <class S>
__device__ __forceinline__ uint32_t step_elements(int rule, int slots, Vec<S>& p, const Vec<S>& g,
                                                  Vec<S> (&slot)[kMaxSlots], int at, const Bits& bits,
                                                  uint32_t frozen, const Scalars<typename S::compute>& scalars) {
  using T = typename S::compute;
  constexpr int n = kUnrolled<S>;
  constexpr int late = offsetof(StageScalars<T>, soft_threshold) / sizeof(T);
  const T* const stage = &scalars.stage.inv_grad_scale;
  const auto early = reread<StageScalars<T>>(stage, 0, late);
  T weight[n], grad[n], moment[n][kMaxSlots];
  each<n>([&](int j) {
    weight[j] = S::load(p.get(j)), grad[j] = effective_grad(S::load(g.get(j)), bits.keep >> (at + j) & 1, early);
    decay_element(weight[j], grad[j], early);
    for (int k = 0; k < kMaxSlots; ++k) moment[j][k] = S::load(slot[k].get(j));
  });
  switch (rule) {
#define FUSEOPT_CASE(Rule, name)                                                           \
  case k##Rule: {                                                                          \
    const auto r = reread<Rule::Scalars<T>>(scalars.rule);                                 \
    each<n>([&](int j) { Rule::update(weight[j], grad[j], moment[j], r); });               \
    break;                                                                                 \
  }
    FUSEOPT_RULES(FUSEOPT_CASE)
#undef FUSEOPT_CASE
  }
  const auto s = reread<StageScalars<T>>(stage, late);
  uint32_t prune = 0;
  each<n>([&](int j) {
    const int bit = at + j;
    const typename S::raw stored = S::store(shrink_element(weight[j], s));
    const bool fixed = frozen >> bit & 1, falls = !fixed & ((bits.pruned >> bit & 1) | falls_below<S>(stored, s));
    p.set(j, settle(fixed, p.get(j), falls, stored));
    prune |= uint32_t(falls) << bit;
  });
  const uint32_t clear = s.keep_moments == T(0) ? prune : 0;
  each<kMaxSlots>([&](int k) {
    if (k < slots)
      each<n>([&](int j) {
        const int bit = at + j;
        slot[k].set(j, settle(frozen >> bit & 1, slot[k].get(j), clear >> bit & 1, S::store(moment[j][k])));
      });
  });
  return prune;
}

template <class S>
__device__ __forceinline__ uint32_t step_vector(int rule, int slots, Vec<S>& p, Vec<S>& g, Vec<S> (&slot)[kMaxSlots],
                                                const Bits& bits, uint32_t frozen,
                                                const Scalars<typename S::compute>& scalars) {
  uint32_t pruned = bits.pruned;  // what was pruned before it was frozen stays pruned
#pragma unroll 1
  for (int at = 0; at < kVector<S>; at += kUnrolled<S>) {
    pruned |= step_elements<S>(rule, slots, p, g, slot, at, bits, frozen, scalars);
    p.template turn<kUnrolled<S>>(), g.template turn<kUnrolled<S>>();
    for (auto& moment : slot) moment.template turn<kUnrolled<S>>();
  }
  return pruned & bits.live;
}

// Stage 11, for an average in storage type E.
template <class S, class E>
__device__ __forceinline__ void update_average(void* average, int64_t i, int count, bool whole,
                                               Vec<S>& p, typename S::compute weight, uint32_t pruned, uint32_t frozen) {
  auto* at = static_cast<typename E::raw*>(average) + i;
  Vector<typename E::raw, kVector<S>> e;
  read(e, at, count, whole);
#pragma unroll 1
  for (int first = 0; first < kVector<S>; first += kUnrolled<S>) {
    each<kUnrolled<S>>([&](int j) {
      const int bit = first + j;
      e.set(j, ema_element<E>(e.get(j), S::load(p.get(j)), weight, pruned >> bit & 1, frozen >> bit & 1));
    });
    e.template turn<kUnrolled<S>>(), p.template turn<kUnrolled<S>>();
  }
  write(at, e, count, whole);
}

// Threads that a multiprocessor holds at once: with 1024 each has 64 registers, and memory is busy. Numbers of fp64 take
// two, and each thread then has more bytes under way.
template <class S> constexpr int kResident = sizeof(typename S::raw) == 8 ? 512 : 1024;

template <class S>
__global__ void __launch_bounds__(kThreads<S>, kResident<S> / kThreads<S>) update(const UpdateArgs __grid_constant__ a) {
  if (a.memory.control->skip != 0) return;
  using T = typename S::compute;
  using raw = typename S::raw;
  constexpr int n = kVector<S>;
  __shared__ Scalars<T> scalars;
  __shared__ Runs runs;
  __shared__ int counts[2];
  const Rows& rows = a.rows;
  const Place place(rows);
  const int row = place.row;
  const Head& head = rows.head(row);
  place.start(rows, runs);
  scalars.load(a.memory.scalars[head.tensor], rows.masked && rows.masks(row).pruned);
  if (a.memory.sums) clear_sums(counts, kThreads<S>);
  __syncthreads();

#pragma unroll 1
  for (int lane = int(threadIdx.x) * n; lane < kBlock; lane += int(kLanes)) {
    const int64_t i = place.begin + lane;
    if (i >= head.n) break;
    const int count = head.n - i < n ? int(head.n - i) : n;
    const bool whole = head.aligned && count == n;
    const Bits bits = place.bits<n>(rows, runs, lane, count);
    const uint32_t frozen = head.freeze ? bits.live & ~bits.keep : 0;
    const bool idle = frozen == bits.live;
    if (idle && !a.memory.sums && rows.averages == 0) continue;
    uint32_t pruned = bits.pruned;
    Vec<S> p, g, slot[kMaxSlots]{};
    read(p, static_cast<const raw*>(head.p) + i, count, whole);
    if (!idle) {
      read(g, static_cast<const raw*>(head.g) + i, count, whole);
#pragma unroll
      for (int k = 0; k < kMaxSlots; ++k)
        if (k < rows.slots) read(slot[k], static_cast<const raw*>(rows.slot(row, k)) + i, count, whole);
      pruned = step_vector<S>(a.rule, rows.slots, p, g, slot, bits, frozen, scalars);
    }
    if (a.memory.sums) add_sums<S>(counts, head, i, count, p, bits.keep & ~bits.pruned, scalars.stage);
    if (!idle) {
      write(static_cast<raw*>(head.p) + i, p, count, whole);
#pragma unroll
      for (int k = 0; k < kMaxSlots; ++k)
        if (k < rows.slots) write(static_cast<raw*>(rows.slot(row, k)) + i, slot[k], count, whole);
      if (pruned != bits.pruned && rows.masked)
        atomicOr(&rows.masks(row).pruned[i >> 5], (pruned & ~bits.pruned) << (i & 31));
    }
#pragma unroll 1
    for (int k = 0; k < rows.averages; ++k) {
      void* average = rows.average(row, k);
      const T weight = scalars.ema_weight[k];
      if (!average || (weight < T(0) && pruned == 0)) continue;
      if (sizeof(raw) < sizeof(T) && (head.narrow >> k & 1))
        update_average<S, S>(average, i, count, whole, p, weight, pruned, frozen);
      else
        update_average<S, typename Wide<S>::type>(average, i, count, whole, p, weight, pruned, frozen);
    }
  }
  if (a.memory.sums) store_sums<n>(counts, &a.memory.sums[head.table_block + place.block]);
}

}  // namespace

void launch_update(int storage, const UpdateArgs& args, cudaStream_t stream) {
#define FUSEOPT_KERNEL(S) update<S>,
  static constexpr decltype(&update<F32>) kernels[] = {FUSEOPT_STORAGES(FUSEOPT_KERNEL)};
#undef FUSEOPT_KERNEL
  const size_t shared = args.memory.sums ? kSums * kLanes * sizeof(double) : 0;
  launch_with(shared, kernels[storage], args.rows.blocks, threads_of(storage), stream, args);
}

}  // namespace cuda
}  // namespace fuseopt
