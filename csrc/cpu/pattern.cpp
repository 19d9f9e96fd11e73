#include "pattern.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "prune_entries.h"

namespace fuseopt {
namespace {

// Keys say who stays: magnitudes less 1, but below them all what is pruned and above them all what is frozen.
constexpr int32_t kPruned = -2, kFrozen = INT32_MAX;
constexpr int64_t kUnit = 1 << 14;  // entries that are chosen and then pruned, while they are in the cache

// The bits of n elements from `at` on, with `flip` = ~0 their opposite.
void read_bits(const BitMask& mask, uint32_t flip, int64_t at, int64_t n, uint32_t* bits) {
  BitWalk walk(mask, at);
  for (int64_t j = 0; j < n; j += 32) bits[j / 32] = walk.next() ^ flip;
}

void load(const Tensor& t, int64_t at, int64_t n, int32_t* key) {
  const SelectLoops& loops = select_loops();
  uint32_t bits[kTile / 32];
  if (n == 0) return;
  loops.keys[t.storage](static_cast<const char*>(t.p) + at * element_size(t.storage), n, 1, key);
  if (t.keep.words && t.freeze) {
    read_bits(t.keep, ~0u, at, n, bits);
    loops.put(bits, n, kFrozen, key);
  }
  read_bits({t.pruned, t.n, 1}, 0, at, n, bits);
  loops.put(bits, n, kPruned, key);
}

// Sets the bits at .. at + n - 1 where `chosen` is not 0.
void mark(const int32_t* chosen, int64_t at, int64_t n, uint32_t* marks) {
  for (int64_t j = 0; j < n;) {
    const int first = int((at + j) & 31), bits = int(std::min<int64_t>(n - j, 32 - first));
    marks[(at + j) >> 5] |= select_loops().pack(chosen + j, bits) << first;
    j += bits;
  }
}

// What is chosen at once: some columns, of whole groups.
struct Piece {
  int64_t at;       // its first element
  int64_t entries;  // along the dimension; the last group may be short
  int64_t columns, stride;
};

// marks: the bits from element `begin` on.
void mark_piece(const Tensor& t, const Piece& piece, int m, int n, int64_t begin, uint32_t* marks) {
  alignas(64) int32_t key[kTile], chosen[kTile], work[2 * kTile];
  const int64_t columns = piece.columns, whole = piece.entries / m, rest = piece.entries % m;
  const bool together = columns == piece.stride;  // in one run of memory
  const int64_t loads = together ? 1 : piece.entries, length = together ? piece.entries * columns : columns;
  for (int64_t c = 0; c < loads; ++c) load(t, piece.at + c * piece.stride, length, key + c * length);
  const SelectLoops& loops = select_loops();
  loops.beyond[m == 4](key, whole, columns, m, n, work, chosen);
  const int64_t done = whole * m * columns;
  if (rest) loops.beyond[0](key + done, 1, columns, int(rest), n, work, chosen + done);
  for (int64_t c = 0; c < loads; ++c) mark(chosen + c * length, piece.at + c * piece.stride - begin, length, marks);
}

// Marks `count` elements from `begin` on, which are whole runs of channels * stride.
void mark_runs(const Tensor& t, int m, int n, int64_t channels, int64_t stride, int64_t begin, int64_t count, uint32_t* marks) {
  const int64_t most = std::min<int64_t>(stride, kTile / m);             // columns at once
  const int64_t entries = most < stride ? m : kTile / (m * stride) * m;  // and entries
  for (int64_t run = 0; run < count; run += channels * stride)
    for (int64_t entry = 0; entry < channels; entry += entries)
      for (int64_t column = 0; column < stride; column += most) {
        const Piece piece{begin + run + entry * stride + column, std::min(entries, channels - entry),
                          std::min(most, stride - column), stride};
        mark_piece(t, piece, m, n, begin, marks);
      }
}

}  // namespace

void prune_n_m(const TensorTable& table, int n, int m, int64_t channels, int64_t stride) {
  const Tensor& t = table.tensors[0];
  if (stride == 1 && channels % m == 0) channels = m;  // the groups of one run follow those of the other
  const int64_t even = std::lcm(channels * stride, int64_t(32));  // whole runs, and whole words
  const int64_t unit = std::max<int64_t>(1, kUnit / even) * even;
  const int threads = threads_for(table);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<uint32_t> marks;
#pragma omp for schedule(dynamic)
    for (int64_t begin = 0; begin < t.n; begin += unit) {
      const int64_t count = std::min(unit, t.n - begin), run = stride == 1 && channels == m ? count : channels;
      marks.assign((count + 31) / 32, 0);
      mark_runs(t, m, n, run, stride, begin, count, marks.data());
      for (size_t w = 0; w < marks.size(); ++w) marks[w] &= ~t.pruned[begin / 32 + w];
      for (int64_t at = 0; at < count; at += kUnit)
        prune_entries(BlockView(table, {0, int32_t(std::min(kUnit, count - at)), begin + at}), marks.data() + at / 32);
    }
  }
}

}  // namespace fuseopt
