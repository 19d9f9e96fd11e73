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

// Of n neighbours from i on.
template <int n>
__device__ __forceinline__ void ranks(int storage, const Rows& rows, int64_t i, int32_t (&rank)[n]) {
  const Held no = held<n>(rows, 0, i);
  uint32_t key[n];
  keys(storage, rows.head(0), i, n, key);
  for (int j = 0; j < n; ++j) rank[j] = no.pruned >> j & 1 ? kPruned : no.frozen >> j & 1 ? kFrozen : int32_t(key[j]) - 1;
}

// Whether entry j of a group of m goes.
template <int unrolled, class Key>
__device__ __forceinline__ bool goes(int j, int m, int n, const Key& key) {
  const int32_t own = key(j);
  if (own == kPruned) return false;
  int before = 0;
#pragma unroll unrolled
  for (int i = 0; i < m; ++i) before += i < j ? key(i) >= own : key(i) > own;
  return before >= n;
}

__global__ void __launch_bounds__(kPatternThreads, 1024 / kPatternThreads) prune_groups(const Rows __grid_constant__ rows, int storage, Pattern a) {
  const int64_t group = blockIdx.x * int64_t(kPatternThreads) + threadIdx.x;
  if (group >= a.groups) return;
  const uint64_t step = uint64_t(group) / uint64_t(a.stride), row = step / uint64_t(a.along);
  const int64_t column = group - step * a.stride, entry = (step - row * a.along) * a.m;  // the first of the group
  const int64_t first = (row * a.channels + entry) * a.stride + column;
  const int m = a.channels - entry < a.m ? int(a.channels - entry) : a.m;
  const bool four = m == 4 && a.stride == 1 && first % 4 == 0;
  int32_t rank[4];
  if (four) ranks(storage, rows, first, rank);
  uint32_t chosen = 0;
  if (four)
    for (int j = 0; j < 4; ++j) chosen |= uint32_t(goes<4>(j, 4, a.n, [&](int i) { return rank[i]; })) << j;
  // Pruning an entry lowers its rank, maybe before the next one is decided. That changes nothing: it is not among the
  // n largest, which are all that counts.
#pragma unroll 1
  for (int j = 0; j < m; ++j) {
    const bool gone = four ? chosen >> j & 1 : goes<1>(j, m, a.n, [&](int i) {
      int32_t one[1];
      return ranks(storage, rows, first + i * a.stride, one), one[0];
    });
    if (gone) prune(storage, rows, 0, first + j * a.stride, 1, a.keep_moments);
  }
}

}  // namespace

void launch_pattern(int storage, const Rows& rows, const Pattern& pattern, cudaStream_t stream) {
  const auto blocks = int((pattern.groups + kPatternThreads - 1) / kPatternThreads);
  launch(prune_groups, blocks, kPatternThreads, stream, rows, storage, pattern);
}

}  // namespace cuda
}  // namespace fuseopt
