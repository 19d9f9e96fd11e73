// Fills the rows of launches from a table.
#pragma once

#include <algorithm>

#include "../tensor_table.h"
#include "rows.h"

namespace fuseopt {
namespace cuda {

inline int64_t blocks_of(const Tensor& t) { return (t.n + kBlock - 1) / kBlock; }

inline void set_row(Rows& rows, const Tensor& t, const Group& group, int tensor, int64_t table_block) {
  uint64_t* word = rows.word + rows.count * rows.width;
  Head head{t.n, t.p, t.g, rows.blocks, tensor, int32_t(table_block), 0, t.freeze, 0, 0};
  for (int k = 0; k < rows.averages && k < group.n_ema; ++k) head.narrow |= group.ema_narrow[k] << k;
  uint64_t* const first = word;
  word += kHeadWords;
  for (int k = 0; k < rows.slots; ++k) *word++ = reinterpret_cast<uint64_t>(k < group.slots ? t.slot[k] : nullptr);
  for (int k = 0; k < rows.averages; ++k) *word++ = reinterpret_cast<uint64_t>(k < group.n_ema ? t.ema[k] : nullptr);
  uint64_t all = reinterpret_cast<uint64_t>(t.p) | reinterpret_cast<uint64_t>(t.g);
  for (const uint64_t* at = first + kHeadWords; at < word; ++at) all |= *at;
  head.aligned = all % 16 == 0;
  std::memcpy(first, &head, sizeof head);
  const Masks masks{t.keep.words, t.keep.period, t.keep.inner, t.pruned};
  if (rows.masked) std::memcpy(word, &masks, sizeof masks);
  ++rows.count, rows.blocks += int32_t(blocks_of(t));
}

// Calls run() with `rows` filled, as often as it takes for all tensors k in [first, last) that have entries and for
// which take(tensor) holds. `streams`: with the addresses of moments and averages.
template <class Take, class Run>
void pack(const TensorTable& table, int first, int last, bool streams, Rows& rows, const Take& take, const Run& run) {
  rows.count = rows.slots = rows.averages = rows.masked = rows.blocks = 0;
  const auto taken = [&](int k) { return k >= first && table.tensors[k].n > 0 && take(table.tensors[k]); };
  for (int k = first; k < last; ++k) {
    if (!taken(k)) continue;
    const Tensor& t = table.tensors[k];
    const Group& group = table.groups[t.group];
    rows.masked |= t.keep.words || t.pruned;
    if (streams) rows.slots = std::max(rows.slots, group.slots), rows.averages = std::max(rows.averages, group.n_ema);
  }
  rows.width = kHeadWords + rows.slots + rows.averages + (rows.masked ? kMaskWords : 0);
  const int most = int(sizeof rows.word / sizeof *rows.word) / rows.width;
  int64_t table_block = 0;
  for (int k = 0; k < last; table_block += blocks_of(table.tensors[k++])) {
    if (!taken(k)) continue;
    if (rows.count == most) run(), rows.count = rows.blocks = 0;
    set_row(rows, table.tensors[k], table.groups[table.tensors[k].group], k, table_block);
  }
  if (rows.count) run();
}

}  // namespace cuda
}  // namespace fuseopt
