// What pruning does to the entries that were chosen, whoever chose them.
#pragma once

#include "blocks.h"

namespace fuseopt {

// Prunes the entries `chosen` of word w of a span: sets their bits, zeroes p and every EMA, and the moments unless
// the group keeps them.
inline void prune_word(const BlockView& view, const Span& span, int64_t w, uint32_t chosen) {
  if (!chosen) return;
  span.pruned[w] |= chosen;
  const int64_t size = element_size(view.t.storage);
  const int64_t at = (static_cast<char*>(span.p) - static_cast<char*>(view.t.p)) / size - view.begin + 32 * w;
  for (; chosen; chosen &= chosen - 1) {
    const int64_t j = __builtin_ctz(chosen);
    std::memset(static_cast<char*>(span.p) + (32 * w + j) * size, 0, size);
    if (view.group.stage.keep_moments == 0)
      for (int k = 0; k < view.group.slots; ++k) std::memset(static_cast<char*>(span.slot[k]) + (32 * w + j) * size, 0, size);
    for (int e = 0; e < view.group.n_ema; ++e) std::memset(view.ema(e, at + j), 0, ema_size(view.t.storage));
  }
}

}  // namespace fuseopt
