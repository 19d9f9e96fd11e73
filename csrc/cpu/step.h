// One step over a table: the norm if anything clips, the scalars, the pass.
#pragma once

#include "../tensor_table.h"

namespace fuseopt {

// Sums over one tensor: squares of the gradient that the rule saw before clipping, of the new parameter and
// of its change; zeros in the parameter and non-finite entries in the gradient.
struct Statistics {
  double grad = 0, param = 0, update = 0, zeros = 0, nonfinite = 0;
};

// out[i]: the sum of the squares of tensor i's unscaled gradient over the entries that the step may change.
void grad_squares(const TensorTable& table, double* out);

// Updates everything in the table and its counters. `norm`: of the whole model's gradient, where processes
// share it; negative: the table holds it all. `statistics`: null, or one for each tensor.
void step(TensorTable& table, double norm, Statistics* statistics);

}  // namespace fuseopt
