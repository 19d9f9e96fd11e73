// The inner loops of pruning, one table of them per instruction set, as kernels.h has them for the step.
// A word holds the bits of 32 entries. Arrays of entries are padded to whole words; what lies there is unspecified.
#pragma once

#include "../streams.h"

namespace fuseopt {

struct SelectLoops {
  const char* name;
  // key[i] = the magnitude of p[i], less `minus`.
  void (*keys[kStorages])(const void* p, int64_t n, int32_t minus, int32_t* key);
  // In the bits of below and within: which of the 32 * words keys are < first, and which from first to last.
  void (*compare)(const int32_t* key, int64_t words, int32_t first, int32_t last, uint32_t* below, uint32_t* within);
  // key[i] = value where its bit is set.
  void (*put)(const uint32_t* bits, int64_t n, int32_t value, int32_t* key);
  // x[i] = 0 where its bit is set; elements of 2, 4 or 8 bytes.
  void (*zero)(void* x, int64_t size, int64_t n, const uint32_t* bits);
  // A word of bits: which of the first n of 32 numbers are not 0; each of them is 0 or ~0.
  uint32_t (*pack)(const int32_t* x, int64_t n);
  // out[i] = ~0 for the entries that are not among the n largest of their group, of equal ones the first; else 0.
  // Groups have m entries and lie as `columns` side by side, each entry of theirs in one row of memory. `work` has
  // room for twice as many. [1]: for m = 4.
  void (*beyond[2])(const int32_t* key, int64_t groups, int64_t columns, int m, int n, int32_t* work, int32_t* out);
  // The sum of squares of x[0 .. n-1] in double, by halving; `work` has room for half as many.
  double (*square[kStorages])(const void* x, int64_t n, double* work);
};

extern const SelectLoops select_portable, select_avx2, select_avx512;
const SelectLoops& select_loops();  // those that go with kernels()

}  // namespace fuseopt
