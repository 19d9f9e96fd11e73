// One step over a table of tensors on a GPU, as a few launches; nothing is allocated and nothing waited for.
#pragma once

#include <cuda_runtime.h>

#include "../tensor_table.h"
#include "args.h"

namespace fuseopt {
namespace cuda {

// Into memory.squares, for each block of the table the sum of squares of the unscaled gradient over the entries that
// the step may change.
void squares(const TensorTable& table, const Memory& memory, const Amp& amp, cudaStream_t stream);

// Updates everything in the table and its counters, unless *amp.found_inf is not 0. `given_squares`: on the device,
// the square of the norm of the whole model's gradient, where processes or tables share it; nullptr: the table holds
// it all. `advance`: memory.control->t counts this step.
void step(TensorTable& table, const Memory& memory, const Amp& amp, const double* given_squares, bool advance,
          cudaStream_t stream);

// Why the driver does not load the kernels for the current GPU; empty if it does.
const char* problem();

}  // namespace cuda
}  // namespace fuseopt
