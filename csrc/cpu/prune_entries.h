// What pruning does to the entries that were chosen, whoever chose them.
#pragma once

#include "blocks.h"
#include "select_loops.h"

namespace fuseopt {

// Prunes the entries of a block whose bits are set in `chosen`, none of which is pruned yet: sets their bits, zeroes
// p and every EMA, and the moments unless the group keeps them.
inline void prune_entries(const BlockView& view, const uint32_t* chosen) {
  const Tensor& t = view.t;
  const auto zero = select_loops().zero;
  const int64_t size = element_size(t.storage), offset = view.begin * size;
  for (int64_t w = 0; 32 * w < view.n; ++w) t.pruned[view.begin / 32 + w] |= chosen[w];
  zero(static_cast<char*>(t.p) + offset, size, view.n, chosen);
  if (view.group.stage.keep_moments == 0)
    for (int k = 0; k < view.group.slots; ++k) zero(static_cast<char*>(t.slot[k]) + offset, size, view.n, chosen);
  for (int e = 0; e < view.group.n_ema; ++e)
    if (t.ema[e]) zero(view.ema(e, 0), view.ema_size(e), view.n, chosen);
}

}  // namespace fuseopt
