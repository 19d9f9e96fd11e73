// The order of the stages, written once for every compiler and device.
#pragma once

#include "rules.h"

namespace fuseopt {

// Scalars of the stages around the rule. Every one has a neutral value, so no stage needs a flag.
template <class T>
struct StageScalars {
  T inv_grad_scale;  // 1 / grad_scale; neutral 1
  T direction;       // -1 maximizes; neutral 1
  T clip;            // min(1, max_grad_norm / (norm + 1e-6)); neutral 1
  T l2, l1;          // coupled decay, added to the gradient; neutral 0
  T decay;           // 1 - lr * weight_decay, decoupled; neutral 1
  T soft_threshold;  // lr * l1, decoupled; neutral 0
  T prune_below;     // |p| < prune_below is pruned; neutral 0
  T keep_moments;    // not 0: pruned elements keep their moments; neutral 0
};
constexpr int kStageScalars = sizeof(StageScalars<double>) / sizeof(double);

FUSEOPT_INLINE double clip_factor(double max_grad_norm, double norm) {
  const double factor = max_grad_norm / (norm + 1e-6);
  return factor < 1 || factor != factor ? factor : 1;
}

// As stages/decay.py does, where lr is known on the GPU alone.
FUSEOPT_INLINE void decouple_decay(StageScalars<double>& s, double lr, double weight_decay, double l1) {
  s.decay = 1 - lr * weight_decay;
  s.soft_threshold = lr * l1;
}

// Each scalar rounded once, from double.
template <template <class> class Scalars, class T>
FUSEOPT_INLINE Scalars<T> rounded(const double* in) {
  constexpr int n = sizeof(Scalars<T>) / sizeof(T);
  static_assert(n <= kMaxScalars || n == kStageScalars, "too many scalars");
  T narrow[n];
  for (int k = 0; k < n; ++k) narrow[k] = T(in[k]);
  Scalars<T> out;
  std::memcpy(&out, narrow, sizeof out);
  return out;
}

// Stages 1 to 4: the gradient that the rule and the sums see. A masked entry is selected to zero, never
// multiplied: 0 * inf is NaN. The norm that decides s.clip is formed by this function too, with clip = 1.
template <class T>
FUSEOPT_INLINE T effective_grad(T g, Flag<T> keep, const StageScalars<T>& s) {
  g = g * (s.inv_grad_scale * s.direction);  // direction is 1 or -1: the product is exact
  g = select(keep, g, T(0));
  return g * s.clip;
}

// Whether a step asks for what few do. Neutral, these scalars still take as long as a whole rule in a loop over 16-bit
// storage, so the CPU's loops exist with them and without.
template <class T>
FUSEOPT_INLINE bool penalizes(const StageScalars<T>& s) {
  return s.l2 != T(0) || s.l1 != T(0) || s.soft_threshold != T(0);
}
template <class T>
FUSEOPT_INLINE bool prunes(const StageScalars<T>& s) {  // more than what is pruned already
  return s.prune_below > T(0) || s.keep_moments != T(0);
}

// Stages 5 to 7, before the rule: decay.
template <class T>
FUSEOPT_INLINE void decay_element(T& p, T& g, const StageScalars<T>& s) {
  g = s.l2 != T(0) ? fma(s.l2, p, g) : g;  // 0 * inf would be NaN
  const T sloped = select(s.l1 != T(0), p, T(0));
  g = sloped == T(0) ? g : g + copysign(s.l1, p);  // -0 + 0 would be +0
  p = p * s.decay;
}

// Stage 8, after it.
template <class T>
FUSEOPT_INLINE T shrink_element(T p, const StageScalars<T>& s) {
  const T magnitude = abs(p) - s.soft_threshold;
  return copysign(magnitude < T(0) ? T(0) : magnitude, p);
}

// Stages 9 (freeze) and 10 (prune) select among the raw values, so frozen entries keep their very bits.
template <class raw>
FUSEOPT_INLINE raw settle(Flag<raw> frozen, raw before, Flag<raw> zero, raw after) {
  return select(frozen, before, select(zero, raw(0), after));
}

template <class S>
FUSEOPT_INLINE bool falls_below(typename S::raw p, const StageScalars<typename S::compute>& s) {
  return abs(S::load(p)) < s.prune_below;
}

// Stages 1 to 10 on one element of storage type S: p and slot are as they lie in memory. Returns whether the element is
// pruned. (cuda/step.cu has these lines once more, on several elements at a time.)
template <class Rule, class S, bool masked, bool penalized, bool pruning, int n>
FUSEOPT_INLINE auto step_element(typename S::raw& p, typename S::raw g, typename S::raw (&slot)[n],
                                 Flag<typename S::raw> keep, Flag<typename S::raw> frozen, Flag<typename S::raw> pruned,
                                 const StageScalars<typename S::compute>& s,
                                 const typename Rule::template Scalars<typename S::compute>& r) {
  using T = typename S::compute;
  T weight = S::load(p), grad = effective_grad(S::load(g), keep, s);
  T moment[n];
  for (int k = 0; k < Rule::slots; ++k) moment[k] = S::load(slot[k]);

  if constexpr (penalized) decay_element(weight, grad, s);
  else weight = weight * s.decay;
  Rule::update(weight, grad, moment, r);
  const typename S::raw stored = S::store(penalized ? shrink_element(weight, s) : weight);

  if constexpr (!masked) frozen = pruned = false;
  const Flag<typename S::raw> prune = (!frozen) & (pruned | (pruning && masked && falls_below<S>(stored, s)));
  const Flag<typename S::raw> clear = prune & (!pruning || s.keep_moments == T(0));
  p = settle(frozen, p, prune, stored);
  for (int k = 0; k < Rule::slots; ++k) slot[k] = settle(frozen, slot[k], clear, S::store(moment[k]));
  return prune | pruned;  // what was pruned before it was frozen stays pruned
}

// Stage 11: a moving average of the stored parameter, in storage type E; exactly as sparse as the model.
// A negative weight means that this step does not update it. Then, with weight 0 and where frozen, it keeps its very
// bits. NaN is no value yet: the first update copies the parameter, whatever the weight, and nothing else writes there.
template <class E>
FUSEOPT_INLINE typename E::raw ema_element(typename E::raw ema, typename E::compute p, typename E::compute weight,
                                           Flag<typename E::raw> pruned, Flag<typename E::raw> frozen) {
  using raw = typename E::raw;
  using T = typename E::compute;
  const T old = E::load(ema);
  const bool none = old != old;
  const Flag<raw> empty = none, due = weight >= T(0), moves = weight != T(0);
  const raw moved = E::store(none ? p : fma(weight, p - old, old));
  const raw next = select(due & (empty | ((!frozen) & moves)), moved, ema);
  return select(pruned & (due | (!empty)), raw(0), next);
}

}  // namespace fuseopt
