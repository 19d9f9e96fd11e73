#include "select.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "prune_entries.h"

namespace fuseopt {
namespace {

constexpr int64_t kTileWords = kTile / 32;
constexpr int64_t kSample = 2;  // words of a block: one in 64

// The candidates of a span, as bits.
void candidates(const Span& a, int64_t words, uint32_t* free) {
  for (int64_t w = 0; w < words; ++w) free[w] = ~a.pruned[w];
  for (int64_t w = 0; w < words && a.freeze && a.keep; ++w) free[w] &= a.keep[w];
  if (a.n % 32) free[words - 1] &= (1u << a.n % 32) - 1;
}

// Calls fn(first word of the tile in its block, words, keys, candidates' bits) for every tile of a block.
template <class Fn>
void for_each_tile(const BlockView& view, const Fn& fn) {
  const SelectLoops& loops = select_loops();
  alignas(64) int32_t key[kTile];
  uint32_t free[kTileWords];
  for (int64_t begin = 0; begin < view.n; begin += kTile) {
    const Tile tile(view, begin);
    const int64_t words = (tile.span.n + 31) / 32;
    candidates(tile.span, words, free);
    loops.keys[view.t.storage](tile.span.p, tile.span.n, 0, key);
    fn(begin / 32, words, key, free);
  }
}

// Counts (key - first) >> shift for the candidates of a word.
void add_digits(const int32_t* key, uint32_t free, int32_t first, int shift, int64_t* counts) {
  if (free == ~0u)
#pragma GCC unroll 16
    for (int j = 0; j < 32; ++j) ++counts[(key[j] - first) >> shift];
  else
    for (; free; free &= free - 1) ++counts[(key[__builtin_ctz(free)] - first) >> shift];
}

// A part of block b at a place that looks like chance, so that no pattern of the weights is met at each.
void narrow(BlockView* view, int b) {
  const int64_t words = view->n / 32, skipped = words > kSample ? 32 * (b * 2654435761u % (words - kSample)) : 0;
  view->begin += skipped, view->n = std::min(view->n - skipped, 32 * kSample);
}

// The candidates of a block whose keys are below a value, and equal to it, as bits.
struct Compared {
  uint32_t below[kBlock / 32], equal[kBlock / 32];

  Compared(const BlockView& view, uint32_t kth) {
    for_each_tile(view, [&](int64_t at, int64_t words, const int32_t* key, const uint32_t* free) {
      select_loops().compare(key, words, int32_t(kth), int32_t(kth), below + at, equal + at);
      for (int64_t w = 0; w < words; ++w) below[at + w] &= free[w], equal[at + w] &= free[w];
    });
  }
};

int64_t count_bits(const uint32_t* word, int64_t n) {
  int64_t count = 0;
  for (int64_t w = 0; 32 * w < n; ++w) count += __builtin_popcount(word[w]);
  return count;
}

// Moves the first `quota` set bits of `from` to `to`.
void move_bits(uint32_t* from, uint32_t* to, int64_t quota) {
  for (int64_t w = 0; quota > 0; ++w)
    for (; from[w] && quota > 0; from[w] &= from[w] - 1, --quota) to[w] |= from[w] & -from[w];
}

}  // namespace

int64_t count_digits(const TensorTable& table, uint32_t first, int shift, int64_t digits, bool sample, int64_t* out) {
  const int32_t last = int32_t(std::min<int64_t>(first + (digits << shift) - 1, INT32_MAX));
  const int threads = threads_for(table);
  int64_t below = 0;
#pragma omp parallel num_threads(threads) reduction(+ : below) if (threads > 1)
  {
    std::vector<int64_t> own(digits);
#pragma omp for schedule(dynamic, 4)
    for (int b = 0; b < int(table.blocks.size()); ++b) {
      BlockView view(table, table.blocks[b]);
      if (sample) narrow(&view, b);
      for_each_tile(view, [&](int64_t, int64_t words, const int32_t* key, const uint32_t* free) {
        uint32_t less[kTileWords], within[kTileWords];
        select_loops().compare(key, words, int32_t(first), last, less, within);
        int at[kTileWords], hits = 0;  // words to look at: a branch for each would mostly be mispredicted
        for (int64_t w = 0; w < words; ++w) {
          below += __builtin_popcount(less[w] & free[w]);
          within[w] &= free[w];
          at[hits] = int(w), hits += within[w] != 0;
        }
        for (int k = 0; k < hits; ++k) add_digits(key + 32 * at[k], within[at[k]], int32_t(first), shift, own.data());
      });
    }
#pragma omp critical
    std::transform(out, out + digits, own.begin(), out, std::plus<int64_t>());
  }
  return below;
}

void count_ties(const TensorTable& table, uint32_t kth, int64_t* out) {
  std::vector<int64_t> ties(table.blocks.size());
  for_each_block(table, [&](int b) {
    const BlockView view(table, table.blocks[b]);
    ties[b] = count_bits(Compared(view, kth).equal, view.n);
  });
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
    Compared found(view, kth);
    const int64_t ties = count_bits(found.equal, view.n);
    while (turn.load(std::memory_order_acquire) != b) std::this_thread::yield();
    int64_t& rest = left[shared ? 0 : table.blocks[b].tensor];
    const int64_t mine = std::min(ties, rest);
    rest -= mine;
    turn.store(b + 1, std::memory_order_release);
    move_bits(found.equal, found.below, mine);
    prune_entries(view, found.below);
  }
}

void prune_rows(const TensorTable& table, const uint32_t* const* chosen, const int64_t* rows) {
  for_each_block(table, [&](int b) {
    const BlockView view(table, table.blocks[b]);
    const int k = table.blocks[b].tensor;
    const BitMask mask{chosen[k], rows[k], view.t.n / rows[k]};
    BitWalk walk(mask, view.begin);
    uint32_t word[kBlock / 32], any = 0;
    for (int64_t w = 0; 32 * w < view.n; ++w) {
      const uint32_t live = view.n - 32 * w < 32 ? (1u << (view.n - 32 * w)) - 1 : ~0u;
      any |= word[w] = walk.next() & live & ~view.t.pruned[view.begin / 32 + w];
    }
    if (any) prune_entries(view, word);
  });
}

void square_rows(const void* p, int storage, int64_t rows, int64_t columns, double* out) {
  const int threads = pool_lost() || rows * columns < kBlock ? 1 : int(std::min<int64_t>(rows, omp_get_max_threads()));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<double> work((columns + 1) / 2);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const char* row = static_cast<const char*>(p) + r * columns * element_size(storage);
      out[r] = select_loops().square[storage](row, columns, work.data());
    }
  }
}

}  // namespace fuseopt
