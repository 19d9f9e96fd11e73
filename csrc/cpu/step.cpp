#include "step.h"

#include <algorithm>

#include "blocks.h"

namespace fuseopt {
namespace {

void (*const prepare[kRules])(const double* hyper, CounterValue* counter, double* scalars) = {
#define FUSEOPT_PREPARE(Rule, name)                                  \
  [](const double* hyper, CounterValue* counter, double* scalars) {  \
    const auto s = Rule::prepare(hyper, counter);                    \
    static_assert(sizeof s <= kMaxScalars * sizeof(double), name);   \
    std::memcpy(scalars, &s, sizeof s);                              \
  },
    FUSEOPT_RULES(FUSEOPT_PREPARE)
#undef FUSEOPT_PREPARE
};

// Where an earlier tensor of the table has the same state, counts on from what that one will store.
void follow_earlier(const TensorTable& table, Tensor& t) {
  const Group& group = table.groups[t.group];
  for (const Tensor* other = table.tensors.data(); other != &t; ++other)
    for (int k = 0; k < group.counters; ++k)
      if (other->counter[k].data == t.counter[k].data) t.counter[k].value = other->counter[k].value;
}

// Advances every parameter's counters in the table (not yet in its tensors) and forms its scalars.
// Neighbours mostly share a group and a step count, and then the scalars too.
void prepare_scalars(TensorTable& table) {
  const Tensor* last = nullptr;
  CounterValue last_before[kMaxCounters] = {};
  for (Tensor& t : table.tensors) {
    const Group& group = table.groups[t.group];
    if (table.in_order) follow_earlier(table, t);
    CounterValue now[kMaxCounters];
    bool same = last && last->group == t.group;
    for (int k = 0; k < kMaxCounters; ++k) {
      now[k] = {t.counter[k].value, t.counter[k].is_double};
      same = same && now[k].value == last_before[k].value && now[k].is_double == last_before[k].is_double;
    }
    if (same) {
      std::memcpy(t.scalars, last->scalars, sizeof t.scalars);
      for (int k = 0; k < kMaxCounters; ++k) t.counter[k].value = last->counter[k].value;
    } else {
      std::copy(now, now + kMaxCounters, last_before);
      prepare[group.rule](group.hyper, now, t.scalars);
      for (int k = 0; k < kMaxCounters; ++k) t.counter[k].value = now[k].value;
    }
    last = &t;
  }
}

void store_counters(const TensorTable& table) {
  for (const Tensor& t : table.tensors)
    for (int k = 0; k < table.groups[t.group].counters; ++k) {
      const Counter& c = t.counter[k];
      if (c.is_double) *static_cast<double*>(c.data) = c.value;
      else *static_cast<float*>(c.data) = float(c.value);
    }
}

// The sum of squares of each block's gradient.
const std::vector<double>& block_squares(const TensorTable& table) {
  static thread_local std::vector<double> sums;
  sums.assign(table.blocks.size(), 0.0);
  double* of_block = sums.data();
  for_each_block(table, [&](int b) {
    const BlockView view(table, table.blocks[b]);
    if (view.t.all_frozen) return;
    alignas(64) double lanes[kLanes] = {};
    for (int64_t begin = 0; begin < view.n; begin += kTile) {
      const Tile tile(view, begin);
      kernels().grad_norm[view.t.storage](tile.span, lanes);
    }
    of_block[b] = add_lanes(lanes, view.n);
  });
  return sums;
}

// The global L2 norm, where the table holds the whole model.
double grad_norm(const TensorTable& table) {
  return std::sqrt(add_blocks(block_squares(table)));
}

void clip(TensorTable& table, double norm) {
  for (Group& group : table.groups) group.stage.clip = 1;
  if (!clips(table)) return;
  if (norm < 0) norm = grad_norm(table);
  for (Group& group : table.groups)
    if (group.max_grad_norm > 0) group.stage.clip = clip_factor(group.max_grad_norm, norm);
}

// Every stage on one tile; what several loops share stays in the first-level cache.
void step_tile(const BlockView& view, int64_t begin, Sums* sums) {
  const Kernels& k = kernels();
  Tile tile(view, begin);
  const Span& span = tile.span;
  const int storage = view.t.storage, rule = view.group.rule;
  alignas(64) char before[kTile * sizeof(double)];
  if (sums) std::memcpy(before, span.p, span.n * element_size(storage));
  int averages_done = 0;
  if (!tile.all_frozen()) {
    const bool masked = span.keep || span.pruned, averaged = span.ema != nullptr;
    (masked ? k.update_masked : k.update)[averaged][rule][storage](masked ? tile.with_all_words() : span);
    averages_done = averaged;
  }
  if (sums) k.statistics[storage](before, span, sums);  // before the bits change: it tells what was free
  if (tile.all_frozen()) return;  // a step leaves it alone
  if (span.pruned && view.group.stage.prune_below > 0) k.mark_pruned[storage](tile.with_all_words());
  for (int e = averages_done; e < view.group.n_ema; ++e)
    if (view.t.ema[e]) k.ema[view.group.ema_narrow[e]][storage](view.ema(e, begin), span, view.group.ema_weight[e]);
}

// One update loop over the whole view, where nothing else wants the data while it is in the cache.
bool step_at_once(const BlockView& view) {
  const bool averaged = view.takes_average();
  if (view.t.keep.words || view.t.pruned || view.group.n_ema > averaged) return false;
  const Tile whole(view, 0, view.n);
  kernels().update[averaged][view.group.rule][view.t.storage](whole.span);
  return true;
}

void step_block(const BlockView& view, Sums* sums) {
  for (int64_t begin = 0; begin < view.n; begin += kTile) step_tile(view, begin, sums);
}

// Asks for the start of what a block will work on: of a small tensor that is all, and no run for the hardware
// to follow.
void prefetch(const TensorTable& table, int b) {
  constexpr int64_t most = 256;
  const Block& block = table.blocks[b];
  if (block.begin > 0) return;
  const Tensor& t = table.tensors[block.tensor];
  const Group& group = table.groups[t.group];
  const int64_t bytes = std::min(most, block.n * element_size(t.storage));
  const auto fetch = [&](const void* stream) {
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(static_cast<const char*>(stream) + k);
  };
  fetch(t.p), fetch(t.g);
  for (int k = 0; k < group.slots; ++k) fetch(t.slot[k]);
  for (int k = 0; k < group.n_ema; ++k)
    if (t.ema[k]) fetch(t.ema[k]);
}

// The blocks of an item; neighbours in one tensor are taken together, so that streams run on.
void step_item(const TensorTable& table, int item) {
  for (int b = table.items[item]; b < table.items[item + 1];) {
    BlockView view(table, table.blocks[b]);
    if (b + 4 < table.items[item + 1]) prefetch(table, b + 4);
    for (++b; b < table.items[item + 1] && table.blocks[b].begin > 0; ++b) view.n += table.blocks[b].n;
    if (!view.t.all_frozen && !step_at_once(view)) step_block(view, nullptr);
  }
}

}  // namespace

void grad_squares(const TensorTable& table, double* out) {
  const std::vector<double>& sums = block_squares(table);
  std::fill(out, out + table.tensors.size(), 0.0);
  for (size_t b = 0; b < sums.size(); ++b) out[table.blocks[b].tensor] += sums[b];  // in the order of the blocks
}

void step(TensorTable& table, double norm, Statistics* statistics) {
  table.in_order = overlapping(table);
  clip(table, norm);
  prepare_scalars(table);
  if (statistics) {
    table.cut(true);  // weights are counted though they are frozen
    static thread_local std::vector<Statistics> sums;
    sums.resize(table.blocks.size());
    Statistics* out = sums.data();
    for_each_block(table, [&](int b) {
      const BlockView view(table, table.blocks[b]);
      Sums lanes{};
      step_block(view, &lanes);
      out[b] = {add_lanes(lanes.grad, view.n), add_lanes(lanes.param, view.n), add_lanes(lanes.update, view.n),
                double(lanes.zeros), double(lanes.nonfinite)};
    });
    for (size_t b = 0; b < sums.size(); ++b) {
      Statistics& of = statistics[table.blocks[b].tensor];
      of.grad += sums[b].grad, of.param += sums[b].param, of.update += sums[b].update;
      of.zeros += sums[b].zeros, of.nonfinite += sums[b].nonfinite;
    }
  } else {
    for_each_item(table, [&](int i) { step_item(table, i); });
  }
  store_counters(table);
}

}  // namespace fuseopt
