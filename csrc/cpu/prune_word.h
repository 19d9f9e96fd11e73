// What pruning does to the entries that were chosen, whoever chose them.
#pragma once

#include "blocks.h"

namespace fuseopt {

constexpr uint32_t kBit[32] = {1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
                               1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
                               1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
                               1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};

// x[j] = 0 where `chosen` has bit j; 32 elements.
template <class T>
inline void zero_among_32(T* x, uint32_t chosen) {
  for (int j = 0; j < 32; ++j) x[j] = chosen & kBit[j] ? T(0) : x[j];
}

// The same for elements of `size` bytes, of which there may be fewer; few bits are looked up one by one.
inline void zero_chosen(void* at, int64_t size, int64_t n, uint32_t chosen) {
  if (n >= 32 && size == 4 && __builtin_popcount(chosen) > 4) return zero_among_32(static_cast<uint32_t*>(at), chosen);
  if (n >= 32 && size == 2 && __builtin_popcount(chosen) > 4) return zero_among_32(static_cast<uint16_t*>(at), chosen);
  for (; chosen; chosen &= chosen - 1) std::memset(static_cast<char*>(at) + __builtin_ctz(chosen) * size, 0, size);
}

// Prunes the entries `chosen` of word w of a span: sets their bits, zeroes p and every EMA, and the moments unless
// the group keeps them.
inline void prune_word(const BlockView& view, const Span& span, int64_t w, uint32_t chosen) {
  if (!chosen) return;
  span.pruned[w] |= chosen;
  const int64_t size = element_size(view.t.storage), n = span.n - 32 * w;
  const int64_t at = (static_cast<char*>(span.p) - static_cast<char*>(view.t.p)) / size - view.begin + 32 * w;
  zero_chosen(static_cast<char*>(span.p) + 32 * w * size, size, n, chosen);
  if (view.group.stage.keep_moments == 0)
    for (int k = 0; k < view.group.slots; ++k) zero_chosen(static_cast<char*>(span.slot[k]) + 32 * w * size, size, n, chosen);
  for (int e = 0; e < view.group.n_ema; ++e)
    if (view.t.ema[e]) zero_chosen(view.ema(e, at), view.ema_size(e), n, chosen);
}

}  // namespace fuseopt
