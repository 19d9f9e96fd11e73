// The bodies of the loops in select_loops.h; included as units_impl.h is, and under the same rules.

namespace fuseopt {
namespace FUSEOPT_ISA {

static const uint32_t word_bit[32] = {  // a table, not a shift: see bit_table in units_impl.h
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,  1u << 8,  1u << 9,  1u << 10,
    1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15, 1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21,
    1u << 22, 1u << 23, 1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};

template <class S>
void keys(const void* p, int64_t n, int32_t minus, int32_t* __restrict key) {
  const auto* x = static_cast<const typename S::raw*>(p);
  for (int64_t i = 0; i < n; ++i) key[i] = int32_t(magnitude<S>(x[i])) - minus;
}

// Which of 32 numbers are <= value.
FUSEOPT_INLINE uint32_t not_above(const int32_t* key, int32_t value) {
#if defined(FUSEOPT_AVX512)  // GCC makes numbers of the bits that a comparison gives, and then bits again
  const __m512i most = _mm512_set1_epi32(value);
  return uint32_t(_mm512_cmple_epi32_mask(_mm512_loadu_si512(key), most)) |
         uint32_t(_mm512_cmple_epi32_mask(_mm512_loadu_si512(key + 16), most)) << 16;
#else
  uint32_t word = 0;
  for (int j = 0; j < 32; ++j) word |= key[j] <= value ? word_bit[j] : 0u;
  return word;
#endif
}

void compare(const int32_t* __restrict key, int64_t words, int32_t first, int32_t last,
             uint32_t* __restrict below, uint32_t* __restrict within) {
  for (int64_t w = 0; w < words; ++w) {
    const uint32_t less = not_above(key + 32 * w, first - 1);
    below[w] = less, within[w] = not_above(key + 32 * w, last) & ~less;
  }
}

void put(const uint32_t* bits, int64_t n, int32_t value, int32_t* __restrict key) {
  for (int64_t i = 0; i < n; i += 32)
    if (const uint32_t word = bits[i / 32]) {
      if (n - i >= 32)
        for (int j = 0; j < 32; ++j) key[i + j] = word & word_bit[j] ? value : key[i + j];
      else
        for (int j = 0; j < n - i; ++j) key[i + j] = word & word_bit[j] ? value : key[i + j];
    }
}

template <class T>
FUSEOPT_INLINE void zero_elements(T* __restrict x, int64_t n, const uint32_t* bits) {
  for (int64_t i = 0; i < n; i += 32)
    if (const uint32_t word = bits[i / 32]) {
      if (n - i >= 32)
        for (int j = 0; j < 32; ++j) x[i + j] = word & word_bit[j] ? T(0) : x[i + j];
      else
        for (int j = 0; j < n - i; ++j) x[i + j] = word & word_bit[j] ? T(0) : x[i + j];
    }
}

void zero(void* x, int64_t size, int64_t n, const uint32_t* bits) {
  if (size == 4) zero_elements(static_cast<uint32_t*>(x), n, bits);
  else if (size == 2) zero_elements(static_cast<uint16_t*>(x), n, bits);
  else zero_elements(static_cast<uint64_t*>(x), n, bits);
}

uint32_t pack(const int32_t* x, int64_t n) {
  if (n == 32) return not_above(x, -1);
  uint32_t word = 0;
  for (int j = 0; j < n; ++j) word |= x[j] & word_bit[j];
  return word;
}

// Row j of `to` gets the j-th entry of every group: then one comparison serves as many groups as a vector holds.
template <class M>
FUSEOPT_INLINE void gather(const int32_t* __restrict from, int64_t groups, int64_t columns, M m, int32_t* __restrict to) {
  const int64_t count = groups * columns;
  if (columns == 1)
    for (int64_t g = 0; g < groups; ++g)
      for (int j = 0; j < m; ++j) to[j * count + g] = from[g * m + j];
  else
    for (int64_t g = 0; g < groups; ++g)
      for (int j = 0; j < m; ++j)
        for (int64_t c = 0; c < columns; ++c) to[j * count + g * columns + c] = from[(g * m + j) * columns + c];
}

template <class M>
FUSEOPT_INLINE void scatter(const int32_t* __restrict from, int64_t groups, int64_t columns, M m, int32_t* __restrict to) {
  const int64_t count = groups * columns;
  if (columns == 1)
    for (int64_t g = 0; g < groups; ++g)
      for (int j = 0; j < m; ++j) to[g * m + j] = from[j * count + g];
  else
    for (int64_t g = 0; g < groups; ++g)
      for (int j = 0; j < m; ++j)
        for (int64_t c = 0; c < columns; ++c) to[(g * m + j) * columns + c] = from[j * count + g * columns + c];
}

struct Four {
  FUSEOPT_INLINE operator int() const { return 4; }
};

// Marks the entries that n others of their group come before.
FUSEOPT_INLINE void mark(const int32_t* __restrict entry, int64_t count, int m, int n, int32_t* __restrict chosen) {
  for (int j = 0; j < m; ++j) {
    const int32_t* __restrict own = entry + j * count;
    int32_t* __restrict before = chosen + j * count;
    for (int64_t k = 0; k < count; ++k) before[k] = 0;
    for (int i = 0; i < j; ++i)
      for (int64_t k = 0; k < count; ++k) before[k] += entry[i * count + k] >= own[k];
    for (int i = j + 1; i < m; ++i)
      for (int64_t k = 0; k < count; ++k) before[k] += entry[i * count + k] > own[k];
    for (int64_t k = 0; k < count; ++k) before[k] = before[k] >= n ? -1 : 0;
  }
}

// The same with all entries of a group in registers.
FUSEOPT_INLINE void mark(const int32_t* __restrict entry, int64_t count, Four, int n, int32_t* __restrict chosen) {
  for (int64_t k = 0; k < count; ++k) {
    const int32_t a = entry[k], b = entry[count + k], c = entry[2 * count + k], d = entry[3 * count + k];
    chosen[k] = (b > a) + (c > a) + (d > a) >= n ? -1 : 0;
    chosen[count + k] = (a >= b) + (c > b) + (d > b) >= n ? -1 : 0;
    chosen[2 * count + k] = (a >= c) + (b >= c) + (d > c) >= n ? -1 : 0;
    chosen[3 * count + k] = (a >= d) + (b >= d) + (c >= d) >= n ? -1 : 0;
  }
}

template <class M>
FUSEOPT_INLINE void choose(const int32_t* key, int64_t groups, int64_t columns, M m, int n, int32_t* work, int32_t* out) {
  const int64_t count = groups * columns;
  const int32_t* __restrict entry = key;
  if (groups > 1) gather(key, groups, columns, m, work), entry = work;
  int32_t* __restrict chosen = groups > 1 ? work + m * count : out;
  mark(entry, count, m, n, chosen);
  if (groups > 1) scatter(chosen, groups, columns, m, out);
}

void beyond(const int32_t* key, int64_t groups, int64_t columns, int m, int n, int32_t* work, int32_t* out) {
  choose(key, groups, columns, m, n, work, out);
}

void beyond_of_four(const int32_t* key, int64_t groups, int64_t columns, int, int n, int32_t* work, int32_t* out) {
  choose(key, groups, columns, Four(), n, work, out);
}

template <class S>
double square(const void* row, int64_t n, double* __restrict work) {
  const auto* x = static_cast<const typename S::raw*>(row);
  int64_t half = (n + 1) / 2;
  for (int64_t i = 0; i < n - half; ++i) {
    const double a = double(S::load(x[i])), b = double(S::load(x[half + i]));
    work[i] = a * a + b * b;
  }
  if (2 * half > n) work[half - 1] = double(S::load(x[half - 1])) * double(S::load(x[half - 1]));
  for (; half > 1; half = (half + 1) / 2) {
    const int64_t rest = (half + 1) / 2;
#pragma GCC ivdep
    for (int64_t i = rest; i < half; ++i) work[i - rest] += work[i];
  }
  return work[0];
}

#define FUSEOPT_EACH(function) {function<F32>, function<F64>, function<BF16>, function<F16>}
#define FUSEOPT_STRING(x) #x
#define FUSEOPT_NAME(x) FUSEOPT_STRING(x)

constexpr SelectLoops select_table = {
    FUSEOPT_NAME(FUSEOPT_ISA), FUSEOPT_EACH(keys), compare, put, zero, pack, {beyond, beyond_of_four}, FUSEOPT_EACH(square),
};

}  // namespace FUSEOPT_ISA
}  // namespace fuseopt
