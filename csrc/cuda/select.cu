// Counting and pruning the candidates of a table: entries neither frozen nor pruned, by the bits of |p|.
#include "entries.h"
#include "launch.h"
#include "select.h"

namespace fuseopt {
namespace cuda {
namespace {

// Calls fn(element of the block, candidates among the n from there on as bits, their keys) for this thread's vectors.
// All threads of the block call it.
template <class S, class Fn>
__device__ __forceinline__ void for_each_vector(const Rows& rows, const Place& place, const Fn& fn) {
  constexpr int n = kVector<S>;
  __shared__ Runs runs;
  place.start(rows, runs);
  __syncthreads();
  const Head& head = rows.head(place.row);
  for (int lane = int(threadIdx.x) * n; lane < kBlock; lane += int(kLanes)) {
    const int64_t i = place.begin + lane;
    if (i >= head.n) break;
    const int count = head.n - i < n ? int(head.n - i) : n;
    const Bits bits = place.bits<n>(rows, runs, lane, count);
    const uint32_t free = bits.live & ~bits.pruned & (head.freeze ? bits.keep : ~0u);
    if (free == 0) continue;
    Vector<typename S::raw, n> p;
    read(p, static_cast<const typename S::raw*>(head.p) + i, count);
    uint32_t key[n];
    for (int j = 0; j < n; ++j) key[j] = magnitude<S>(p.get(j));
    fn(lane, free, key);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads<S>, 1024 / kThreads<S>) digits(const Rows __grid_constant__ rows, uint32_t prefix, int shift,
                                                      int width, unsigned long long* out) {
  __shared__ unsigned bins[1 << kMaxDigit];
  const uint32_t size = 1u << width;
  for (uint32_t d = threadIdx.x; d < size; d += kThreads<S>) bins[d] = 0;
  __syncthreads();
  for_each_vector<S>(rows, Place(rows), [&](int, uint32_t free, const uint32_t(&key)[kVector<S>]) {
    for (int j = 0; j < kVector<S>; ++j)
      if ((free >> j & 1) && key[j] >> (shift + width) == prefix) atomicAdd(&bins[key[j] >> shift & (size - 1)], 1u);
  });
  __syncthreads();
  for (uint32_t d = threadIdx.x; d < size; d += kThreads<S>)
    if (bins[d]) atomicAdd(&out[d], static_cast<unsigned long long>(bins[d]));
}

template <class S>
__global__ void __launch_bounds__(kThreads<S>, 1024 / kThreads<S>) ties(const Rows __grid_constant__ rows, uint32_t kth, int64_t* out) {
  __shared__ int total;
  const Place place(rows);
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int found = 0;
  for_each_vector<S>(rows, place, [&](int, uint32_t free, const uint32_t(&key)[kVector<S>]) {
    for (int j = 0; j < kVector<S>; ++j) found += (free >> j & 1) && key[j] == kth;
  });
  if (found) atomicAdd(&total, found);
  __syncthreads();
  if (threadIdx.x == 0) out[rows.head(place.row).table_block + place.block] = total;
}

// The first `quota` bits that are set stay.
__device__ __forceinline__ void keep_first(uint32_t* words, int count, int64_t quota) {
  for (int w = 0; w < count; ++w) {
    uint32_t kept = 0;
    for (uint32_t rest = words[w]; rest && quota > 0; rest &= rest - 1, --quota) kept |= rest & (0u - rest);
    words[w] = kept;
  }
}

// Who goes is settled for the whole block before anything is written: ties go in the order of the elements.
template <class S>
__global__ void __launch_bounds__(kThreads<S>, 1024 / kThreads<S>) prune_block(const Rows __grid_constant__ rows, uint32_t kth,
                                                           const int64_t* quota, bool keep_moments) {
  constexpr int n = kVector<S>, words = int(kBlock) / 32;
  __shared__ uint32_t below[words], tied[words];
  const Place place(rows);
  for (int w = int(threadIdx.x); w < words; w += kThreads<S>) below[w] = tied[w] = 0;
  __syncthreads();
  for_each_vector<S>(rows, place, [&](int lane, uint32_t free, const uint32_t(&key)[n]) {
    uint32_t less = 0, equal = 0;
    for (int j = 0; j < n; ++j) less |= uint32_t(key[j] < kth) << j, equal |= uint32_t(key[j] == kth) << j;
    if (less & free) atomicOr(&below[lane / 32], (less & free) << lane % 32);
    if (equal & free) atomicOr(&tied[lane / 32], (equal & free) << lane % 32);
  });
  __syncthreads();
  if (threadIdx.x == 0) keep_first(tied, words, quota[rows.head(place.row).table_block + place.block]);
  __syncthreads();
  for (int lane = int(threadIdx.x) * n; lane < kBlock; lane += int(kLanes)) {
    const uint32_t chosen = (below[lane / 32] | tied[lane / 32]) >> lane % 32 & ((1u << n) - 1);
    prune<S>(rows, place.row, place.begin + lane, chosen, keep_moments);
  }
}

}  // namespace

#define FUSEOPT_EACH(S) FUSEOPT_KERNEL<S>,

void launch_digits(int storage, const Rows& rows, uint32_t prefix, int shift, int width, int64_t* out, cudaStream_t stream) {
#define FUSEOPT_KERNEL digits
  constexpr decltype(&digits<F32>) kernels[] = {FUSEOPT_STORAGES(FUSEOPT_EACH)};
#undef FUSEOPT_KERNEL
  launch(kernels[storage], rows.blocks, threads_of(storage), stream, rows, prefix, shift, width,
         reinterpret_cast<unsigned long long*>(out));
}

void launch_ties(int storage, const Rows& rows, uint32_t kth, int64_t* out, cudaStream_t stream) {
#define FUSEOPT_KERNEL ties
  constexpr decltype(&ties<F32>) kernels[] = {FUSEOPT_STORAGES(FUSEOPT_EACH)};
#undef FUSEOPT_KERNEL
  launch(kernels[storage], rows.blocks, threads_of(storage), stream, rows, kth, out);
}

void launch_prune(int storage, const Rows& rows, uint32_t kth, const int64_t* quota, bool keep_moments, cudaStream_t stream) {
#define FUSEOPT_KERNEL prune_block
  constexpr decltype(&prune_block<F32>) kernels[] = {FUSEOPT_STORAGES(FUSEOPT_EACH)};
#undef FUSEOPT_KERNEL
  launch(kernels[storage], rows.blocks, threads_of(storage), stream, rows, kth, quota, keep_moments);
}

}  // namespace cuda
}  // namespace fuseopt
