// How one stream of memory is read and written: f32, f64, bf16, f16, and bits.
#pragma once

#include "math.h"

namespace fuseopt {

// `raw` is what lies in memory, `compute` is the type of all arithmetic on it.
struct F32 {
  using raw = float;
  using compute = float;
  static FUSEOPT_INLINE float load(raw x) { return x; }
  static FUSEOPT_INLINE raw store(float x) { return x; }
};
struct F64 {
  using raw = double;
  using compute = double;
  static FUSEOPT_INLINE double load(raw x) { return x; }
  static FUSEOPT_INLINE raw store(double x) { return x; }
};
struct BF16 {
  using raw = uint16_t;
  using compute = float;
  static FUSEOPT_INLINE float load(raw x) { return bf16_to_float(x); }
  static FUSEOPT_INLINE raw store(float x) { return float_to_bf16(x); }
};
struct F16 {
  using raw = uint16_t;
  using compute = float;
  static FUSEOPT_INLINE float load(raw x) { return half_to_float(x); }
  static FUSEOPT_INLINE raw store(float x) { return float_to_half(x); }
};

// The order here is the storage id of schema.py.
#define FUSEOPT_STORAGES(X) X(F32) X(F64) X(BF16) X(F16)

// A mask that repeats: element i of the parameter has bit (i / inner) % period. One whole bit mask is
// inner = 1, period = n; a row mask is inner = columns, period = rows; a column mask inner = 1,
// period = columns. Bits are packed from the least significant one; words are little-endian.
struct BitMask {
  const uint32_t* words = nullptr;
  int64_t period = 1;
  int64_t inner = 1;

  FUSEOPT_INLINE uint32_t bit(int64_t i) const {
    const int64_t k = (i / inner) % period;
    return (words[k >> 5] >> (k & 31)) & 1u;
  }

  // Bits of elements i .. i+31; `n` is the number of elements that exist from i on. The bits past the
  // end are unspecified.
  FUSEOPT_INLINE uint32_t word(int64_t i, int64_t n) const {
    if (inner == 1) {
      const int64_t k = i % period;
      if ((k & 31) == 0 && k + 32 <= ((period + 31) & ~int64_t(31)) && (k + 32 <= period || n <= period - k))
        return words[k >> 5];
      if (k + 32 <= period) {  // two neighbouring words
        const uint64_t pair = uint64_t(words[k >> 5]) | uint64_t(words[(k + 31) >> 5]) << 32;
        return uint32_t(pair >> (k & 31));
      }
    } else if (i % inner + (n < 32 ? n : 32) <= inner) {  // within one row
      return bit(i) ? ~0u : 0u;
    }
    uint32_t out = 0;
    for (int64_t j = 0; j < 32 && j < n; ++j) out |= bit(i + j) << j;
    return out;
  }
};

}  // namespace fuseopt
