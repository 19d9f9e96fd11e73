// How much of the parameter an average takes at a step, where that is decided on the GPU; fuseopt/stages/ema.py
// explains the schedules and has the same formulas.
#pragma once

#include <cmath>

#include "math.h"

namespace fuseopt {

constexpr int kMaxEma = 8;

struct Average {  // the options of fuseopt.EMA as numbers
  double decay;
  double warmup;  // index in ema.WARMUPS
  double start, every;
  double gamma;  // of edm2
};
enum Warmup { kConstant, kTimm, kDiffusers, kEdm2, kSwa };

// w = 1 - d of step t, from 1; -1 where the average is not updated.
FUSEOPT_INLINE double ema_weight(const Average& a, double t) {
  const double u = (t - a.start) / a.every;  // the number of the update
  if (u < 1 || u != std::floor(u)) return -1;
  const int warmup = int(a.warmup);
  if (warmup == kSwa || (u == 1 && warmup != kConstant)) return 1 / u;
  if (warmup == kEdm2) return 1 - pow(1 - 1 / u, a.gamma + 1);
  double d = a.decay;
  if (warmup == kTimm) d = std::fmin(d, 1 - pow(u, -2.0 / 3));
  if (warmup == kDiffusers) d = std::fmin(d, u / (9 + u));
  return 1 - d;
}

}  // namespace fuseopt
