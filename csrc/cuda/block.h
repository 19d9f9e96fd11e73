// How the threads of a block share its kBlock elements: each takes vectors of 16 bytes, kLanes elements at a time go to
// all of them, and so each thread owns the lanes of its vector.
#pragma once

#include <cuda_runtime.h>

#include "../streams.h"
#include "rows.h"

namespace fuseopt {
namespace cuda {

template <class S> constexpr int kVector = 16 / sizeof(typename S::raw);
template <class S> constexpr int kThreads = int(kLanes) / kVector<S>;
inline int threads_of(int storage) { return int(kLanes * element_size(storage)) / 16; }

// n elements. They are held as words: an element of 16 bits of its own would take a whole register.
template <class raw, int n>
struct alignas(n * sizeof(raw) < 16 ? 8 : 16) Vector {
  uint32_t word[n * sizeof(raw) / 4];

  __device__ __forceinline__ raw get(int j) const {
    if constexpr (sizeof(raw) == 2) return raw(word[j / 2] >> (j % 2 * 16));
    else if constexpr (sizeof(raw) == 4) return bit_cast<raw>(word[j]);
    else return bit_cast<raw>(uint64_t(word[2 * j + 1]) << 32 | word[2 * j]);
  }

  __device__ __forceinline__ void set(int j, raw x) {
    if constexpr (sizeof(raw) == 2) {
      const int shift = j % 2 * 16;
      word[j / 2] = (word[j / 2] & ~(0xffffu << shift)) | uint32_t(x) << shift;
    } else if constexpr (sizeof(raw) == 4) {
      word[j] = bit_cast<uint32_t>(x);
    } else {
      const uint64_t bits = bit_cast<uint64_t>(x);
      word[2 * j] = uint32_t(bits), word[2 * j + 1] = uint32_t(bits >> 32);
    }
  }

  // Brings element `by` to the front, and those before it to the back: a loop that is not unrolled cannot index
  // registers, but it can turn them.
  template <int by>
  __device__ __forceinline__ void turn() {
    constexpr int words = int(sizeof word) / 4, bytes = by * int(sizeof(raw));
    const Vector old = *this;
#pragma unroll
    for (int w = 0; w < words; ++w) {
      const uint32_t next = old.word[(w + bytes / 4) % words];
      word[w] = bytes % 4 == 0 ? next : next >> 16 | old.word[(w + bytes / 4 + 1) % words] << 16;
    }
  }
};

// `count` elements, at least one; past the end the last again. Tails and streams that are not aligned go one by one.
template <class raw, int n>
__device__ __forceinline__ void read(Vector<raw, n>& v, const raw* at, int count, bool whole) {
  if (whole) {
    v = *reinterpret_cast<const Vector<raw, n>*>(at);
    return;
  }
  v = {};
#pragma unroll 1
  for (int j = 1; j <= n; at += j < count, ++j) v.template turn<1>(), v.set(n - 1, *at);
}

template <class raw, int n>
__device__ __forceinline__ void write(raw* at, Vector<raw, n> v, int count, bool whole) {
  if (whole) {
    *reinterpret_cast<Vector<raw, n>*>(at) = v;
    return;
  }
#pragma unroll 1
  for (int j = 0; j < count; ++j, v.template turn<1>()) at[j] = v.get(0);
}

#if defined(__CUDACC__)
__device__ __forceinline__ double* dynamic_shared() {
  extern __shared__ double memory[];
  return memory;
}
#endif

// Where a mask that repeats stands at the start of a block: in a run of `inner` elements that share a bit. What a block
// does not reach is cut off, so that 32 bits suffice inside it: a 64-bit division is long, and a call.
struct Runs {
  int64_t first;   // the bit of the first run
  uint32_t left;   // elements of it from here on
  uint32_t inner;  // elements of each further run
  uint32_t room;   // runs until the bits start anew
  uint32_t period;

  __device__ __forceinline__ void start(const Masks& mask, int64_t at) {
    const auto most = [](int64_t x) { return uint32_t(x < kBlock ? x : kBlock); };
    const uint64_t inner_size = mask.inner, size = mask.period, run = uint64_t(at) / inner_size;
    first = run - run / size * size;
    left = most(int64_t(run + 1) * mask.inner - at), inner = most(mask.inner);
    room = most(mask.period - first), period = most(mask.period);
  }

  // The bits of n elements, the first being element i of the block.
  template <int n>
  __device__ __forceinline__ uint32_t bits(const Masks& mask, uint32_t i) const {
    uint32_t run = 0, rest = left - i;
    if (i >= left) {
      const uint32_t past = i - left;
      run = past / inner;
      rest = inner - (past - run++ * inner);
    }
    int64_t k = run < room ? first + run : (run - room) % period;
    const auto bit = [&] { return (mask.keep[k >> 5] >> (k & 31)) & 1u; };
    if (rest >= n) return -bit();
    uint32_t out = 0;
#pragma unroll 1
    for (int j = 0; j < n; ++j) {
      out |= bit() << j;
      if (--rest == 0) rest = inner, k = k + 1 == mask.period ? 0 : k + 1;
    }
    return out;
  }
};

// The masks of some elements: bit j of `live` is set where element j exists.
struct Bits {
  uint32_t live, keep, pruned;
};

// A block of elements: those of row `row` from `begin` on.
struct Place {
  int row;
  int64_t block, begin;  // block of its tensor

  __device__ __forceinline__ explicit Place(const Rows& rows) : row(rows.find(int(blockIdx.x))) {
    block = int(blockIdx.x) - rows.head(row).first_block, begin = block * kBlock;
  }

  __device__ __forceinline__ void start(const Rows& rows, Runs& runs) const {
    if (rows.masked && threadIdx.x == 0 && rows.masks(row).keep) runs.start(rows.masks(row), begin);
  }

  // Of n elements from begin + i on, of which `count` exist.
  template <int n>
  __device__ __forceinline__ Bits bits(const Rows& rows, const Runs& runs, int i, int count) const {
    const uint32_t live = (1u << count) - 1;
    if (!rows.masked) return {live, live, 0};
    const Masks& mask = rows.masks(row);
    const int64_t word = (begin + i) >> 5;
    const bool whole = mask.inner == 1 && mask.period >= rows.head(row).n;  // a bit for each element
    const uint32_t keep = !mask.keep ? ~0u : whole ? mask.keep[word] >> (i & 31) : runs.bits<n>(mask, i);
    return {live, keep & live, (mask.pruned ? mask.pruned[word] >> (i & 31) : 0) & live};
  }
};

// The sum of kLanes lanes in the order of sums.h, for thread 0. All threads of the block call it; lane t * n + j, of
// thread t, lies in lanes[j * threads + t], so that neighbours hit different banks.
template <int n>
__device__ __forceinline__ double add_lanes_of_block(double* lanes) {
  constexpr int threads = int(kLanes) / n;
  const int t = int(threadIdx.x);
#pragma unroll 1
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half)
#pragma unroll 1
      for (int j = 0; j < n; ++j) lanes[j * threads + t] += lanes[j * threads + t + half];
  }
#pragma unroll 1
  for (int half = n / 2; t == 0 && half > 0; half /= 2)
#pragma unroll 1
    for (int j = 0; j < half; ++j) lanes[j * threads] += lanes[(j + half) * threads];
  return lanes[0];
}

}  // namespace cuda
}  // namespace fuseopt
