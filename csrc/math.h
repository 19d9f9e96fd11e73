// Scalar arithmetic that gives the same bits on every compiler and device: correctly rounded fma,
// square root and division, and conversion of the 16-bit formats (round to nearest, ties to even).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define FUSEOPT_INLINE __host__ __device__ __forceinline__
#else
// always_inline: the same function is compiled for several instruction sets (see cpu/kernels.h); an
// out-of-line copy made for one of them must never be linked into another.
#define FUSEOPT_INLINE inline __attribute__((always_inline))
#endif

namespace fuseopt {

FUSEOPT_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FUSEOPT_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
FUSEOPT_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
FUSEOPT_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
FUSEOPT_INLINE float abs(float x) { return __builtin_fabsf(x); }
FUSEOPT_INLINE double abs(double x) { return __builtin_fabs(x); }

FUSEOPT_INLINE float copysign(float x, float y) { return __builtin_copysignf(x, y); }
FUSEOPT_INLINE double copysign(double x, double y) { return __builtin_copysign(x, y); }

#if defined(__CUDACC__)
__host__ __device__ __noinline__ inline  // long, and called in many places
#else
FUSEOPT_INLINE
#endif
double pow(double x, double y) { return std::pow(x, y); }

template <class T>
FUSEOPT_INLINE T sign(T x) {  // sign(0) = 0, and NaN stays NaN
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : x;
}

template <class To, class From>
FUSEOPT_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

template <int size> struct Bits;
template <> struct Bits<2> { using type = uint16_t; };
template <> struct Bits<4> { using type = uint32_t; };
template <> struct Bits<8> { using type = uint64_t; };

// A truth value as wide as the numbers that it is about: all bits or none. Of bool, which GCC keeps in the few mask
// registers, combining several takes 10 to 20 % longer.
template <int size>
struct Lane {
  using U = typename Bits<size>::type;
  U mask;
  FUSEOPT_INLINE Lane(bool c) : mask(c ? U(~U(0)) : U(0)) {}
  static FUSEOPT_INLINE Lane of(U mask) {
    Lane lane(false);
    lane.mask = mask;
    return lane;
  }
  FUSEOPT_INLINE Lane operator!() const { return of(U(~mask)); }
  friend FUSEOPT_INLINE Lane operator&(Lane a, Lane b) { return of(a.mask & b.mask); }
  friend FUSEOPT_INLINE Lane operator|(Lane a, Lane b) { return of(a.mask | b.mask); }
};
template <class T> using Flag = Lane<sizeof(T)>;

// c ? a : b, by masks: `?:` among 16-bit values vectorises badly, a third slower for masked bf16.
template <class T>
FUSEOPT_INLINE T select(Flag<T> c, T a, T b) {
  using U = typename Bits<sizeof(T)>::type;
  return bit_cast<T>(U((bit_cast<U>(a) & c.mask) | (bit_cast<U>(b) & U(~c.mask))));
}

FUSEOPT_INLINE float bf16_to_float(uint16_t h) { return bit_cast<float>(uint32_t(h) << 16); }

// x rounded to bf16, as the bits of an fp32 number: bf16 is its upper half.
FUSEOPT_INLINE uint32_t rounded_to_bf16(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const uint32_t is_nan = x != x ? ~0u : 0u;  // see float_to_half on the use of masks
  return ((0x7fc00000u & is_nan) | (rounded & ~is_nan)) & 0xffff0000u;
}

FUSEOPT_INLINE uint16_t float_to_bf16(float x) { return uint16_t(rounded_to_bf16(x) >> 16); }

// Both half conversions let the fp32 unit do the exponent work, so that subnormals need no branch.
FUSEOPT_INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  const uint32_t special = magnitude | 0x7f800000u;  // exponent 31 of half: infinity or NaN
  const uint32_t bits = magnitude >= (31u << 23) ? special : finite;
  return bit_cast<float>(bits | (uint32_t(h & 0x8000u) << 16));
}

FUSEOPT_INLINE uint16_t float_to_half(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
#if defined(__CUDA_ARCH__)  // one instruction rounds so; only its NaN has other bits
  return x != x ? uint16_t(0x7e00u | ((u >> 16) & 0x8000u)) : __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t magnitude = u & 0x7fffffffu;
  // normal halfs: rebias the exponent, then round the 13 dropped bits to nearest even
  const uint32_t rebased = magnitude - (112u << 23);
  const uint32_t normal = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  // subnormal halfs: adding 0.5 puts the unit in the last place at 2^-24, the adder rounds
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  // selected with masks: GCC narrows `?:` before a 16-bit store to a form that it cannot vectorise
  const uint32_t is_subnormal = magnitude < (113u << 23) ? ~0u : 0u;
  const uint32_t is_infinite = magnitude >= 0x477ff000u ? ~0u : 0u;  // 65520 and above
  const uint32_t is_nan = magnitude > 0x7f800000u ? ~0u : 0u;
  uint32_t bits = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  bits = (0x7c00u & is_infinite) | (bits & ~is_infinite);
  bits = (0x7e00u & is_nan) | (bits & ~is_nan);
  return uint16_t(bits | ((u >> 16) & 0x8000u));
#endif
}

}  // namespace fuseopt
