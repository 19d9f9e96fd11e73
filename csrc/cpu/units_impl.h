// What one turn of a loop takes: elements and the bits of their masks, as vectors want them. A part of kernels_impl.h.

namespace fuseopt {
namespace FUSEOPT_ISA {

// Tables, not shifts: GCC turns `word >> bit & 1` as a condition into a form that it cannot vectorise. The second is
// for elements taken two by two: even bits, then odd ones.
static const uint32_t bit_table[1][32] = {
    {1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,  1u << 8,  1u << 9,  1u << 10,
     1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15, 1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21,
     1u << 22, 1u << 23, 1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31}};
static const uint32_t pair_table[2][16] = {
    {1u << 0, 1u << 2, 1u << 4, 1u << 6, 1u << 8, 1u << 10, 1u << 12, 1u << 14, 1u << 16, 1u << 18, 1u << 20, 1u << 22,
     1u << 24, 1u << 26, 1u << 28, 1u << 30},
    {1u << 1, 1u << 3, 1u << 5, 1u << 7, 1u << 9, 1u << 11, 1u << 13, 1u << 15, 1u << 17, 1u << 19, 1u << 21, 1u << 23,
     1u << 25, 1u << 27, 1u << 29, 1u << 31}};
FUSEOPT_INLINE bool has(uint32_t word, int bit) { return (word & bit_table[0][bit]) != 0; }

constexpr int64_t kAhead = 2048;  // bytes

FUSEOPT_INLINE void prefetch_bytes(const void* at, int64_t bytes, int64_t ahead = kAhead) {
  for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(static_cast<const char*>(at) + ahead + k);
}

// What one turn of the update loop takes: an element, or a word with two elements of 16 bits. These are then worked on
// in 32 bits from load to store; loops that mix widths spend more on shuffles than on the update.
template <class S>
struct Unit {
  static constexpr int elements = 1;
  using word = typename S::raw;
  using Element = S;
  static FUSEOPT_INLINE word get(word w, int) { return w; }
  static FUSEOPT_INLINE word put(const word (&x)[1]) { return x[0]; }
  static FUSEOPT_INLINE uint32_t bit(int j, int unit) { return bit_table[j][unit]; }
};
struct Pair {
  static constexpr int elements = 2;
  typedef uint32_t word __attribute__((aligned(2), may_alias));
  static FUSEOPT_INLINE uint32_t bit(int j, int unit) { return pair_table[j][unit]; }
};
template <>
struct Unit<BF16> : Pair {
  struct Element {  // in the upper half of 32 bits
    using raw = uint32_t;
    using compute = float;
    static FUSEOPT_INLINE float load(raw x) { return bit_cast<float>(x); }
    static FUSEOPT_INLINE raw store(float x) { return rounded_to_bf16(x); }
  };
  static FUSEOPT_INLINE uint32_t get(uint32_t w, int k) { return k ? w & 0xffff0000u : w << 16; }
  static FUSEOPT_INLINE uint32_t put(const uint32_t (&x)[2]) { return x[0] >> 16 | x[1]; }
};
template <>
struct Unit<F16> : Pair {
  struct Element {  // in the lower half
    using raw = uint32_t;
    using compute = float;
    static FUSEOPT_INLINE float load(raw x) { return half_to_float(uint16_t(x)); }
    static FUSEOPT_INLINE raw store(float x) { return float_to_half(x); }
  };
  static FUSEOPT_INLINE uint32_t get(uint32_t w, int k) { return k ? w >> 16 : w & 0xffffu; }
  static FUSEOPT_INLINE uint32_t put(const uint32_t (&x)[2]) { return x[0] | x[1] << 16; }
};

constexpr int64_t kChunk = 128;  // elements

// The masks of a chunk with a whole number for each bit, as wide as the elements are worked on; all ones or 0.
template <class S>
struct Lanes {
  using U = Unit<S>;
  using lane = typename Bits<sizeof(typename U::Element::raw)>::type;
  alignas(64) lane keep[U::elements][kChunk / U::elements], pruned[U::elements][kChunk / U::elements];

  // Whether anything is kept.
  FUSEOPT_INLINE bool spread(const uint32_t* kept, const uint32_t* gone, int64_t words) {
    constexpr int units = 32 / U::elements;
    uint32_t any = 0;
    for (int64_t w = 0; w < words; ++w) {
      uint32_t keep_word = kept[w], pruned_word = gone[w];
      asm("" : "+r"(keep_word), "+r"(pruned_word));  // else GCC takes four words at once, with a hundred shuffles
      any |= keep_word;
      for (int j = 0; j < U::elements; ++j) {
        for (int i = 0; i < units; ++i) keep[j][w * units + i] = keep_word & U::bit(j, i) ? lane(~lane(0)) : lane(0);
        for (int i = 0; i < units; ++i) pruned[j][w * units + i] = pruned_word & U::bit(j, i) ? lane(~lane(0)) : lane(0);
      }
    }
    return any != 0;
  }
};

}  // namespace FUSEOPT_ISA
}  // namespace fuseopt
