// One step over a table: the norm if anything clips, the scalars, the pass.
#pragma once

#include "../tensor_table.h"

namespace fuseopt {

struct Statistics {
  double grad_norm = 0, param_norm = 0, update_norm = 0;
  int64_t zeros = 0, nonfinite = 0;
};

// Updates everything in the table and its counters. `statistics` may be null.
void step(TensorTable& table, Statistics* statistics);

}  // namespace fuseopt
