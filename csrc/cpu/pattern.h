// Pruning to a pattern n:m: of every m entries along a dimension the n largest stay, of equal ones the first.
#pragma once

#include "../tensor_table.h"

namespace fuseopt {

// Prunes the only tensor of the table, which must have `pruned` words. `channels` entries along that dimension lie
// `stride` elements apart, so that memory is runs of channels * stride elements. A last group shorter than m keeps up
// to n. Frozen entries stay, pruned ones stay pruned, and both count.
void prune_n_m(const TensorTable& table, int n, int m, int64_t channels, int64_t stride);

}  // namespace fuseopt
