// Pruning to an exact count: finds the k-th smallest magnitude and prunes up to it.
#pragma once

#include "../tensor_table.h"

namespace fuseopt {

// Over a table whose tensors all have `pruned` words: of the entries that are neither frozen nor pruned,
// prunes the `count` smallest by (|p| as fp32, tensor order, index): sets their bits, zeroes p and every
// EMA, and the moments unless the group keeps them. False, with nothing changed, if there are fewer.
bool prune_smallest(const TensorTable& table, int64_t count);

}  // namespace fuseopt
