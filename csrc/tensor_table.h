// What one step works on: every parameter with its streams, cut into blocks. Filled anew from the live
// Python objects at each step, so no address outlives the step that read it. Kept are only the memory of
// the table itself, so a steady step allocates no more than a handle for each fresh gradient, and a trail
// of addresses that are prefetched.
#pragma once

#include <utility>
#include <vector>

#include "groups.h"
#include "raw_view.h"
#include "streams.h"
#include "sums.h"

struct _object;  // PyObject

namespace fuseopt {

struct Counter {  // a 0-dim fp32 or fp64 tensor of state, such as `step`
  void* data = nullptr;
  bool is_double = false;
  double value = 0;  // what the step will write back; on a GPU it is not read
};

struct Tensor {
  Tensor() {}  // leaves unset what add() sets: zeroing it all would take longer
  int group;
  int position;  // among all parameters of the optimizer
  int storage;  // index in FUSEOPT_STORAGES
  int64_t n;    // elements; all streams lie in memory in the same order
  void* p;
  const void* g;
  void* slot[kMaxSlots];
  void* ema[kMaxEma];  // nullptr: nothing to do
  Counter counter[kMaxCounters];
  double scalars[kMaxScalars];   // Rule::Scalars<double>
  BitMask keep;                  // words == nullptr: no mask
  bool freeze = false;           // else the mask only zeroes the gradient
  bool all_frozen = false;       // it holds every entry: a step changes the counters alone
  uint32_t* pruned = nullptr;    // nullptr: nothing pruned
};

struct Block {
  int tensor;
  int32_t n;
  int64_t begin;
};

struct Problem {  // a parameter the table cannot hold as it is; Python finds out why
  int group, index;
  bool is_new;  // a plain parameter that has no state yet, and nothing else amiss
};

class TensorTable {
 public:
  explicit TensorTable(bool on_host) : on_host(on_host) {}
  TensorTable(const TensorTable&) = delete;
  const bool on_host;  // the memory of its tensors can be read here
  int device = kHost;  // where they lie
  std::vector<Group> groups;
  std::vector<Tensor> tensors;
  std::vector<Block> blocks;  // of what is all_frozen too: sums depend on their number, and a GPU does not know
  std::vector<int> items;  // blocks [items[i], items[i+1]) make one piece of work for a thread
  std::vector<Problem> problems;
  std::vector<_object*> params;  // the parameters in `tensors`
  bool sharded = false;          // whether a parameter, stepped or not, is a DTensor
  bool in_order = false;  // one tensor after the other: some share memory; see overlapping()
  using Extent = std::pair<const char*, const char*>;
  std::vector<Extent> extents;  // the memory of each parameter at the last step

  ~TensorTable() { release(); }

  // Lets go of the Python objects whose memory the last gather() read. They are held until then: while a
  // step runs without the interpreter's lock, another thread may drop a gradient.
  void release();

  // `groups`: a list of tuples as fuseopt/cpu.py makes them. `state`: the optimizer's. `grads`: a
  // dict from a parameter to (gradient to use in place of `.grad` or None, whether its moments are new, tensor
  // to use in its own place or None). After it returns, `problems` is empty or nothing may be run. Throws only if a tuple is malformed.
  // `on`: the device on which all must lie. `first`: the position of the first parameter.
  void gather(_object* groups, _object* state, _object* grads, double inv_grad_scale, int on = kHost, int first = 0);

  // Fills blocks and items; these as though what is all_frozen were no work, unless asked otherwise.
  void cut(bool all_frozen_too = false);

 private:
  enum class Grad { kRead, kNone, kUnreadable };
  Grad read_grad(_object* param, _object* given, TensorView* out);
  bool gather_one(_object* param, _object* own, _object* state, _object* replacement, _object* spec, int group, int position);
  bool add(_object* param, const TensorView& grad, _object* state, _object* spec, int group, bool fresh);
  bool add_state(Tensor* t, const TensorView& p, _object* state, _object* spec, bool fresh);
  bool read(_object* object, TensorView* out);
  void* read_stream(_object* object, const TensorView& p, int storage);
  bool read_counter(_object* object, Counter* out);
  uint32_t* read_bits(_object* object, int64_t bits);
  bool read_mask(_object* state, Tensor* t);
  std::vector<_object*> held_;    // gradients that Python knows
  std::vector<void*> references_;  // and those that it does not; see raw_grad
  Trail trail_;
  bool is_new_;  // of the parameter that gather_one() did not take: Problem::is_new
};

// Whether two parameters of the table share memory: one listed twice, or views that overlap. torch steps them
// one after the other, and so must we. The answer is kept until an address or a size changes.
bool overlapping(TensorTable& table);

bool clips(const TensorTable& table);  // whether any group does

}  // namespace fuseopt
