#include "tensor_table.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "tensor_view.h"

namespace fuseopt {
namespace {

// Positions in the tuple that describes a group; see fuseopt/cpu.py. The last is there for a GPU alone.
enum Spec { kParams, kRule, kSlots, kCounters, kEmas, kHyper, kStage, kMaxNorm, kDevice };

// And in the tuple of each of its averages.
enum OfAverage { kKey, kWeight, kNarrow, kPassed };

PyObject* item(PyObject* tuple, int k) { return PyTuple_GET_ITEM(tuple, k); }
int size(PyObject* tuple) { return int(PyTuple_GET_SIZE(tuple)); }

void read_doubles(PyObject* tuple, double* out, int most) {
  if (size(tuple) > most) throw std::length_error("fuseopt: more scalars than the kernels take");
  for (int k = 0; k < size(tuple); ++k) out[k] = PyFloat_AsDouble(item(tuple, k));
  if (PyErr_Occurred()) throw std::runtime_error("fuseopt: a scalar is not a number");
}

// And in the tuple for a GPU; see fuseopt/cuda.py.
enum OnDevice { kLr, kL2, kL1, kDecoupled, kPruneFrom, kSchedules };

DeviceOptions read_device_options(PyObject* tuple) {
  DeviceOptions out;
  if (TensorView lr; view(item(tuple, kLr), &lr)) out.lr = lr.data, out.lr_is_double = lr.storage == 1;
  out.l2 = PyFloat_AsDouble(item(tuple, kL2)), out.l1 = PyFloat_AsDouble(item(tuple, kL1));
  out.decoupled = item(tuple, kDecoupled) == Py_True;
  out.prune_from = PyFloat_AsDouble(item(tuple, kPruneFrom));
  PyObject* schedules = item(tuple, kSchedules);
  for (int k = 0; k < size(schedules); ++k)
    read_doubles(item(schedules, k), &out.ema[k].decay, sizeof(Average) / sizeof(double));
  return out;
}

Group read_group(PyObject* spec, double inv_grad_scale) {
  Group group{};
  group.rule = int(PyLong_AsLong(item(spec, kRule)));
  group.slots = size(item(spec, kSlots));
  group.counters = size(item(spec, kCounters));
  if (group.slots > kMaxSlots || group.counters > kMaxCounters || size(item(spec, kEmas)) > kMaxEma)
    throw std::length_error("fuseopt: more slots, counters or EMAs than the kernels take");
  group.max_grad_norm = PyFloat_AsDouble(item(spec, kMaxNorm));
  read_doubles(item(spec, kHyper), group.hyper, kMaxHyper);
  read_doubles(item(spec, kStage), &group.stage.inv_grad_scale, kStageScalars);
  for (int k = 0; k < size(item(spec, kEmas)); ++k) {
    PyObject* average = item(item(spec, kEmas), k);
    if (item(average, kPassed) != Py_True) continue;
    group.ema_weight[group.n_ema] = PyFloat_AsDouble(item(average, kWeight));
    group.ema_narrow[group.n_ema++] = item(average, kNarrow) == Py_True;
  }
  group.stage.inv_grad_scale = inv_grad_scale;
  if (size(spec) > kDevice) group.device = read_device_options(item(spec, kDevice));
  return group;
}

// Looks keys up in a dict that mostly holds them in the order asked for: then without hashing.
class Cursor {
 public:
  explicit Cursor(PyObject* dict) : dict_(dict) { advance(); }

  PyObject* find(PyObject* name) {  // borrowed, or nullptr
    if (key_ != name) return PyDict_GetItemWithError(dict_, name);
    PyObject* found = value_;
    advance();
    return found;
  }

 private:
  void advance() {
    if (!PyDict_Next(dict_, &position_, &key_, &value_)) key_ = nullptr;
  }
  PyObject *dict_, *key_ = nullptr, *value_ = nullptr;
  Py_ssize_t position_ = 0;
};

PyObject* key(const char* name) { return PyUnicode_InternFromString(name); }

bool none(const BitMask& mask) {
  const int64_t whole = mask.period / 32, rest = mask.period % 32;
  for (int64_t w = 0; w < whole; ++w)
    if (mask.words[w]) return false;
  return rest == 0 || (mask.words[whole] & ((1u << rest) - 1)) == 0;
}

// Whether the parameter's memory has the order in which its masks' bits lie; see stages/mask.py.
bool in_order_of_bits(PyObject* state, const TensorView& p) {
  static PyObject* mask_order = key("mask_order");
  PyObject* list = PyDict_GetItemWithError(state, mask_order);
  if (!list) return p.contiguous(nullptr);
  if (!PyList_Check(list) || PyList_GET_SIZE(list) != p.ndim || p.ndim > TensorView::kMaxDims) return false;
  int order[TensorView::kMaxDims];
  for (int k = 0; k < p.ndim; ++k) {
    order[k] = int(PyLong_AsLong(PyList_GET_ITEM(list, k)));
    if (order[k] < 0 || order[k] >= p.ndim) return PyErr_Clear(), false;
  }
  return p.contiguous(order);
}

template <class S>
bool all_nan(const void* ema, int64_t n) {
  const auto* e = static_cast<const typename S::raw*>(ema);
  return std::all_of(e, e + n, [](typename S::raw x) { return std::isnan(S::load(x)); });
}

// Whether an average holds no value yet: see the note in stages/ema.py. Mostly its first entry tells.
bool is_empty(const void* ema, int storage, int64_t n) {
  switch (storage) {
    case 0: return all_nan<F32>(ema, n);
    case 1: return all_nan<F64>(ema, n);
    case 2: return all_nan<BF16>(ema, n);
    default: return all_nan<F16>(ema, n);
  }
}

// Of averages that only become sparser in this step: those of a tensor in which nothing is pruned, or without a value.
void drop_idle_averages(const Group& group, Tensor* t) {
  for (int k = 0; k < group.n_ema; ++k) {
    const int storage = t->storage == 1 || group.ema_narrow[k] ? t->storage : 0;
    if (group.ema_weight[k] < 0 && (!t->pruned || is_empty(t->ema[k], storage, t->n))) t->ema[k] = nullptr;
  }
}

}  // namespace

bool TensorTable::read(PyObject* object, TensorView* out) {
  if (!object) return false;
  if (is_raw(object) && raw_view(impl_of(object), out)) return trail_.tensor(object), out->device == device;
  return view(object, out) && out->device == device && (out->data || out->count() == 0);  // no address: its storage was freed
}

// The address of a state tensor if it has the parameter's layout, else nullptr.
void* TensorTable::read_stream(PyObject* object, const TensorView& p, int storage) {
  TensorView v;
  if (!read(object, &v) || v.storage != storage || !v.same_layout(p)) return nullptr;
  static char empty;
  return p.count() == 0 ? &empty : v.data;
}

bool TensorTable::read_counter(PyObject* object, Counter* out) {
  TensorView v;
  if (!read(object, &v) || v.count() != 1 || (v.storage != 0 && v.storage != 1)) return false;
  *out = {v.data, v.storage == 1, 0};
  if (on_host) out->value = out->is_double ? *static_cast<double*>(v.data) : *static_cast<float*>(v.data);
  return true;
}

// Packed bits, as whole 32-bit words.
uint32_t* TensorTable::read_bits(PyObject* object, int64_t bits) {
  TensorView v;
  if (!view(object, &v) || v.device != device || v.storage != kBits || v.count() < (bits + 31) / 32 * 4 || !v.dense()) return nullptr;
  if (reinterpret_cast<uintptr_t>(v.data) % sizeof(uint32_t) != 0) return nullptr;
  return static_cast<uint32_t*>(v.data);
}

bool TensorTable::read_mask(PyObject* state, Tensor* t) {
  static PyObject *keep = key("mask_keep"), *period = key("mask_period"), *inner = key("mask_inner"),
                  *freeze = key("mask_freeze");
  PyObject* bits = PyDict_GetItemWithError(state, keep);
  if (!bits) return true;
  PyObject *period_value = PyDict_GetItemWithError(state, period), *inner_value = PyDict_GetItemWithError(state, inner),
           *freeze_value = PyDict_GetItemWithError(state, freeze);
  if (!period_value || !inner_value || !freeze_value) return false;
  t->keep.period = PyLong_AsLongLong(period_value);
  t->keep.inner = PyLong_AsLongLong(inner_value);
  t->freeze = PyObject_IsTrue(freeze_value) == 1;
  if (PyErr_Occurred() || t->keep.period < 1 || t->keep.inner < 1) return PyErr_Clear(), false;
  t->keep.words = read_bits(bits, t->keep.period);
  if (!t->keep.words) return false;
  t->all_frozen = t->freeze && on_host && none(t->keep);
  return true;
}

bool TensorTable::add_state(Tensor* t, const TensorView& p, PyObject* state, PyObject* spec, bool fresh) {
  static PyObject* prune_mask = key("prune_mask");
  PyObject *slots = item(spec, kSlots), *counters = item(spec, kCounters), *emas = item(spec, kEmas);
  trail_.dict(state);
  Cursor cursor(state);  // asks in the order in which plan.complete_state makes them
  for (int k = 0; k < size(counters); ++k)
    if (!read_counter(cursor.find(item(counters, k)), &t->counter[k])) return false;
  for (int k = 0; k < size(slots); ++k)
    if (!(t->slot[k] = read_stream(cursor.find(item(slots, k)), p, p.storage))) return false;
  for (int k = 0, passed = 0; k < size(emas); ++k) {
    PyObject *average = item(emas, k), *found = cursor.find(item(average, kKey));
    if (!found) return false;
    if (item(average, kPassed) != Py_True) continue;
    const int storage = p.storage == 1 ? 1 : item(average, kNarrow) == Py_True ? p.storage : 0;
    if (!(t->ema[passed++] = read_stream(found, p, storage))) return false;
  }
  if (size(counters) == 0) t->counter[0].value = fresh;  // for rules without a step count
  if (PyDict_Size(state) == size(slots) + size(emas) + size(counters) || t->n == 0) return true;  // no masks
  if (!read_mask(state, t)) return false;
  PyObject* bits = PyDict_GetItemWithError(state, prune_mask);
  if (bits && !(t->pruned = read_bits(bits, t->n))) return false;
  return (!t->keep.words && !t->pruned) || in_order_of_bits(state, p);
}

bool TensorTable::add(PyObject* param, const TensorView& g, PyObject* state, PyObject* spec, int group, bool fresh) {
  TensorView p;
  if (!read(param, &p)) return false;
  if (p.storage < 0 || p.storage == kBits || g.storage != p.storage || !p.dense() || !g.same_layout(p)) return false;
  Tensor& t = tensors.emplace_back();
  t.group = group, t.storage = p.storage, t.n = p.count(), t.p = p.data, t.g = g.data;
  is_new_ = is_raw(param);
  if (!add_state(&t, p, state, spec, fresh)) return tensors.pop_back(), false;
  if (on_host) drop_idle_averages(groups[group], &t);
  return true;
}

void TensorTable::release() {
  for (PyObject* object : params) Py_DECREF(object);
  for (PyObject* object : held_) Py_DECREF(object);
  for (void* reference : references_) raw.drop_reference(reference);
  params.clear(), held_.clear(), references_.clear();
}

TensorTable::Grad TensorTable::read_grad(PyObject* param, PyObject* given, TensorView* out) {
  if (!given) {
    if (void* reference = raw_grad(param, out)) {
      references_.push_back(reference);
      return Grad::kRead;
    }
  }
  PyObject* grad = given ? Py_NewRef(given) : grad_of(param);
  if (!grad) return PyErr_Clear(), Grad::kUnreadable;  // the parameter is not a tensor at all
  if (grad == Py_None) {
    Py_DECREF(grad);
    return Grad::kNone;
  }
  held_.push_back(grad);
  return read(grad, out) && placed_alike(param, grad) ? Grad::kRead : Grad::kUnreadable;
}

// False if Python must see to this parameter; true also if it has no gradient.
bool TensorTable::gather_one(PyObject* param, PyObject* own, PyObject* state, PyObject* replacement, PyObject* spec,
                             int group, int position) {
  static PyObject* nothing = PyDict_New();
  TensorView g;
  is_new_ = false;
  const auto replaced = [&](int k) { return replacement && item(replacement, k) != Py_None ? item(replacement, k) : nullptr; };
  PyObject* stepped = replaced(2) ? replaced(2) : param;
  const Grad grad = read_grad(stepped, replaced(0), &g);
  if (grad != Grad::kRead) return grad == Grad::kNone;
  const bool fresh = replacement && item(replacement, 1) == Py_True;
  if (!own) own = PyDict_GetItemWithError(state, param);
  const bool without = !own;
  if (without) own = nothing;
  if (!PyDict_Check(own) || !add(stepped, g, own, spec, group, fresh)) return is_new_ = is_new_ && without, false;
  tensors.back().position = position;
  Py_INCREF(param);
  params.push_back(param);
  return true;
}

void TensorTable::gather(PyObject* specs, PyObject* state, PyObject* grads, double inv_grad_scale, int on, int first) {
  groups.clear(), tensors.clear(), problems.clear(), sharded = false, device = on;
  release();
  trail_.restart();
  const bool any_replaced = PyDict_Size(grads) > 0;
  Cursor replacements(grads);
  // Walk the state beside the parameters: hashing a tensor calls Python, and the order mostly agrees.
  Py_ssize_t position = 0;
  PyObject *next_param = nullptr, *next_state = nullptr;
  PyDict_Next(state, &position, &next_param, &next_state);
  for (Py_ssize_t k = 0; k < PyList_GET_SIZE(specs); ++k) {
    PyObject* spec = PyList_GET_ITEM(specs, k);
    groups.push_back(read_group(spec, inv_grad_scale));
    PyObject* list = item(spec, kParams);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i, ++first) {
      PyObject* param = PyList_GET_ITEM(list, i);
      PyObject* own = nullptr;
      if (param == next_param) {
        own = next_state;
        if (!PyDict_Next(state, &position, &next_param, &next_state)) next_param = nullptr;
      }
      PyObject* replacement = any_replaced ? replacements.find(param) : nullptr;
      sharded = sharded || is_dtensor(param);
      if (!gather_one(param, own, state, replacement, spec, int(k), first)) 
        problems.push_back({int(k), int(i), is_new_});
    }
  }
  if (!problems.empty()) tensors.clear(), release();
  cut();
}

void TensorTable::cut(bool all_frozen_too) {
  blocks.clear(), items.clear();
  int64_t total = 0;
  for (const Tensor& t : tensors) total += t.n;
  // An item is worth handing to a thread, and long enough that its streams seldom start anew.
  const int64_t item_elements = std::max(8 * kBlock, std::min(256 * kBlock, total / 32));
  items.push_back(0);
  int64_t filled = 0;
  for (int k = 0; k < int(tensors.size()); ++k) {
    const bool work = all_frozen_too || !tensors[k].all_frozen;
    for (int64_t begin = 0, n = tensors[k].n; begin < n; begin += kBlock) {
      const int64_t length = std::min(kBlock, n - begin);
      blocks.push_back({k, int32_t(length), begin});
      filled += work ? length : 0;
      if (filled >= item_elements) items.push_back(int(blocks.size())), filled = 0;
    }
  }
  if (items.back() != int(blocks.size())) items.push_back(int(blocks.size()));
}

bool overlapping(TensorTable& table) {
  bool known = table.extents.size() == table.tensors.size();
  table.extents.resize(table.tensors.size());
  for (size_t k = 0; k < table.tensors.size(); ++k) {
    const Tensor& t = table.tensors[k];
    const char* begin = static_cast<const char*>(t.p);
    const TensorTable::Extent now{begin, begin + t.n * element_size(t.storage)};
    known = known && table.extents[k] == now;
    table.extents[k] = now;
  }
  if (known) return table.in_order;
  auto sorted = table.extents;
  sorted.erase(std::remove_if(sorted.begin(), sorted.end(), [](const auto& e) { return e.first == e.second; }), sorted.end());
  std::sort(sorted.begin(), sorted.end());
  return std::adjacent_find(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second > b.first; }) !=
         sorted.end();
}

bool clips(const TensorTable& table) {
  return std::any_of(table.groups.begin(), table.groups.end(), [](const Group& g) { return g.max_grad_norm > 0; });
}

}  // namespace fuseopt
