// The bodies of the loops in kernels.h. Included once per instruction set, after a `#pragma GCC target`
// and with FUSEOPT_ISA set to its name: everything here lies in a namespace of that name, so that the
// linker never mixes two of them. Only always_inline functions may be called.

namespace fuseopt {
namespace FUSEOPT_ISA {

// A table, not a shift: GCC turns `word >> bit & 1` as a condition into a form that it cannot vectorise.
static const uint32_t bit_table[32] = {
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,  1u << 8,  1u << 9,  1u << 10,
    1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15, 1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21,
    1u << 22, 1u << 23, 1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};
FUSEOPT_INLINE bool has(uint32_t word, int bit) { return (word & bit_table[bit]) != 0; }

constexpr int64_t kAhead = 2048;  // bytes

FUSEOPT_INLINE void prefetch_bytes(const void* at, int64_t bytes) {
  for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(static_cast<const char*>(at) + kAhead + k);
}

template <class Rule, class S, bool averaged>
struct Streams {  // typed pointers and rounded scalars of a span
  using raw = typename S::raw;
  using T = typename S::compute;  // the average that is taken along is kept in this type
  raw* __restrict__ p;
  const raw* __restrict__ g;
  raw* slot[Rule::slots > 0 ? Rule::slots : 1];
  T* ema;
  T ema_weight;
  StageScalars<T> stage;
  typename Rule::template Scalars<T> rule;

  explicit FUSEOPT_INLINE Streams(const Span& a)
      : p(static_cast<raw*>(a.p)), g(static_cast<const raw*>(a.g)), ema(static_cast<T*>(a.ema)),
        ema_weight(T(a.ema_weight)), stage(rounded<StageScalars, T>(&a.stage->inv_grad_scale)),
        rule(rounded<Rule::template Scalars, T>(a.scalars)) {
    for (int k = 0; k < Rule::slots; ++k) slot[k] = static_cast<raw*>(a.slot[k]);
  }

  template <bool masked>
  FUSEOPT_INLINE void step(int64_t i, bool keep, bool frozen, bool pruned) const {
    raw weight = p[i], moment[Rule::slots > 0 ? Rule::slots : 1];
    for (int k = 0; k < Rule::slots; ++k) moment[k] = slot[k][i];
    pruned = step_element<Rule, S, masked>(weight, g[i], moment, keep, frozen, pruned, stage, rule);
    p[i] = weight;
    for (int k = 0; k < Rule::slots; ++k) slot[k][i] = moment[k];
    if constexpr (averaged)
      ema[i] = ema_element<typename Wide<S>::type>(ema[i], S::load(weight), ema_weight, pruned, masked & frozen);
  }

  // GCC turns a select on a mask into a masked load, and those do not start the hardware prefetcher: from
  // memory, loops over masks then run at less than half the speed. So they prefetch.
  FUSEOPT_INLINE void prefetch(int64_t i) const {
    constexpr int64_t bytes = 32 * sizeof(raw);
    prefetch_bytes(p + i, bytes), prefetch_bytes(g + i, bytes);
    for (int k = 0; k < Rule::slots; ++k) prefetch_bytes(slot[k] + i, bytes);
    if constexpr (averaged) prefetch_bytes(ema + i, 32 * sizeof(T));
  }
};

template <class Rule, class S, bool averaged>
void update(const Span& a) {
  const Streams<Rule, S, averaged> s(a);
#pragma GCC ivdep
  for (int64_t i = 0; i < a.n; ++i) s.template step<false>(i, true, false, false);
}

template <class Rule, class S, bool averaged>
FUSEOPT_INLINE void update_word(const Streams<Rule, S, averaged>& s, int64_t begin, int count, uint32_t keep,
                                uint32_t pruned, bool freeze) {
  const uint32_t frozen = freeze ? ~keep : 0;  // a word of bits: GCC spells a bool out into a mask, bit by bit
#pragma GCC ivdep
  for (int j = 0; j < count; ++j) s.template step<true>(begin + j, has(keep, j), has(frozen, j), has(pruned, j));
}

template <class Rule, class S, bool averaged>
FUSEOPT_INLINE void update_even_word(const Streams<Rule, S, averaged>& s, int64_t begin, bool keep) {
#pragma GCC ivdep
  for (int j = 0; j < 32; ++j) s.template step<false>(begin + j, keep, false, false);
}

// Rows that are kept, or lose their gradient, as a whole take the loop without masks; frozen ones none.
template <class Rule, class S, bool averaged>
void update_masked(const Span& a) {
  const Streams<Rule, S, averaged> s(a);
  const int64_t words = a.n / 32;
  const int64_t ahead = kAhead / int64_t(32 * sizeof *s.p);
  const bool threshold = a.stage->prune_below > 0;
  for (int64_t w = 0; w < words; ++w) {
    if (w + ahead >= words || !a.freeze || a.keep[w + ahead]) s.prefetch(32 * w);
    if (a.freeze && a.keep[w] == 0) continue;
    const bool even = a.pruned[w] == 0 && !threshold;
    if (even && a.keep[w] == ~0u) update_even_word(s, 32 * w, true);
    else if (even && a.keep[w] == 0) update_even_word(s, 32 * w, false);
    else update_word(s, 32 * w, 32, a.keep[w], a.pruned[w], a.freeze);
  }
  if (a.n % 32) update_word(s, 32 * words, int(a.n % 32), a.keep[words], a.pruned[words], a.freeze);
}

template <class S>
void mark_pruned(const Span& a) {
  using T = typename S::compute;
  const auto* p = static_cast<const typename S::raw*>(a.p);
  const T threshold = T(a.stage->prune_below);
  for (int64_t begin = 0; begin < a.n; begin += 32) {
    const int count = a.n - begin < 32 ? int(a.n - begin) : 32;
    uint32_t below = 0;
    for (int j = 0; j < count; ++j) below |= uint32_t(abs(S::load(p[begin + j])) < threshold) << j;
    const uint32_t frozen = a.freeze ? ~a.keep[begin / 32] : 0u;
    a.pruned[begin / 32] |= below & ~frozen;  // what was pruned before it was frozen stays pruned
  }
}

template <class S, class E>
void ema(void* stream, const Span& a, double weight) {
  const auto w = typename S::compute(weight);
  auto* e = static_cast<typename E::raw*>(stream);
  const auto* p = static_cast<const typename S::raw*>(a.p);
  for (int64_t begin = 0; begin < a.n; begin += 32) {
    const int count = a.n - begin < 32 ? int(a.n - begin) : 32;
    const uint32_t pruned = a.pruned ? a.pruned[begin / 32] : 0;
    const uint32_t frozen = a.freeze && a.keep ? ~a.keep[begin / 32] : 0;
    prefetch_bytes(e + begin, 32 * sizeof *e);
#pragma GCC ivdep
    for (int j = 0; j < count; ++j)
      e[begin + j] = ema_element<E>(e[begin + j], S::load(p[begin + j]), w, has(pruned, j), has(frozen, j));
  }
}

FUSEOPT_INLINE uint32_t free_word(const Span& a, int64_t w) {  // what the step may change
  return (a.keep ? a.keep[w] : ~0u) & ~(a.pruned ? a.pruned[w] : 0u);
}

template <class T>
FUSEOPT_INLINE void add_square(double& sum, T x) {
  sum += double(x) * double(x);
}

template <class S>
void grad_norm(const Span& a, double* __restrict__ lanes) {
  using T = typename S::compute;
  const auto* g = static_cast<const typename S::raw*>(a.g);
  const auto s = rounded<StageScalars, T>(&a.stage->inv_grad_scale);
  const bool masked = a.keep || a.pruned;
  for (int64_t begin = 0; begin < a.n; begin += kLanes) {
    const int count = a.n - begin < kLanes ? int(a.n - begin) : kLanes;
    if (!masked) {
#pragma GCC ivdep
      for (int j = 0; j < count; ++j) add_square(lanes[j], effective_grad(S::load(g[begin + j]), true, s));
      continue;
    }
    for (int first = 0; first < count; first += 32) {
      const uint32_t keep = free_word(a, (begin + first) / 32);
      const int length = count - first < 32 ? count - first : 32;
      prefetch_bytes(g + begin + first, 32 * sizeof *g);
#pragma GCC ivdep
      for (int j = 0; j < length; ++j)
        add_square(lanes[first + j], effective_grad(S::load(g[begin + first + j]), has(keep, j), s));
    }
  }
}

template <class S>
void statistics(const void* previous, const Span& a, Sums* sums) {
  using T = typename S::compute;
  const auto* before = static_cast<const typename S::raw*>(previous);
  const auto* p = static_cast<const typename S::raw*>(a.p);
  const auto* g = static_cast<const typename S::raw*>(a.g);
  auto s = rounded<StageScalars, T>(&a.stage->inv_grad_scale);
  s.clip = T(1);  // the norm is of the gradient before clipping
  int64_t zeros = 0, nonfinite = 0;
  for (int64_t begin = 0; begin < a.n; begin += 32) {
    const uint32_t keep = free_word(a, begin / 32);
    const int64_t lane = begin % kLanes;
    const int count = a.n - begin < 32 ? int(a.n - begin) : 32;
#pragma GCC ivdep
    for (int j = 0; j < count; ++j) {
      const double x = double(effective_grad(S::load(g[begin + j]), has(keep, j), s));
      const double w = double(S::load(p[begin + j]));
      const double d = w - double(S::load(before[begin + j]));
      sums->grad[lane + j] += x * x;
      sums->param[lane + j] += w * w;
      sums->update[lane + j] += d * d;
      zeros += w == 0;
      nonfinite += !(x - x == 0);
    }
  }
  sums->zeros += zeros;
  sums->nonfinite += nonfinite;
}

#define FUSEOPT_ROW(Rule, function, averaged) \
  {function<Rule, F32, averaged>, function<Rule, F64, averaged>, function<Rule, BF16, averaged>, function<Rule, F16, averaged>},
#define FUSEOPT_UPDATE(Rule, name) FUSEOPT_ROW(Rule, update, false)
#define FUSEOPT_UPDATE_EMA(Rule, name) FUSEOPT_ROW(Rule, update, true)
#define FUSEOPT_MASKED(Rule, name) FUSEOPT_ROW(Rule, update_masked, false)
#define FUSEOPT_MASKED_EMA(Rule, name) FUSEOPT_ROW(Rule, update_masked, true)
#define FUSEOPT_EACH(function) {function<F32>, function<F64>, function<BF16>, function<F16>}
#define FUSEOPT_STRING(x) #x
#define FUSEOPT_NAME(x) FUSEOPT_STRING(x)

constexpr Kernels table = {
    FUSEOPT_NAME(FUSEOPT_ISA),
    {{FUSEOPT_RULES(FUSEOPT_UPDATE)}, {FUSEOPT_RULES(FUSEOPT_UPDATE_EMA)}},
    {{FUSEOPT_RULES(FUSEOPT_MASKED)}, {FUSEOPT_RULES(FUSEOPT_MASKED_EMA)}},
    FUSEOPT_EACH(mark_pruned),
    {{ema<F32, F32>, ema<F64, F64>, ema<BF16, F32>, ema<F16, F32>}, {ema<F32, F32>, ema<F64, F64>, ema<BF16, BF16>, ema<F16, F16>}},
    FUSEOPT_EACH(grad_norm),
    FUSEOPT_EACH(statistics),
};

}  // namespace FUSEOPT_ISA
}  // namespace fuseopt
