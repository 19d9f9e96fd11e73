// The kernels of a step, as the host sees them: what each takes, and how it is launched.
#pragma once

#include <cuda_runtime.h>

#include "../groups.h"
#include "../streams.h"
#include "rows.h"

namespace fuseopt {
namespace cuda {

enum RuleIndex {
#define FUSEOPT_INDEX(Rule, name) k##Rule,
  FUSEOPT_RULES(FUSEOPT_INDEX)
#undef FUSEOPT_INDEX
};

// Stages 1 to 12 on the tensors of the rows, which are of one rule and one storage.
struct UpdateArgs {
  Memory memory;
  int32_t rule;
  Rows rows;
};
void launch_update(int storage, const UpdateArgs& args, cudaStream_t stream);

// Into Memory::squares, for each block the sum of squares of the gradient before clipping.
struct SquaresArgs {
  Memory memory;
  Amp amp;
  double inv_grad_scale;  // where Amp has no grad_scale
  Rows rows;
};
void launch_squares(int storage, const SquaresArgs& args, cudaStream_t stream);

// Decides whether the step counts, advances counters, forms every scalar.
struct PrepareRow {
  void* counter[kMaxCounters];
  int32_t tensor, position, group;  // `group` in the groups of the launch
  uint8_t is_double[kMaxCounters];
  uint8_t unused[2];
};
constexpr int kPreparedGroups = 16, kPreparedRows = 680;
struct PrepareArgs {
  Memory memory;
  Amp amp;
  const double* given_squares;  // of the whole model's gradient; nullptr: the sum of `blocks` squares is it
  int32_t blocks;
  int32_t tensors;
  uint8_t starts;    // the first launch of its table: decides whether the step is skipped
  uint8_t advances;  // and of the whole step: then t counts it
  uint8_t clips;     // and the norm is wanted
  uint8_t unused[5];
  Group groups[kPreparedGroups];
  PrepareRow rows[kPreparedRows];
};
void launch_prepare(const PrepareArgs& args, cudaStream_t stream);

constexpr size_t kMaxParameterBytes = 32764;
static_assert(sizeof(UpdateArgs) <= kMaxParameterBytes && sizeof(SquaresArgs) <= kMaxParameterBytes &&
              sizeof(PrepareArgs) <= kMaxParameterBytes, "a kernel takes no more");

}  // namespace cuda
}  // namespace fuseopt
