// How the threads of a block share its kBlock elements: each takes vectors of 16 bytes, kLanes elements at a time go to
// all of them, and so each thread owns the lanes of its vector.
#pragma once

#include "../streams.h"
#include "rows.h"

namespace fuseopt {
namespace cuda {

template <class S> constexpr int kVector = 16 / sizeof(typename S::raw);
template <class S> constexpr int kThreads = int(kLanes) / kVector<S>;

template <class raw, int n>
struct alignas(16) Vector {
  raw x[n];
};

// `count` elements, the rest 0. Tails and streams that are not aligned go one by one.
template <class raw, int n>
__device__ __forceinline__ void read(Vector<raw, n>& v, const raw* at, int count) {
  if (count == n && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
    v = *reinterpret_cast<const Vector<raw, n>*>(at);
    return;
  }
#pragma unroll
  for (int j = 0; j < n; ++j) v.x[j] = j < count ? at[j] : raw(0);
}

template <class raw, int n>
__device__ __forceinline__ void write(raw* at, const Vector<raw, n>& v, int count) {
  if (count == n && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
    *reinterpret_cast<Vector<raw, n>*>(at) = v;
    return;
  }
#pragma unroll
  for (int j = 0; j < n; ++j)
    if (j < count) at[j] = v.x[j];
}

// The bits of n elements from i on, which is a multiple of n, of a mask that repeats; `Index` holds every i.
template <int n, class Index>
__device__ __forceinline__ uint32_t repeated_bits(const Masks& mask, Index i) {
  const Index inner = Index(mask.inner), period = Index(mask.period);
  const Index run = inner == 1 ? i : i / inner;
  Index k = run < period ? run : run % period, left = inner - (i - run * inner);
  const auto bit = [&] { return (mask.keep[k >> 5] >> (k & 31)) & 1u; };
  if (left >= n) return -bit();
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    bits |= bit() << j;
    if (--left == 0) left = inner, k = k + 1 == period ? 0 : k + 1;
  }
  return bits;
}

// Bit j tells whether element i + j is kept; those past the end are unspecified.
template <int n>
__device__ __forceinline__ uint32_t kept(const Masks& mask, int64_t i, int64_t elements) {
  if (!mask.keep) return ~0u;
  if (mask.inner == 1 && mask.period >= elements) return mask.keep[i >> 5] >> (i & 31);
  return elements < int64_t(1) << 31 ? repeated_bits<n>(mask, uint32_t(i)) : repeated_bits<n>(mask, uint64_t(i));
}

// What a thread works on: `count` elements from i on, and the bits of their masks.
struct Bits {
  uint32_t live, keep, pruned;  // live: bit j is set for j < count

  template <int n>
  __device__ __forceinline__ static Bits of(const Masks& mask, int64_t i, int count, int64_t elements) {
    const uint32_t live = (1u << count) - 1;
    return {live, kept<n>(mask, i, elements) & live, (mask.pruned ? mask.pruned[i >> 5] >> (i & 31) : 0) & live};
  }
};

// The sum of kLanes lanes in the order of sums.h, for thread 0. All threads of the block call it; lane t * n + j, of
// thread t, lies in lanes[j * threads + t], so that neighbours hit different banks.
template <int n>
__device__ __forceinline__ double add_lanes_of_block(double* lanes) {
  constexpr int threads = int(kLanes) / n;
  const int t = int(threadIdx.x);
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half)
      for (int j = 0; j < n; ++j) lanes[j * threads + t] += lanes[j * threads + t + half];
  }
  for (int half = n / 2; t == 0 && half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j * threads] += lanes[(j + half) * threads];
  return lanes[0];
}

}  // namespace cuda
}  // namespace fuseopt
