// How the CPU walks a table: blocks shared among threads, tiles within a block.
#pragma once

#include "../tensor_table.h"
#include "kernels.h"
#include "threads.h"

namespace fuseopt {

// Calls fn(item) for every item of the table. Which thread does which is left open, so fn may only write
// what belongs to its blocks.
template <class Fn>
void for_each_item(const TensorTable& table, const Fn& fn) {
  const int items = int(table.items.size()) - 1;
  const int threads = threads_for(table);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int i = 0; i < items; ++i) fn(i);
}

template <class Fn>
void for_each_block(const TensorTable& table, const Fn& fn) {
  for_each_item(table, [&](int i) {
    for (int b = table.items[i]; b < table.items[i + 1]; ++b) fn(b);
  });
}

struct BlockView {
  const Tensor& t;
  const Group& group;
  int64_t begin, n;

  BlockView(const TensorTable& table, const Block& block)
      : t(table.tensors[block.tensor]), group(table.groups[t.group]), begin(block.begin), n(block.n) {}

  int64_t ema_size(int k) const { return group.ema_narrow[k] ? element_size(t.storage) : compute_size(t.storage); }

  void* ema(int k, int64_t at) const { return static_cast<char*>(t.ema[k]) + (begin + at) * ema_size(k); }

  // Whether the update takes the first average along: one of the type of the arithmetic, as it mostly is.
  bool takes_average() const { return group.n_ema > 0 && t.ema[0] && ema_size(0) == compute_size(t.storage); }
};

// A part of a block: addresses, and the bits of its masks unfolded into words.
class Tile {
 public:
  Span span;

  Tile(const BlockView& view, int64_t at, int64_t most = kTile) {
    const Tensor& t = view.t;
    const int64_t first = view.begin + at, offset = first * element_size(t.storage);
    span.n = view.n - at < most ? view.n - at : most;
    span.p = static_cast<char*>(t.p) + offset;
    span.g = static_cast<const char*>(t.g) + offset;
    for (int k = 0; k < view.group.slots; ++k) span.slot[k] = static_cast<char*>(t.slot[k]) + offset;
    span.pruned = t.pruned ? t.pruned + first / 32 : nullptr;
    span.freeze = t.freeze;
    span.stage = &view.group.stage;
    if (!t.pruned && span.stage->prune_below > 0) {  // the threshold is for prunable parameters alone
      stage_ = view.group.stage;
      stage_.prune_below = 0;
      span.stage = &stage_;
    }
    span.scalars = t.scalars;
    span.ema = view.takes_average() ? view.ema(0, at) : nullptr;
    span.ema_weight = view.group.ema_weight[0];
    span.keep = t.keep.words ? unfold(t.keep, first) : nullptr;
  }
  Tile(const Tile&) = delete;

  bool all_frozen() const { return none_kept_ && span.freeze; }

  // The same span with real words in place of "no mask".
  Span with_all_words() {
    Span s = span;
    const int64_t words = (span.n + 31) / 32;
    if (!s.keep) std::memset(keep_, 0xff, words * 4), s.keep = keep_;
    if (!s.pruned) std::memset(no_prune_, 0, words * 4), s.pruned = no_prune_;
    return s;
  }

 private:
  // nullptr where every element is kept.
  const uint32_t* unfold(const BitMask& mask, int64_t first) {
    uint32_t every = ~0u, any = 0;
    BitWalk walk(mask, first);
    for (int64_t i = 0, w = 0; i < span.n; i += 32, ++w) {
      const uint32_t word = walk.next();
      const uint32_t live = span.n - i < 32 ? (1u << (span.n - i)) - 1 : ~0u;
      every &= word | ~live;
      any |= word & live;
      keep_[w] = word;
    }
    none_kept_ = any == 0;
    return every == ~0u ? nullptr : keep_;
  }

  StageScalars<double> stage_;
  uint32_t keep_[kTile / 32], no_prune_[kTile / 32];
  bool none_kept_ = false;
};

}  // namespace fuseopt
