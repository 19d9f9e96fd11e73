// The tensors of a launch. They are passed by value: in device memory they would have to be copied there at each step.
#pragma once

#include <cstring>

#include "args.h"

namespace fuseopt {
namespace cuda {

// A row is this, then the addresses of its slots, then those of its averages (nullptr: none), then, in a launch with
// masks, a Masks. Launches differ in the length of a row, so that plain steps have room for more tensors.
struct Head {
  int64_t n;           // elements
  void* p;
  const void* g;
  int32_t first_block; // of this launch; its blocks are consecutive
  int32_t tensor;      // index in the table, and so of its scalars
  int32_t table_block; // first block counted over the whole table, and so of its sums
  uint8_t narrow;      // bit k: average k is kept in the parameter's type, not in that of the arithmetic
  uint8_t freeze;      // else its mask only zeroes the gradient
  uint8_t aligned;     // every address here is a multiple of 16 bytes
  uint8_t unused;
};
struct Masks {
  const uint32_t* keep;  // nullptr: no mask
  int64_t period, inner;
  uint32_t* pruned;      // nullptr: nothing pruned
};
constexpr int kHeadWords = sizeof(Head) / 8, kMaskWords = sizeof(Masks) / 8;
static_assert(sizeof(Head) == 40 && sizeof(Masks) == 32, "whole words, without gaps");

struct Rows {
  int32_t count, width;     // rows, and words of each
  int32_t slots, averages;  // addresses of each
  int32_t masked, blocks;
  uint64_t word[4000];  // a kernel takes 32,764 bytes

  FUSEOPT_INLINE const uint64_t* row(int k) const { return word + k * width; }
  FUSEOPT_INLINE const Head& head(int k) const { return *reinterpret_cast<const Head*>(row(k)); }
  FUSEOPT_INLINE void* slot(int k, int j) const { return reinterpret_cast<void*>(row(k)[kHeadWords + j]); }
  FUSEOPT_INLINE void* average(int k, int j) const { return reinterpret_cast<void*>(row(k)[kHeadWords + slots + j]); }
  FUSEOPT_INLINE const Masks& masks(int k) const { return *reinterpret_cast<const Masks*>(row(k) + width - kMaskWords); }

  // The row that a block belongs to.
  FUSEOPT_INLINE int find(int block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (head(middle).first_block <= block) low = middle;
      else high = middle;
    }
    return low;
  }
};

}  // namespace cuda
}  // namespace fuseopt
