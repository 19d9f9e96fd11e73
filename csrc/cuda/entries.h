// The entries of tensors as pruning sees them: what ranks them, and what becomes of those that were chosen. The storage
// is looked at as a kernel runs, so that one serves all: pruning is not in every step.
#pragma once

#include "block.h"

namespace fuseopt {
namespace cuda {

constexpr int kEntries = 4;  // of a thread at a time
constexpr int kEntryThreads = int(kLanes) / kEntries;

enum StorageIndex {
#define FUSEOPT_INDEX(S) k##S,
  FUSEOPT_STORAGES(FUSEOPT_INDEX)
#undef FUSEOPT_INDEX
};

// Calls fn with the struct of the storage.
template <class Fn>
__device__ __forceinline__ void with_storage(int storage, const Fn& fn) {
#define FUSEOPT_CALL(S) \
  if (storage == k##S) return fn(S());
  FUSEOPT_STORAGES(FUSEOPT_CALL)
#undef FUSEOPT_CALL
}

// The keys of n entries from i on, of which `count` exist.
template <int n>
__device__ __forceinline__ void keys(int storage, const Head& head, int64_t i, int count, uint32_t (&key)[n]) {
  with_storage(storage, [&](auto s) {
    using S = decltype(s);
    const auto* at = static_cast<const typename S::raw*>(head.p) + i;
    if constexpr (n == 1) {
      key[0] = magnitude<S>(*at);
    } else {
      Vector<typename S::raw, n> p;
      read(p, at, count, head.aligned && count == n);
      for (int j = 0; j < n; ++j) key[j] = magnitude<S>(p.get(j));
    }
  });
}

// Zeroes entry i of a row: the parameter, its averages where they have a value and, unless they are kept, its moments.
__device__ __forceinline__ void zero_entry(int storage, const Rows& rows, int row, int64_t i, bool keep_moments) {
  const Head& head = rows.head(row);
  const int wide = storage == kF64 ? kF64 : kF32;
#pragma unroll 1
  for (int k = -1; k < rows.slots + rows.averages; ++k) {
    const int average = k - rows.slots;  // negative: not one
    if (keep_moments && k >= 0 && average < 0) continue;
    void* at = k < 0 ? head.p : rows.slot(row, k);
    if (!at) continue;
    with_storage(average >= 0 && !(head.narrow >> average & 1) ? wide : storage, [&](auto s) {
      using S = decltype(s);
      typename S::raw& x = static_cast<typename S::raw*>(at)[i];
      const auto value = S::load(x);
      if (average < 0 || value == value) x = 0;  // NaN is no value yet
    });
  }
}

// Of the entries from i on those whose bits are set; they lie in one word of bits.
__device__ __forceinline__ void prune(int storage, const Rows& rows, int row, int64_t i, uint32_t chosen,
                                      bool keep_moments) {
  if (chosen == 0) return;
  atomicOr(&rows.masks(row).pruned[i >> 5], chosen << (i & 31));
#pragma unroll 1
  for (int j = 0; chosen >> j; ++j)
    if (chosen >> j & 1) zero_entry(storage, rows, row, i + j, keep_moments);
}

}  // namespace cuda
}  // namespace fuseopt
