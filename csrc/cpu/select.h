// Pruning to an exact count, in the pieces that fuseopt/select.py puts together: between them, processes
// that share the weights add up what they counted. All take a table whose tensors have `pruned` words.
// A candidate is an entry neither frozen nor pruned; its magnitude |p| is that of p as fp32, and its key the
// bits of that, which are ordered like the magnitudes (NaN above all).
#pragma once

#include "../tensor_table.h"

namespace fuseopt {

// Adds to out[d] the candidates whose key lies d * 2^shift .. (d + 1) * 2^shift - 1 above `first`, for d < digits;
// returns how many lie below `first`. sample: looks at a small part of them, the same at each call.
int64_t count_digits(const TensorTable& table, uint32_t first, int shift, int64_t digits, bool sample, int64_t* out);

// out[i]: how many candidates of tensor i have the key kth.
void count_ties(const TensorTable& table, uint32_t kth, int64_t* out);

// Prunes the candidates below kth and, of those equal to it, the first quota[i] of tensor i, or with `shared`
// the first quota[0] of all tensors in their order: sets their bits, zeroes p and every EMA, and the moments
// unless the group keeps them. Reads the weights once.
void prune_up_to(const TensorTable& table, uint32_t kth, const int64_t* quota, bool shared);

// Prunes likewise whole rows: those of tensor k whose bit is set in chosen[k], of rows[k] rows that lie in memory one
// after the other.
void prune_rows(const TensorTable& table, const uint32_t* const* chosen, const int64_t* rows);

// out[r] = the sum of squares in double of row r of a contiguous matrix, as patterns.squares forms it.
void square_rows(const void* p, int storage, int64_t rows, int64_t columns, double* out);

}  // namespace fuseopt
