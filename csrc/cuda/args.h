// What the kernels are given, and the device memory that an optimizer owns for them.
#pragma once

#include "../averages.h"
#include "../pipeline.h"
#include "../sums.h"

namespace fuseopt {
namespace cuda {

// A step decides on the device whether it counts and forms its scalars there, so nothing waits for the GPU.
struct Control {
  double t;     // steps that counted so far; of this one on, from `prepare` on
  double skip;  // not 0: this step changes nothing
  double norm;  // of the gradients, where a group clips
};

// What `update` needs of a tensor beside its streams; in double, rounded where it is used.
struct TensorScalars {
  double rule[kMaxScalars];
  StageScalars<double> stage;
  double ema_weight[kMaxEma];
};

struct SumRow {  // of a block, for statistics; its order is that of stages/statistics.py
  double grad, param, update, zeros, nonfinite;
};

// Device memory, kept by the optimizer between steps; allocated by torch, before the steady steps.
struct Memory {
  Control* control;
  TensorScalars* scalars;  // one for each tensor of the table
  double* squares;         // one for each block: sums of squares of the gradient
  SumRow* sums;            // one for each block; nullptr without statistics
  float* fresh;            // by Tensor::position: not 0 where the moments are new
};

// Tensors of torch.amp.GradScaler on the device; nullptr where there is none.
struct Amp {
  const float* found_inf;
  const float* grad_scale;
};

FUSEOPT_INLINE double inv_grad_scale(const Amp& amp, double otherwise) {
  return amp.grad_scale ? 1.0 / double(*amp.grad_scale) : otherwise;
}

}  // namespace cuda
}  // namespace fuseopt
