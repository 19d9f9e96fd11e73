#include "select.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "prune_word.h"

namespace fuseopt {
namespace {

template <class S>
void load_magnitudes(const Span& a, uint32_t* out) {
  const auto* p = static_cast<const typename S::raw*>(a.p);
  for (int64_t i = 0; i < a.n; ++i) out[i] = magnitude<S>(p[i]);
}
void (*const magnitudes[kStorages])(const Span&, uint32_t*) = {
#define FUSEOPT_MAGNITUDES(S) load_magnitudes<S>,
    FUSEOPT_STORAGES(FUSEOPT_MAGNITUDES)
#undef FUSEOPT_MAGNITUDES
};

uint32_t candidates(const Span& a, int64_t w) {
  const uint32_t live = a.n - 32 * w < 32 ? (1u << (a.n - 32 * w)) - 1 : ~0u;
  return live & ~a.pruned[w] & (a.freeze && a.keep ? a.keep[w] : ~0u);
}

// Calls fn(span, word, candidate bits, magnitudes of the word) for every word with a candidate.
template <class Fn>
void for_each_candidate_word(const BlockView& view, const Fn& fn) {
  alignas(64) uint32_t magnitude[kTile];
  for (int64_t begin = 0; begin < view.n; begin += kTile) {
    const Tile tile(view, begin);
    magnitudes[view.t.storage](tile.span, magnitude);
    for (int64_t w = 0; 32 * w < tile.span.n; ++w)
      if (const uint32_t free = candidates(tile.span, w)) fn(tile.span, w, free, magnitude + 32 * w);
  }
}

// Calls fn(j) for the set bits of a word; in a whole word without looking for them.
template <class Fn>
void for_each_bit(uint32_t word, const Fn& fn) {
  if (word == ~0u)
    for (int j = 0; j < 32; ++j) fn(j);
  else
    for (; word; word &= word - 1) fn(__builtin_ctz(word));
}

int64_t count_equal(const BlockView& view, uint32_t kth) {
  int64_t count = 0;
  for_each_candidate_word(view, [&](const Span&, int64_t, uint32_t free, const uint32_t* m) {
    for_each_bit(free, [&](int j) { count += m[j] == kth; });
  });
  return count;
}

// Prunes the candidates of a block below kth, and the first `quota` of those equal to it.
void prune_block(const BlockView& view, uint32_t kth, int64_t quota) {
  for_each_candidate_word(view, [&](const Span& span, int64_t w, uint32_t free, const uint32_t* m) {
    uint32_t below = 0, equal = 0;
    for_each_bit(free, [&](int j) {
      below |= uint32_t(m[j] < kth) << j;
      equal |= uint32_t(m[j] == kth) << j;
    });
    for (; equal && quota > 0; equal &= equal - 1, --quota) below |= equal & -equal;
    prune_word(view, span, w, below);
  });
}

}  // namespace

void count_digits(const TensorTable& table, uint32_t prefix, int shift, int width, int64_t* out) {
  const size_t digits = size_t(1) << width;
  const int threads = threads_for(table);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<int64_t> own(digits);
#pragma omp for schedule(dynamic)
    for (int b = 0; b < int(table.blocks.size()); ++b) {
      for_each_candidate_word(BlockView(table, table.blocks[b]), [&](const Span&, int64_t, uint32_t free, const uint32_t* m) {
        for_each_bit(free, [&](int j) {
          const uint64_t key = m[j];  // 64 bits wide, as a shift may be by 31
          if (key >> (shift + width) == prefix) ++own[key >> shift & (digits - 1)];
        });
      });
    }
#pragma omp critical
    std::transform(out, out + digits, own.begin(), out, std::plus<int64_t>());
  }
}

void count_ties(const TensorTable& table, uint32_t kth, int64_t* out) {
  std::vector<int64_t> ties(table.blocks.size());
  for_each_block(table, [&](int b) { ties[b] = count_equal(BlockView(table, table.blocks[b]), kth); });
  std::fill(out, out + table.tensors.size(), 0);
  for (size_t b = 0; b < ties.size(); ++b) out[table.blocks[b].tensor] += ties[b];
}

// Blocks are begun in order: one that has counted its ties waits only for those before it to do the same, and
// prunes while it is still in the cache. It yields meanwhile, as the thread that it waits for may have no processor.
void prune_up_to(const TensorTable& table, uint32_t kth, const int64_t* quota, bool shared) {
  std::vector<int64_t> left(quota, quota + (shared ? 1 : table.tensors.size()));
  std::atomic<int> turn{0};
  const int threads = threads_for(table);
#pragma omp parallel for schedule(monotonic : dynamic) num_threads(threads) if (threads > 1)
  for (int b = 0; b < int(table.blocks.size()); ++b) {
    const BlockView view(table, table.blocks[b]);
    const int64_t ties = count_equal(view, kth);
    while (turn.load(std::memory_order_acquire) != b) std::this_thread::yield();
    int64_t& rest = left[shared ? 0 : table.blocks[b].tensor];
    const int64_t mine = std::min(ties, rest);
    rest -= mine;
    turn.store(b + 1, std::memory_order_release);
    prune_block(view, kth, mine);
  }
}

}  // namespace fuseopt
