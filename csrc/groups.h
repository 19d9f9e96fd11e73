// What the parameters of a group share; plain numbers, so that a kernel takes it by value.
#pragma once

#include "averages.h"
#include "pipeline.h"

namespace fuseopt {

// What a group's scalars are formed of where that is done on the GPU, which alone knows whether the step counts.
struct DeviceOptions {
  const void* lr = nullptr;  // on the device, fp32 or fp64; nullptr: hyper[0] is it
  bool lr_is_double = false;
  double l2, l1;    // weight_decay and l1
  bool decoupled;
  double prune_from;  // stage.prune_below holds from this step on
  Average ema[kMaxEma];
};

struct Group {  // what all parameters of a param_group share
  int rule, slots, counters, n_ema;
  double hyper[kMaxHyper];
  StageScalars<double> stage;
  double max_grad_norm;  // 0: no clipping
  double ema_weight[kMaxEma];  // of the averages that the pass works on
  bool ema_narrow[kMaxEma];    // kept in the parameter's type, not in that of the arithmetic
  DeviceOptions device;
};

}  // namespace fuseopt
