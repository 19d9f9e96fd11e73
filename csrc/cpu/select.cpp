#include "select.h"

#include <algorithm>
#include <vector>

#include "blocks.h"

namespace fuseopt {
namespace {

// |p| as fp32 has 31 bits; as integers they are ordered like the magnitudes (NaN above all).
constexpr int kLowBits = 15, kHighBits = 16;

template <class S>
void load_magnitudes(const Span& a, uint32_t* out) {
  const auto* p = static_cast<const typename S::raw*>(a.p);
  for (int64_t i = 0; i < a.n; ++i) out[i] = bit_cast<uint32_t>(float(S::load(p[i]))) & 0x7fffffffu;
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

class Selection {
 public:
  explicit Selection(const TensorTable& table) : table_(table) {}

  bool run(int64_t count) {
    if (count <= 0) return true;
    const auto high = histogram(kHighBits, [](uint32_t m) { return int64_t(m >> kLowBits); });
    const int64_t bucket = find(high, &count);
    if (bucket < 0) return false;
    const auto low = histogram(kLowBits, [bucket](uint32_t m) {
      return m >> kLowBits == bucket ? int64_t(m & ((1u << kLowBits) - 1)) : int64_t(-1);
    });
    const uint32_t kth = uint32_t(bucket << kLowBits | find(low, &count));
    prune_below(kth);
    prune_ties(kth, count);
    return true;
  }

 private:
  template <class Bucket>
  std::vector<int64_t> histogram(int bits, const Bucket& bucket) const {
    std::vector<int64_t> total(size_t(1) << bits);
#pragma omp parallel
    {
      std::vector<int64_t> own(total.size());
#pragma omp for schedule(dynamic)
      for (int b = 0; b < int(table_.blocks.size()); ++b) {
        for_each_candidate_word(BlockView(table_, table_.blocks[b]), [&](const Span&, int64_t, uint32_t free, const uint32_t* m) {
          for (; free; free &= free - 1) {
            const int64_t k = bucket(m[__builtin_ctz(free)]);
            if (k >= 0) ++own[k];
          }
        });
      }
#pragma omp critical
      std::transform(total.begin(), total.end(), own.begin(), total.begin(), std::plus<int64_t>());
    }
    return total;
  }

  // The bucket that holds the count-th smallest; leaves in *count its rank within the bucket.
  static int64_t find(const std::vector<int64_t>& buckets, int64_t* count) {
    for (size_t k = 0; k < buckets.size(); ++k) {
      if (*count <= buckets[k]) return int64_t(k);
      *count -= buckets[k];
    }
    return -1;
  }

  // Prunes everything below the k-th and remembers in which blocks its equals lie.
  void prune_below(uint32_t kth) {
    ties_.assign(table_.blocks.size(), 0);
    for_each_block(table_, [&](int b) {
      const BlockView view(table_, table_.blocks[b]);
      for_each_candidate_word(view, [&](const Span& span, int64_t w, uint32_t free, const uint32_t* m) {
        uint32_t below = 0;
        for (; free; free &= free - 1) {
          const int j = __builtin_ctz(free);
          below |= uint32_t(m[j] < kth) << j;
          ties_[b] += m[j] == kth;
        }
        prune_word(view, span, w, below);
      });
    });
  }

  // Prunes the first `count` of the entries equal to the k-th, in the order of tensors and elements.
  void prune_ties(uint32_t kth, int64_t count) {
    for (int b = 0; count > 0 && b < int(ties_.size()); ++b) {
      if (ties_[b] == 0) continue;
      const BlockView view(table_, table_.blocks[b]);
      for_each_candidate_word(view, [&](const Span& span, int64_t w, uint32_t free, const uint32_t* m) {
        uint32_t chosen = 0;
        for (; free && count > 0; free &= free - 1) {
          const int j = __builtin_ctz(free);
          if (m[j] == kth) chosen |= 1u << j, --count;
        }
        prune_word(view, span, w, chosen);
      });
    }
  }

  void prune_word(const BlockView& view, const Span& span, int64_t w, uint32_t chosen) const {
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

  const TensorTable& table_;
  std::vector<int64_t> ties_;
};

}  // namespace

bool prune_smallest(const TensorTable& table, int64_t count) {
  return Selection(table).run(count);
}

}  // namespace fuseopt
