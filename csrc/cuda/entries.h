// What pruning does to the entries that were chosen, whoever chose them.
#pragma once

#include "block.h"

namespace fuseopt {
namespace cuda {

template <class E>
__device__ __forceinline__ void zero_average(void* average, int64_t i) {
  typename E::raw& e = static_cast<typename E::raw*>(average)[i];
  const auto value = E::load(e);
  if (value == value) e = 0;  // NaN is no value yet
}

// Zeroes an entry, its averages and, unless they are kept, its moments.
template <class S>
__device__ __forceinline__ void zero_entry(const Rows& rows, int row, int64_t i, bool keep_moments) {
  using raw = typename S::raw;
  const Head& head = rows.head(row);
  static_cast<raw*>(head.p)[i] = 0;
  for (int k = 0; k < rows.slots && !keep_moments; ++k)
    if (auto* slot = static_cast<raw*>(rows.slot(row, k))) slot[i] = 0;
  for (int k = 0; k < rows.averages; ++k) {
    void* average = rows.average(row, k);
    if (!average) continue;
    if (head.narrow >> k & 1) zero_average<S>(average, i);
    else zero_average<typename Wide<S>::type>(average, i);
  }
}

// Of the entries from i on those whose bits are set; they lie in one word of bits.
template <class S>
__device__ __forceinline__ void prune(const Rows& rows, int row, int64_t i, uint32_t chosen, bool keep_moments) {
  if (chosen == 0) return;
  atomicOr(&rows.masks(row).pruned[i >> 5], chosen << (i & 31));
  for (int j = 0; chosen >> j; ++j)
    if (chosen >> j & 1) zero_entry<S>(rows, row, i + j, keep_moments);
}

}  // namespace cuda
}  // namespace fuseopt
