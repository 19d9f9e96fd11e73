// Of every m entries along the channels the n largest stay, of equal ones the first. One thread decides for a group.
#include "entries.h"
#include "launch.h"
#include "pattern.h"

namespace fuseopt {
namespace cuda {
namespace {

// Keys say who stays, as in csrc/cpu/pattern.cpp: in the order of |p|, below all what is pruned, above all what is frozen.
constexpr int kPatternThreads = 128;
constexpr int32_t kPruned = INT32_MIN, kFrozen = INT32_MAX;

// The bits of n neighbours from i on, a multiple of n; those past the end are unspecified.
struct Held {
  uint32_t pruned, frozen;
};
template <int n>
__device__ __forceinline__ Held held(const Rows& rows, int row, int64_t i) {
  const Head& head = rows.head(row);
  const Masks& masks = rows.masks(row);
  const uint32_t pruned = masks.pruned[i >> 5] >> (i & 31);
  if (!head.freeze || !masks.keep) return {pruned, 0};
  if (masks.inner == 1 && masks.period >= head.n) return {pruned, ~masks.keep[i >> 5] >> (i & 31)};
  const BitMask keep{masks.keep, masks.period, masks.inner};
  uint32_t frozen = 0;
  for (int j = 0; j < n; ++j) frozen |= (keep.bit(i + j) ^ 1u) << j;
  return {pruned, frozen};
}

template <class S>
__device__ __forceinline__ int32_t key_of(typename S::raw p, const Held& held, int j) {
  return held.pruned >> j & 1 ? kPruned : held.frozen >> j & 1 ? kFrozen : int32_t(magnitude<S>(p)) - 1;
}

template <class S>
__device__ __forceinline__ int32_t key_at(const Rows& rows, int64_t i) {
  return key_of<S>(static_cast<const typename S::raw*>(rows.head(0).p)[i], held<1>(rows, 0, i), 0);
}

template <class raw>
struct alignas(sizeof(raw) < 4 ? 8 : 16) Quad {
  raw x[4];
};
template <class raw>
__device__ __forceinline__ void load(Quad<raw>& v, const raw* at) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(Quad<raw>) == 0) v = *reinterpret_cast<const Quad<raw>*>(at);
  else for (int j = 0; j < 4; ++j) v.x[j] = at[j];
}

// Whether entry j of a group of m goes.
template <class Key>
__device__ __forceinline__ bool goes(int j, int m, int n, const Key& key) {
  const int32_t own = key(j);
  if (own == kPruned) return false;
  int before = 0;
  for (int i = 0; i < m; ++i) before += i < j ? key(i) >= own : key(i) > own;
  return before >= n;
}

template <class S>
__global__ void __launch_bounds__(kPatternThreads, 8) prune_groups(const Rows __grid_constant__ rows, Pattern a) {
  const int64_t group = blockIdx.x * int64_t(kPatternThreads) + threadIdx.x;
  if (group >= a.groups) return;
  const int64_t column = group % a.stride, step = group / a.stride;
  const int64_t entry = step % a.along * a.m;  // the first of the group
  const int64_t first = (step / a.along * a.channels + entry) * a.stride + column;
  const int m = a.channels - entry < a.m ? int(a.channels - entry) : a.m;
  if (m == 4 && a.stride == 1 && first % 4 == 0) {
    const Held no = held<4>(rows, 0, first);
    Quad<typename S::raw> p;
    load(p, static_cast<const typename S::raw*>(rows.head(0).p) + first);
    int32_t key[4];
    for (int j = 0; j < 4; ++j) key[j] = key_of<S>(p.x[j], no, j);
    uint32_t chosen = 0;
    for (int j = 0; j < 4; ++j) chosen |= uint32_t(goes(j, 4, a.n, [&](int i) { return key[i]; })) << j;
    return prune<S>(rows, 0, first, chosen, a.keep_moments);
  }
  // Pruning an entry lowers its key, maybe before the next one is decided. That changes nothing: it is not among the
  // n largest, which are all that counts.
  for (int j = 0; j < m; ++j)
    if (goes(j, m, a.n, [&](int i) { return key_at<S>(rows, first + i * a.stride); }))
      prune<S>(rows, 0, first + j * a.stride, 1, a.keep_moments);
}

}  // namespace

void launch_pattern(int storage, const Rows& rows, const Pattern& pattern, cudaStream_t stream) {
#define FUSEOPT_KERNEL(S) prune_groups<S>,
  constexpr decltype(&prune_groups<F32>) kernels[] = {FUSEOPT_STORAGES(FUSEOPT_KERNEL)};
#undef FUSEOPT_KERNEL
  const auto blocks = int((pattern.groups + kPatternThreads - 1) / kPatternThreads);
  launch(kernels[storage], blocks, kPatternThreads, stream, rows, pattern);
}

}  // namespace cuda
}  // namespace fuseopt
