// The update rules. Each is a struct with
//   slots                    the number of moments it keeps per element
//   Scalars<T>               what update() needs beside p, g and the moments; plain T, rounded once
//   prepare(hyper, counter)  advances the parameter's counters and forms the scalars in double
//   update(p, g, slot, s)    the formula, on one element
// The order of `hyper`, `counter` and `slot` is that of schema.py. The formulas and their roundings are
// those of torch.optim with fused=True on the CPU, where torch has such a kernel.
#pragma once

#include <cmath>

#include "math.h"

namespace fuseopt {

constexpr int kMaxSlots = 3;
constexpr int kMaxCounters = 2;
constexpr int kMaxHyper = 6;
constexpr int kMaxScalars = 8;

struct CounterValue {  // of a 0-dim fp32 or fp64 tensor
  double value;
  bool is_double;
  // Rounded as the tensor rounds, before anything is formed of it: so torch does.
  FUSEOPT_INLINE double multiply(double by) { return value = is_double ? value * by : float(value) * float(by); }
};

// torch.lerp: m + w(g - m), written from the nearer end so that w = 1 gives g exactly.
template <class T>
FUSEOPT_INLINE T lerp(T m, T g, T w) {
  const T difference = g - m;
  const bool near_m = w < T(0.5);
  return fma(near_m ? w : w - T(1), difference, near_m ? m : g);
}

template <bool amsgrad>
struct AdamRule {
  static constexpr int slots = amsgrad ? 3 : 2;
  enum { lr, beta1, beta2, eps };
  template <class T>
  struct Scalars {
    T one_minus_beta1, beta2, one_minus_beta2, eps, minus_step_size, sqrt_bias_correction2;
  };
  static FUSEOPT_INLINE Scalars<double> prepare(const double* hyper, CounterValue* counter) {
    const double t = counter[0].value += 1;
    const double bias_correction1 = 1 - pow(hyper[beta1], t);
    const double bias_correction2 = 1 - pow(hyper[beta2], t);
    return {1 - hyper[beta1], hyper[beta2], 1 - hyper[beta2], hyper[eps],
            -(hyper[lr] / bias_correction1), std::sqrt(bias_correction2)};
  }
  template <class T>
  static FUSEOPT_INLINE void update(T& p, T g, T* slot, const Scalars<T>& s) {
    T& exp_avg = slot[0];
    T& exp_avg_sq = slot[1];
    exp_avg = lerp(exp_avg, g, s.one_minus_beta1);
    exp_avg_sq = fma(s.one_minus_beta2 * g, g, s.beta2 * exp_avg_sq);
    T second = exp_avg_sq;
    if constexpr (amsgrad) second = slot[2] = exp_avg_sq <= slot[2] ? slot[2] : exp_avg_sq;  // NaN too
    const T denom = sqrt(second) / s.sqrt_bias_correction2 + s.eps;
    p = p + s.minus_step_size * exp_avg / denom;
  }
};
using Adam = AdamRule<false>;
using AdamAmsgrad = AdamRule<true>;

struct Sgd {
  static constexpr int slots = 0;
  enum { lr };
  template <class T>
  struct Scalars {
    T minus_lr;
  };
  static FUSEOPT_INLINE Scalars<double> prepare(const double* hyper, CounterValue*) { return {-hyper[lr]}; }
  template <class T>
  static FUSEOPT_INLINE void update(T& p, T g, T*, const Scalars<T>& s) {
    p = fma(s.minus_lr, g, p);
  }
};

struct SgdMomentum {
  static constexpr int slots = 1;
  enum { lr, momentum, dampening, nesterov };
  template <class T>
  struct Scalars {
    T minus_lr, momentum, one_minus_dampening, nesterov, first;
  };
  // counter[0] is 1 where the buffer is new: it then starts as the undamped gradient.
  static FUSEOPT_INLINE Scalars<double> prepare(const double* hyper, CounterValue* counter) {
    return {-hyper[lr], hyper[momentum], 1 - hyper[dampening], hyper[nesterov], counter[0].value};
  }
  template <class T>
  static FUSEOPT_INLINE void update(T& p, T g, T* slot, const Scalars<T>& s) {
    const T next = fma(s.one_minus_dampening, g, s.momentum * slot[0]);
    const T buf = s.first != T(0) ? g : next;
    slot[0] = buf;
    p = fma(s.minus_lr, s.nesterov != T(0) ? fma(s.momentum, buf, g) : buf, p);
  }
};

struct NAdam {
  static constexpr int slots = 2;
  enum { lr, beta1, beta2, eps, momentum_decay };
  template <class T>
  struct Scalars {
    T one_minus_beta1, beta2, one_minus_beta2, eps, bias_correction2, grad_step, moment_step;
  };
  static FUSEOPT_INLINE Scalars<double> prepare(const double* hyper, CounterValue* counter) {
    const double t = counter[0].value += 1;
    const double mu = hyper[beta1] * (1 - 0.5 * pow(0.96, t * hyper[momentum_decay]));
    const double mu_next = hyper[beta1] * (1 - 0.5 * pow(0.96, (t + 1) * hyper[momentum_decay]));
    const double product = counter[1].multiply(mu);
    return {1 - hyper[beta1], hyper[beta2], 1 - hyper[beta2], hyper[eps],
            1 - pow(hyper[beta2], t),
            -hyper[lr] * (1 - mu) / (1 - product),
            -hyper[lr] * mu_next / (1 - product * mu_next)};
  }
  template <class T>
  static FUSEOPT_INLINE void update(T& p, T g, T* slot, const Scalars<T>& s) {
    T& exp_avg = slot[0];
    T& exp_avg_sq = slot[1];
    exp_avg = lerp(exp_avg, g, s.one_minus_beta1);
    exp_avg_sq = fma(s.one_minus_beta2 * g, g, s.beta2 * exp_avg_sq);
    const T denom = sqrt(exp_avg_sq / s.bias_correction2) + s.eps;
    p = p + s.grad_step * g / denom;
    p = p + s.moment_step * exp_avg / denom;
  }
};

struct Adagrad {
  static constexpr int slots = 1;
  enum { lr, lr_decay, eps };
  template <class T>
  struct Scalars {
    T minus_lr, eps;
  };
  static FUSEOPT_INLINE Scalars<double> prepare(const double* hyper, CounterValue* counter) {
    const double t = counter[0].value += 1;
    return {-(hyper[lr] / (1 + (t - 1) * hyper[lr_decay])), hyper[eps]};
  }
  template <class T>
  static FUSEOPT_INLINE void update(T& p, T g, T* slot, const Scalars<T>& s) {
    slot[0] = fma(g, g, slot[0]);
    p = p + s.minus_lr * g / (sqrt(slot[0]) + s.eps);
  }
};

struct Lion {
  static constexpr int slots = 1;
  enum { lr, beta1, beta2 };
  template <class T>
  struct Scalars {
    T minus_lr, one_minus_beta1, one_minus_beta2;
  };
  static FUSEOPT_INLINE Scalars<double> prepare(const double* hyper, CounterValue*) {
    return {-hyper[lr], 1 - hyper[beta1], 1 - hyper[beta2]};
  }
  template <class T>
  static FUSEOPT_INLINE void update(T& p, T g, T* slot, const Scalars<T>& s) {
    p = fma(s.minus_lr, sign(lerp(slot[0], g, s.one_minus_beta1)), p);
    slot[0] = lerp(slot[0], g, s.one_minus_beta2);
  }
};

// The list of rules: struct, name in schema.py.
#define FUSEOPT_RULES(X)       \
  X(Adam, "adam")              \
  X(AdamAmsgrad, "adam_amsgrad") \
  X(Sgd, "sgd")                \
  X(SgdMomentum, "sgd_momentum") \
  X(NAdam, "nadam")            \
  X(Adagrad, "adagrad")        \
  X(Lion, "lion")

#define FUSEOPT_COUNT(Rule, name) +1
constexpr int kRules = 0 FUSEOPT_RULES(FUSEOPT_COUNT);
#undef FUSEOPT_COUNT

}  // namespace fuseopt
