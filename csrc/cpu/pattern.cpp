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
  for (int64_t i = 0; i < n; ++i) key[i] = int32_t(bit_cast<uint32_t>(float(S::load(x[i]))) & 0x7fffffffu) - 1;
}
void (*const keys_of[kStorages])(const void*, int64_t, int64_t, int32_t*) = {
#define FUSEOPT_KEYS(S) load_keys<S>,
    FUSEOPT_STORAGES(FUSEOPT_KEYS)
#undef FUSEOPT_KEYS
};

// key[j] = value where element at + j has the bit `set`; elements at .. at + n - 1 of `total`.
void put(const BitMask& bits, bool set, int32_t value, int64_t at, int64_t n, int64_t total, int32_t* key) {
  for (int64_t j = 0; j < n; j += 32) {
    uint32_t word = bits.word(at + j, total - at - j) ^ (set ? 0u : ~0u);
    if (n - j < 32) word &= (1u << (n - j)) - 1;
    for (; word; word &= word - 1) key[j + __builtin_ctz(word)] = value;
  }
}

void load(const Tensor& t, int64_t at, int64_t n, int32_t* key) {
  keys_of[t.storage](t.p, at, n, key);
  if (t.keep.words && t.freeze) put(t.keep, false, kFrozen, at, n, t.n, key);
  put({t.pruned, t.n, 1}, true, kPruned, at, n, t.n, key);
}

// out[j * step] = 1 for the entries of a group that are not among its n largest.
template <class M>
void choose(const int32_t* key, int64_t step, M m, int n, uint8_t* out) {
  for (int j = 0; j < m; ++j) {
    int before = 0;
    for (int i = 0; i < m; ++i)
      before += i < j ? key[i * step] >= key[j * step] : key[i * step] > key[j * step];
    out[j * step] = before >= n;
  }
}

// Sets the bits at .. at + n - 1 that have a 1 in `chosen`. Neighbouring pieces may share a word.
void mark(const uint8_t* chosen, int64_t at, int64_t n, uint32_t* marks) {
  for (int64_t j = 0; j < n;) {
    const int first = int((at + j) & 31);
    const int64_t end = std::min(n, j + 32 - first);
    uint32_t word = 0;
    for (int bit = first; j < end; ++j, ++bit) word |= uint32_t(chosen[j]) << bit;
    if (word) __atomic_fetch_or(&marks[(at + j - 1) >> 5], word, __ATOMIC_RELAXED);
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
  alignas(64) uint8_t chosen[kTile];
  const bool whole = piece.columns == piece.stride;  // then it is one run of memory
  const int64_t loads = whole ? 1 : piece.entries, length = whole ? piece.entries * piece.columns : piece.columns;
  for (int64_t c = 0; c < loads; ++c) load(t, piece.at + c * piece.stride, length, key + c * length);
  for (int64_t g = 0; g < piece.entries; g += m)
    for (int64_t i = g * piece.columns; i < (g + 1) * piece.columns; ++i)
      if (piece.entries - g >= m)
        choose(key + i, piece.columns, m, n, chosen + i);
      else
        choose(key + i, piece.columns, int(piece.entries - g), n, chosen + i);
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
