// The bodies of the loops in kernels.h. Included once per instruction set, after a `#pragma GCC target`
// and with FUSEOPT_ISA set to its name: everything here lies in a namespace of that name, so that the
// linker never mixes two of them. Only always_inline functions may be called.
#include "units_impl.h"
#include "sums_impl.h"

namespace fuseopt {
namespace FUSEOPT_ISA {

// Stage 11. What is frozen keeps its bits, NaN too: whether a loop runs over it or leaves it out must not show. The
// first update of an average, which reaches frozen entries, is seen to by backends._give_first_values.
template <class E>
FUSEOPT_INLINE typename E::raw averaged_unless(Flag<typename E::raw> frozen, typename E::raw ema,
                                               typename E::compute p, typename E::compute weight,
                                               Flag<typename E::raw> pruned) {
  return select(frozen, ema, ema_element<E>(ema, p, weight, pruned, false));
}

template <class Rule, class S, bool averaged>
struct Streams {  // typed pointers and rounded scalars of a span
  using U = Unit<S>;
  using word = typename U::word;
  using Element = typename U::Element;
  using raw = typename Element::raw;
  using T = typename S::compute;  // the average that is taken along is kept in this type
  static constexpr int slots = Rule::slots > 0 ? Rule::slots : 1;
  word* __restrict__ p;
  const word* __restrict__ g;
  word* slot[slots];
  T* ema;
  T ema_weight;
  StageScalars<T> stage;
  typename Rule::template Scalars<T> rule;

  explicit FUSEOPT_INLINE Streams(const Span& a)
      : p(static_cast<word*>(a.p)), g(static_cast<const word*>(a.g)), ema(static_cast<T*>(a.ema)),
        ema_weight(T(a.ema_weight)), stage(rounded<StageScalars, T>(&a.stage->inv_grad_scale)),
        rule(rounded<Rule::template Scalars, T>(a.scalars)) {
    for (int k = 0; k < Rule::slots; ++k) slot[k] = static_cast<word*>(a.slot[k]);
  }

  // Unit i; masked: `lanes` of its chunk, in which it is number `lane`.
  template <bool masked, bool penalized, bool pruning>
  FUSEOPT_INLINE void step(int64_t i, const Lanes<S>* lanes = nullptr, int64_t lane = 0, bool freeze = false) const {
    const word weights = p[i], grads = g[i];
    word moments[slots];
    raw weight[U::elements], moment[slots][U::elements];
    for (int k = 0; k < Rule::slots; ++k) moments[k] = slot[k][i];
#pragma GCC unroll 2
    for (int j = 0; j < U::elements; ++j) {
      raw own[slots];
      weight[j] = U::get(weights, j);
      for (int k = 0; k < Rule::slots; ++k) own[k] = U::get(moments[k], j);
      Flag<raw> keep = true, gone = false;
      if constexpr (masked) keep = Flag<raw>::of(lanes->keep[j][lane]), gone = Flag<raw>::of(lanes->pruned[j][lane]);
      const Flag<raw> frozen = Flag<raw>(freeze) & !keep;
      const Flag<raw> pruned = step_element<Rule, Element, masked, penalized, pruning>(
          weight[j], U::get(grads, j), own, keep, frozen, gone, stage, rule);
      for (int k = 0; k < Rule::slots; ++k) moment[k][j] = own[k];
      if constexpr (averaged) {
        T& e = ema[U::elements * i + j];
        e = averaged_unless<typename Wide<S>::type>(frozen, e, Element::load(weight[j]), ema_weight, pruned);
      }
    }
    p[i] = U::put(weight);
    for (int k = 0; k < Rule::slots; ++k) slot[k][i] = U::put(moment[k]);
  }

  // GCC turns a select on a mask into a masked load, and those do not start the hardware prefetcher: from
  // memory, loops over masks then run at less than half the speed. So they prefetch.
  FUSEOPT_INLINE void prefetch(int64_t i, int64_t units) const {
    const int64_t bytes = units * int64_t(sizeof(word));
    prefetch_bytes(p + i, bytes), prefetch_bytes(g + i, bytes);
    for (int k = 0; k < Rule::slots; ++k) prefetch_bytes(slot[k] + i, bytes);
    if constexpr (averaged) prefetch_bytes(ema + U::elements * i, units * U::elements * int64_t(sizeof(T)));
  }
};

// Runs `loop` on the last element, where two make a unit and it has none beside it: on a copy that has.
template <class Rule, class S>
FUSEOPT_INLINE void update_half_unit(const Span& a, void (*loop)(const Span&)) {
  constexpr int64_t size = sizeof(typename S::raw);
  const int64_t last = a.n - 1;
  const auto at = [&](const void* stream) { return static_cast<const char*>(stream) + last * size; };
  uint32_t p = 0, g = 0, slot[kMaxSlots] = {}, keep = 0, pruned = 0;
  typename S::compute ema[2] = {};
  Span one = a;
  one.n = 2, one.p = &p, one.g = &g, one.keep = &keep, one.pruned = &pruned, one.ema = ema;
  std::memcpy(&p, at(a.p), size), std::memcpy(&g, at(a.g), size);
  for (int k = 0; k < Rule::slots; ++k) std::memcpy(&slot[k], at(a.slot[k]), size), one.slot[k] = &slot[k];
  if (a.keep) keep = a.keep[last / 32] >> (last % 32) & 1u;
  if (a.pruned) pruned = a.pruned[last / 32] >> (last % 32);
  auto* average = static_cast<typename S::compute*>(a.ema);
  if (average) ema[0] = average[last];
  loop(one);
  std::memcpy(const_cast<char*>(at(a.p)), &p, size);
  for (int k = 0; k < Rule::slots; ++k) std::memcpy(const_cast<char*>(at(a.slot[k])), &slot[k], size);
  if (average) average[last] = ema[0];
}

template <bool penalized, class Rule, class S, bool averaged>
FUSEOPT_INLINE void update_units(const Streams<Rule, S, averaged>& s, int64_t units) {
#pragma GCC ivdep
  for (int64_t i = 0; i < units; ++i) s.template step<false, penalized, false>(i);
}

template <class Rule, class S, bool averaged>
void update(const Span& a) {
  const Streams<Rule, S, averaged> s(a);
  const int64_t units = a.n / Unit<S>::elements;
  if (penalizes(s.stage)) update_units<true>(s, units);
  else update_units<false>(s, units);
  if (a.n % Unit<S>::elements) update_half_unit<Rule, S>(a, update<Rule, S, averaged>);
}

template <bool penalized, bool pruning, class Rule, class S, bool averaged>
FUSEOPT_INLINE void update_chunk(const Streams<Rule, S, averaged>& s, int64_t first, int64_t units,
                                 const Lanes<S>& lanes, bool freeze) {
#pragma GCC ivdep
  for (int64_t i = 0; i < units; ++i) s.template step<true, penalized, pruning>(first + i, &lanes, i, freeze);
}

template <class Rule, class S, bool averaged>
void update_masked(const Span& a) {
  using U = Unit<S>;
  const Streams<Rule, S, averaged> s(a);
  const bool penalized = penalizes(s.stage), pruning = prunes(s.stage);
  Lanes<S> lanes;
  for (int64_t begin = 0; begin < a.n; begin += kChunk) {
    const int64_t n = a.n - begin < kChunk ? a.n - begin : kChunk, units = n / U::elements;
    const bool any = lanes.spread(a.keep + begin / 32, a.pruned + begin / 32, (n + 31) / 32);
    if (a.freeze && !any) continue;
    s.prefetch(begin / U::elements, units);
    if (penalized) update_chunk<true, true>(s, begin / U::elements, units, lanes, a.freeze);
    else if (pruning) update_chunk<false, true>(s, begin / U::elements, units, lanes, a.freeze);
    else update_chunk<false, false>(s, begin / U::elements, units, lanes, a.freeze);
  }
  if (a.n % U::elements) update_half_unit<Rule, S>(a, update_masked<Rule, S, averaged>);
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
      e[begin + j] = averaged_unless<E>(has(frozen, j), e[begin + j], S::load(p[begin + j]), w, has(pruned, j));
  }
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
