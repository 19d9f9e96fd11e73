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
constexpr int kStorages = 4;

template <class S> struct Wide { using type = F32; };  // how numbers of the type of the arithmetic are stored
template <> struct Wide<F64> { using type = F64; };

inline int64_t element_size(int storage) {
  constexpr int64_t size[kStorages] = {sizeof(F32::raw), sizeof(F64::raw), sizeof(BF16::raw), sizeof(F16::raw)};
  return size[storage];
}

inline int64_t compute_size(int storage) {
  constexpr int64_t size[kStorages] = {sizeof(F32::compute), sizeof(F64::compute), sizeof(BF16::compute), sizeof(F16::compute)};
  return size[storage];
}

// |x| as fp32, as the whole number that is ordered like it; NaN above all. Pruning ranks by it.
template <class S>
FUSEOPT_INLINE uint32_t magnitude(typename S::raw x) {
  return bit_cast<uint32_t>(float(S::load(x))) & 0x7fffffffu;
}

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
};

// Walks over a mask in steps of 32 elements: dividing at each of them would take longer than the update.
class BitWalk {
 public:
  FUSEOPT_INLINE BitWalk(const BitMask& mask, int64_t first)
      : mask_(mask), i_(first), k_((first / mask.inner) % mask.period), left_(mask.inner - first % mask.inner) {}

  // The bits of the next 32 elements; those past the end of the tensor are unspecified.
  FUSEOPT_INLINE uint32_t next() {
    if (mask_.inner >= 32) return next_in_rows();
    if (mask_.inner == 1 && mask_.period >= 32) return next_in_period();
    uint32_t out = 0;
    for (int j = 0; j < 32; ++j) out |= mask_.bit(i_ + j) << j;
    i_ += 32;
    return out;
  }

 private:
  FUSEOPT_INLINE uint32_t next_in_rows() {  // of at most two
    const uint32_t row = all_of(k_);
    if (left_ >= 32) return left_ -= 32, row;
    const uint32_t rest = (1u << left_) - 1;
    k_ = k_ + 1 == mask_.period ? 0 : k_ + 1;
    left_ += mask_.inner - 32;
    return (row & rest) | (all_of(k_) & ~rest);
  }

  FUSEOPT_INLINE uint32_t next_in_period() {
    const int64_t rest = mask_.period - k_;
    const int64_t at = k_;
    if (rest >= 32) return k_ = rest == 32 ? 0 : k_ + 32, read(at, 32);
    k_ = 32 - rest;
    return (read(at, rest) & ((1u << rest) - 1)) | read(0, k_) << rest;
  }

  FUSEOPT_INLINE uint32_t all_of(int64_t k) const { return -((mask_.words[k >> 5] >> (k & 31)) & 1u); }

  FUSEOPT_INLINE uint32_t read(int64_t k, int64_t count) const {  // `count` bits from k on, and others above
    const uint32_t* word = mask_.words + (k >> 5);
    const int shift = int(k & 31);
    return shift + count > 32 ? word[0] >> shift | word[1] << (32 - shift) : word[0] >> shift;
  }

  const BitMask& mask_;
  int64_t i_, k_, left_;  // element, bit, elements left in its row
};

}  // namespace fuseopt
