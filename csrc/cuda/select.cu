// Counting and pruning the candidates of a table: entries neither frozen nor pruned, by the bits of |p|.
#include "entries.h"
#include "launch.h"
#include "select.h"

namespace fuseopt {
namespace cuda {
namespace {

using Keys = uint32_t[kEntries];

// Calls fn(element of the block, candidates among the kEntries from there on as bits, their keys) for this thread's
// vectors. All threads of the block call it.
template <class Fn>
__device__ __forceinline__ void for_each_vector(int storage, const Rows& rows, const Place& place, const Fn& fn) {
  __shared__ Runs runs;
  place.start(rows, runs);
  __syncthreads();
  const Head& head = rows.head(place.row);
#pragma unroll 1
  for (int lane = int(threadIdx.x) * kEntries; lane < kBlock; lane += int(kLanes)) {
    const int64_t i = place.begin + lane;
    if (i >= head.n) break;
    const int count = head.n - i < kEntries ? int(head.n - i) : kEntries;
    const Bits bits = place.bits<kEntries>(rows, runs, lane, count);
    const uint32_t free = bits.live & ~bits.pruned & (head.freeze ? bits.keep : ~0u);
    if (free == 0) continue;
    Keys key;
    keys(storage, head, i, count, key);
    fn(lane, free, key);
  }
}

__global__ void __launch_bounds__(kEntryThreads, 1024 / kEntryThreads)
    digits(const Rows __grid_constant__ rows, int storage, uint32_t prefix, int shift, int width,
           unsigned long long* out) {
  __shared__ unsigned bins[1 << kMaxDigit];
  const uint32_t size = 1u << width;
#pragma unroll 1
  for (uint32_t d = threadIdx.x; d < size; d += kEntryThreads) bins[d] = 0;
  __syncthreads();
  for_each_vector(storage, rows, Place(rows), [&](int, uint32_t free, const Keys& key) {
    for (int j = 0; j < kEntries; ++j)
      if ((free >> j & 1) && key[j] >> (shift + width) == prefix) atomicAdd(&bins[key[j] >> shift & (size - 1)], 1u);
  });
  __syncthreads();
#pragma unroll 1
  for (uint32_t d = threadIdx.x; d < size; d += kEntryThreads)
    if (bins[d]) atomicAdd(&out[d], static_cast<unsigned long long>(bins[d]));
}

__global__ void __launch_bounds__(kEntryThreads, 1024 / kEntryThreads)
    ties(const Rows __grid_constant__ rows, int storage, uint32_t kth, int64_t* out) {
  __shared__ int total;
  const Place place(rows);
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int found = 0;
  for_each_vector(storage, rows, place, [&](int, uint32_t free, const Keys& key) {
    for (int j = 0; j < kEntries; ++j) found += (free >> j & 1) && key[j] == kth;
  });
  if (found) atomicAdd(&total, found);
  __syncthreads();
  if (threadIdx.x == 0) out[rows.head(place.row).table_block + place.block] = total;
}

// The first `quota` bits that are set stay.
__device__ __forceinline__ void keep_first(uint32_t* words, int count, int64_t quota) {
#pragma unroll 1
  for (int w = 0; w < count; ++w) {
    uint32_t kept = 0;
    for (uint32_t rest = words[w]; rest && quota > 0; rest &= rest - 1, --quota) kept |= rest & (0u - rest);
    words[w] = kept;
  }
}

// Who goes is settled for the whole block before anything is written: ties go in the order of the elements.
__global__ void __launch_bounds__(kEntryThreads, 1024 / kEntryThreads)
    prune_block(const Rows __grid_constant__ rows, int storage, uint32_t kth, const int64_t* quota, bool keep_moments) {
  constexpr int words = int(kBlock) / 32;
  __shared__ uint32_t below[words], tied[words];
  const Place place(rows);
  if (threadIdx.x < words) below[threadIdx.x] = tied[threadIdx.x] = 0;
  __syncthreads();
  for_each_vector(storage, rows, place, [&](int lane, uint32_t free, const Keys& key) {
    uint32_t less = 0, equal = 0;
    for (int j = 0; j < kEntries; ++j) less |= uint32_t(key[j] < kth) << j, equal |= uint32_t(key[j] == kth) << j;
    if (less & free) atomicOr(&below[lane / 32], (less & free) << lane % 32);
    if (equal & free) atomicOr(&tied[lane / 32], (equal & free) << lane % 32);
  });
  __syncthreads();
  if (threadIdx.x == 0) keep_first(tied, words, quota[rows.head(place.row).table_block + place.block]);
  __syncthreads();
#pragma unroll 1
  for (int lane = int(threadIdx.x) * kEntries; lane < kBlock; lane += int(kLanes)) {
    const uint32_t chosen = (below[lane / 32] | tied[lane / 32]) >> lane % 32 & ((1u << kEntries) - 1);
    prune(storage, rows, place.row, place.begin + lane, chosen, keep_moments);
  }
}

}  // namespace

void launch_digits(int storage, const Rows& rows, uint32_t prefix, int shift, int width, int64_t* out, cudaStream_t stream) {
  launch(digits, rows.blocks, kEntryThreads, stream, rows, storage, prefix, shift, width,
         reinterpret_cast<unsigned long long*>(out));
}

void launch_ties(int storage, const Rows& rows, uint32_t kth, int64_t* out, cudaStream_t stream) {
  launch(ties, rows.blocks, kEntryThreads, stream, rows, storage, kth, out);
}

void launch_prune(int storage, const Rows& rows, uint32_t kth, const int64_t* quota, bool keep_moments, cudaStream_t stream) {
  launch(prune_block, rows.blocks, kEntryThreads, stream, rows, storage, kth, quota, keep_moments);
}

}  // namespace cuda
}  // namespace fuseopt
