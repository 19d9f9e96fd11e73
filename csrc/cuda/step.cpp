#include "step.h"

#include "kernels.h"
#include "launch.h"
#include "pack.h"

namespace fuseopt {
namespace cuda {
namespace {

struct Range {
  int first, last;  // tensors of the table
};

struct Launches {  // of one step on one stream
  const TensorTable& table;
  const Memory& memory;
  const Amp& amp;
  cudaStream_t stream;

  void squares() const {
    static thread_local SquaresArgs args;
    args.memory = memory, args.amp = amp;
    for (int storage = 0; storage < kStorages; ++storage) {
      const auto take = [&](const Tensor& t) {
        args.inv_grad_scale = table.groups[t.group].stage.inv_grad_scale;  // the same in all
        return t.storage == storage;
      };
      pack(table, 0, int(table.tensors.size()), false, args.rows, take, [&] { launch_squares(storage, args, stream); });
    }
  }

  // `starts`: these are the table's first tensors.
  void prepare(Range range, const double* given_squares, bool starts, bool advance) const {
    static thread_local PrepareArgs args;
    args.memory = memory, args.amp = amp, args.given_squares = given_squares;
    args.blocks = 0;
    for (const Tensor& t : table.tensors) args.blocks += int32_t(blocks_of(t));
    for (bool more = starts || range.first < range.last; more; starts = false, more = range.first < range.last) {
      args.starts = starts, args.advances = advance, args.clips = starts && clips(table);
      range.first = fill(args, range);
      launch_prepare(args, stream);
    }
  }

  void update(Range range) const {
    static thread_local UpdateArgs args;
    args.memory = memory;
    bool present[kRules][kStorages] = {};
    for (int k = range.first; k < range.last; ++k)
      present[table.groups[table.tensors[k].group].rule][table.tensors[k].storage] = true;
    for (int rule = 0; rule < kRules; ++rule)
      for (int storage = 0; storage < kStorages; ++storage) {
        if (!present[rule][storage]) continue;
        args.rule = rule;
        const auto take = [&](const Tensor& t) { return t.storage == storage && table.groups[t.group].rule == rule; };
        pack(table, range.first, range.last, true, args.rows, take, [&] { launch_update(storage, args, stream); });
      }
  }

 private:
  // As many tensors of the range as the launch takes; returns the first that it does not.
  int fill(PrepareArgs& args, Range range) const {
    int groups = 0, last_group = -1, k = range.first;
    for (args.tensors = 0; k < range.last && args.tensors < kPreparedRows; ++k) {
      const Tensor& t = table.tensors[k];
      if (t.group != last_group) {
        if (groups == kPreparedGroups) break;
        args.groups[groups++] = table.groups[t.group];
        last_group = t.group;
      }
      PrepareRow& row = args.rows[args.tensors++];
      row.tensor = k, row.position = t.position, row.group = groups - 1;
      for (int c = 0; c < kMaxCounters; ++c) {
        row.counter[c] = t.counter[c].data;
        row.is_double[c] = t.counter[c].is_double;
      }
    }
    return k;
  }
};

}  // namespace

void squares(const TensorTable& table, const Memory& memory, const Amp& amp, cudaStream_t stream) {
  const OnDevice on(table.device);
  Launches{table, memory, amp, stream}.squares();
}

void step(TensorTable& table, const Memory& memory, const Amp& amp, const double* given_squares, bool advance,
          cudaStream_t stream) {
  const OnDevice on(table.device);
  table.in_order = overlapping(table);
  const Launches launches{table, memory, amp, stream};
  const int tensors = int(table.tensors.size());
  if (clips(table) && !given_squares) launches.squares();
  if (!table.in_order) {
    launches.prepare({0, tensors}, given_squares, true, advance);
    return launches.update({0, tensors});
  }
  for (int k = 0; k < tensors; ++k) {  // those that share memory or state follow each other
    launches.prepare({k, k + 1}, given_squares, k == 0, advance);
    launches.update({k, k + 1});
  }
}

}  // namespace cuda
}  // namespace fuseopt
