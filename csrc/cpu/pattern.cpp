#include "pattern.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "prune_word.h"

namespace fuseopt {
namespace {

// Keys say who stays: in the order of |p| as fp32, but below all what is pruned and above all what is frozen.
constexpr int32_t kPruned = INT32_MIN, kFrozen = INT32_MAX;

template <class S>
void load_keys(const void* p, int64_t at, int64_t n, int32_t* key) {
  const auto* x = static_cast<const typename S::raw*>(p) + at;
  for (int64_t i = 0; i < n; ++i) key[i] = int32_t(magnitude<S>(x[i])) - 1;
}
void (*const keys_of[kStorages])(const void*, int64_t, int64_t, int32_t*) = {
#define FUSEOPT_KEYS(S) load_keys<S>,
    FUSEOPT_STORAGES(FUSEOPT_KEYS)
#undef FUSEOPT_KEYS
};

// key[j] = value where element at + j has the bit `set`; elements at .. at + n - 1.
void put(const BitMask& bits, bool set, int32_t value, int64_t at, int64_t n, int32_t* key) {
  if (n == 0) return;
  BitWalk walk(bits, at);
  for (int64_t j = 0; j < n; j += 32) {
    uint32_t word = walk.next() ^ (set ? 0u : ~0u);
    if (n - j < 32) word &= (1u << (n - j)) - 1;
    if (word && n - j >= 32)
      for (int k = 0; k < 32; ++k) key[j + k] = select(word & kBit[k], value, key[j + k]);
    else
      for (; word; word &= word - 1) key[j + __builtin_ctz(word)] = value;
  }
}

void load(const Tensor& t, int64_t at, int64_t n, int32_t* key) {
  keys_of[t.storage](t.p, at, n, key);
  if (t.keep.words && t.freeze) put(t.keep, false, kFrozen, at, n, key);
  put({t.pruned, t.n, 1}, true, kPruned, at, n, key);
}

// out = ~0 for the entries that are not among the n largest of their group: `count` groups of m entries that lie
// `step` apart, the groups side by side; or with step = 1 one after the other.
template <class M, class Step>
void choose(const int32_t* __restrict key, int64_t count, M m, Step step, int n, uint32_t* __restrict out) {
  const int64_t apart = step == 1 ? m : 1;
  for (int64_t k = 0; k < count; ++k)
    for (int j = 0; j < m; ++j) {
      const int32_t own = key[k * apart + j * step];
      int before = 0;
      for (int i = 0; i < j; ++i) before += key[k * apart + i * step] >= own;
      for (int i = j + 1; i < m; ++i) before += key[k * apart + i * step] > own;
      out[k * apart + j * step] = -uint32_t(before >= n);
    }
}

// Sets the bits at .. at + n - 1 where `chosen` is not 0. Neighbouring pieces may share a word.
void mark(const uint32_t* chosen, int64_t at, int64_t n, uint32_t* marks) {
  for (int64_t j = 0; j < n;) {
    const int first = int((at + j) & 31), bits = int(std::min<int64_t>(n - j, 32 - first));
    uint32_t word = 0;
    if (bits == 32)
      for (int k = 0; k < 32; ++k) word |= chosen[j + k] & kBit[k];
    else
      for (int k = 0; k < bits; ++k) word |= chosen[j + k] & kBit[first + k];
    if (word) __atomic_fetch_or(&marks[(at + j) >> 5], word, __ATOMIC_RELAXED);
    j += bits;
  }
}

// What a thread takes at once: some columns, of whole groups.
struct Piece {
  int64_t at;       // its first element
  int64_t entries;  // along the dimension; the last group may be short
  int64_t columns, stride;
};

template <class M>
void mark_piece(const Tensor& t, const Piece& piece, M m, int n, uint32_t* marks) {
  alignas(64) int32_t key[kTile];
  alignas(64) uint32_t chosen[kTile];
  const int64_t columns = piece.columns, whole = piece.entries / m, rest = piece.entries % m;
  const bool together = columns == piece.stride;  // in one run of memory
  const int64_t loads = together ? 1 : piece.entries, length = together ? piece.entries * columns : columns;
  for (int64_t c = 0; c < loads; ++c) load(t, piece.at + c * piece.stride, length, key + c * length);
  if (columns == 1)
    choose(key, whole, m, std::integral_constant<int, 1>(), n, chosen);
  else
    for (int64_t g = 0; g < whole; ++g) choose(key + g * m * columns, columns, m, columns, n, chosen + g * m * columns);
  const int64_t done = whole * m * columns;
  if (rest) choose(key + done, columns, int(rest), columns, n, chosen + done);
  for (int64_t c = 0; c < loads; ++c) mark(chosen + c * length, piece.at + c * piece.stride, length, marks);
}

template <class M>
void mark_all(const TensorTable& table, M m, int n, int64_t channels, int64_t stride, uint32_t* marks) {
  const Tensor& t = table.tensors[0];
  if (stride == 1 && channels % m == 0) channels = t.n;  // the groups of one run follow those of the other
  const int64_t run = channels * stride, most = std::min<int64_t>(stride, kTile / m);  // columns at once
  const int64_t entries = most < stride ? m : kTile / (m * stride) * m;               // and entries
  const int64_t along = (channels + entries - 1) / entries, across = (stride + most - 1) / most;
  const int threads = threads_for(table);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < t.n / run * along * across; ++k) {
    const int64_t column = k % across * most, entry = k / across % along * entries;
    const Piece piece{k / across / along * run + entry * stride + column, std::min(entries, channels - entry),
                      std::min(most, stride - column), stride};
    mark_piece(t, piece, m, n, marks);
  }
}

}  // namespace

void prune_n_m(const TensorTable& table, int n, int m, int64_t channels, int64_t stride) {
  std::vector<uint32_t> marks((table.tensors[0].n + 31) / 32);
  if (m == 4)
    mark_all(table, std::integral_constant<int, 4>(), n, channels, stride, marks.data());
  else
    mark_all(table, m, n, channels, stride, marks.data());
  for_each_block(table, [&](int b) {
    const BlockView view(table, table.blocks[b]);
    for (int64_t begin = 0; begin < view.n; begin += kTile) {
      const Tile tile(view, begin);
      const uint32_t* chosen = marks.data() + (view.begin + begin) / 32;
      for (int64_t w = 0; 32 * w < tile.span.n; ++w) prune_word(view, tile.span, w, chosen[w] & ~tile.span.pruned[w]);
    }
  });
}

}  // namespace fuseopt
