#include "select.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "prune_entries.h"

namespace fuseopt {
namespace {

constexpr int64_t kTileWords = kTile / 32;

uint32_t candidates(const Span& a, int64_t w) {
  const uint32_t live = a.n - 32 * w < 32 ? (1u << (a.n - 32 * w)) - 1 : ~0u;
  return live & ~a.pruned[w] & (a.freeze && a.keep ? a.keep[w] : ~0u);
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
    for (int64_t w = 0; w < words; ++w) free[w] = candidates(tile.span, w);
    loops.keys[view.t.storage](tile.span.p, tile.span.n, 0, key);
    fn(begin / 32, words, key, free);
  }
}

// Counts the digits of the candidates of a word. There are two counts of each digit, 2^width apart: neighbours often
// have the same one, and an addition that need not wait for the last one to be stored is faster.
void add_digits(const int32_t* key, uint32_t free, int shift, int width, int64_t* counts) {
  const int32_t last = (1 << width) - 1;
  int64_t* other = counts + last + 1;
  if (free == ~0u) {
#pragma GCC unroll 16
    for (int j = 0; j < 32; j += 2) {
      ++counts[key[j] >> shift & last];
      ++other[key[j + 1] >> shift & last];
    }
  } else {
    for (; free; free &= free - 1) ++counts[key[__builtin_ctz(free)] >> shift & last];
  }
}

// The candidates of a block in whose keys `key >> shift` is below a value, and equal to it, as bits.
struct Compared {
  uint32_t below[kBlock / 32], equal[kBlock / 32];

  Compared(const BlockView& view, uint32_t kth) {
    for_each_tile(view, [&](int64_t at, int64_t words, const int32_t* key, const uint32_t* free) {
      select_loops().compare(key, words, 0, int32_t(kth), below + at, equal + at);
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

void count_digits(const TensorTable& table, uint32_t prefix, int shift, int width, int64_t* out) {
  const size_t digits = size_t(1) << width;
  const int threads = threads_for(table);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<int64_t> own(2 * digits);
#pragma omp for schedule(dynamic)
    for (int b = 0; b < int(table.blocks.size()); ++b) {
      for_each_tile(BlockView(table, table.blocks[b]), [&](int64_t, int64_t words, const int32_t* key, uint32_t* free) {
        uint32_t below[kTileWords], equal[kTileWords];
        if (shift + width < 31) {
          select_loops().compare(key, words, shift + width, int32_t(prefix), below, equal);
          for (int64_t w = 0; w < words; ++w) free[w] &= equal[w];
        }
        for (int64_t w = 0; w < words; ++w) add_digits(key + 32 * w, free[w], shift, width, own.data());
      });
    }
#pragma omp critical
    for (size_t d = 0; d < digits; ++d) out[d] += own[d] + own[digits + d];
  }
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
