// Reads plain CPU tensors at the offsets that fuseopt/torch_layout.py found, without calling torch.
#pragma once

#include <cstring>
#include <vector>

#include "tensor_view.h"

namespace fuseopt {

// What fuseopt/torch_layout.py found, in its order. The offsets are of fields in a TensorImpl; `data` and
// `context` in a StorageImpl, `grad` in the autograd metadata.
struct Layout {
  int64_t plain_key_set;  // not an offset: what the key set of a plain tensor is
  int64_t key_set, storage, dims, storage_offset, dtype, py_object, grad_meta, data, context, grad;
};
constexpr int kInlineDims = 5;  // up to so many sizes, then strides, follow the number of dimensions

struct Raw {
  PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
  Py_ssize_t handle = -1;  // offset of the at::Tensor in a Python tensor; -1: nothing is read raw
  Layout at;
  // Functions of torch; each takes the address of an at::Tensor.
  void (*bump_version)(const void*);
  int32_t (*new_reference)(const void*, void**);
  int32_t (*drop_reference)(void*);
};
extern Raw raw;

// Called once at import, after set_torch(). Without a layout nothing is read raw.
void set_layout(PyObject* tensor_type, PyObject* parameter_type, Py_ssize_t handle, const std::vector<int64_t>& layout,
                const std::vector<intptr_t>& functions);

template <class T>
inline T field(const char* object, int64_t offset) {
  T value;
  std::memcpy(&value, object + offset, sizeof value);
  return value;
}

inline bool is_raw(PyObject* object) {
  return raw.handle >= 0 && (Py_TYPE(object) == raw.tensor_type || Py_TYPE(object) == raw.parameter_type);
}

inline const char* handle_of(PyObject* object) { return reinterpret_cast<const char*>(object) + raw.handle; }
inline const char* impl_of(PyObject* object) { return field<const char*>(handle_of(object), 0); }

// Sparse, quantized, meta, inference and wrapper tensors and views with a lazy bit all have other keys.
inline bool is_plain(const char* impl) { return field<int64_t>(impl, raw.at.key_set) == raw.at.plain_key_set; }

inline int64_t bytes_of(int storage) {
  constexpr int64_t bytes[] = {4, 8, 2, 2};  // in the order of FUSEOPT_STORAGES
  return storage == kBits ? 1 : bytes[storage];
}

// False where a tensor cannot be read so; then view() has other ways.
inline bool raw_view(const char* impl, TensorView* out) {
  if (!is_plain(impl)) return false;
  const auto ndim = field<int64_t>(impl, raw.at.dims);
  const char* storage = field<const char*>(impl, raw.at.storage);
  char* data = field<char*>(storage, raw.at.data);
  // Memory that is not torch's own has another context; so has a lazy clone, to be copied before a write.
  if (ndim > kInlineDims || !data || data != field<char*>(storage, raw.at.context)) return false;
  out->device = kHost;
  out->storage = storage_of(field<int16_t>(impl, raw.at.dtype));
  if (out->storage < 0) return false;
  out->data = data + field<int64_t>(impl, raw.at.storage_offset) * bytes_of(out->storage);
  out->ndim = int(ndim);
  out->shape = reinterpret_cast<const int64_t*>(impl + raw.at.dims) + 1;
  out->strides = out->shape + kInlineDims;
  return true;
}

// The gradient of a parameter, if no Python object of it exists: making one for each step would take longer
// than all else. `out` is set, and a reference is returned that drop_reference ends; else nullptr.
inline void* raw_grad(PyObject* param, TensorView* out) {
  if (!is_raw(param)) return nullptr;
  const char* meta = field<const char*>(impl_of(param), raw.at.grad_meta);
  if (!meta) return nullptr;
  const char* grad = field<const char*>(meta, raw.at.grad);
  if (!grad || !is_plain(grad) || field<void*>(grad, raw.at.py_object) || !raw_view(grad, out)) return nullptr;
  void* reference = nullptr;
  return raw.new_reference(meta + raw.at.grad, &reference) == 0 ? reference : nullptr;
}

// Bumps the version of a tensor as an in-place operation does; false if it must be left to torch.
inline bool raw_bump_version(PyObject* object) {
  if (!is_raw(object) || !raw.bump_version || !is_plain(impl_of(object))) return false;
  raw.bump_version(handle_of(object));  // throws for inference tensors alone, whose key set is another
  return true;
}

// The objects that a step reads, in order, remembered from the step before as a hint of what to fetch: a
// tensor is a chain of objects in memory, and with a thousand tensors every link is cold. What is kept here
// is only ever prefetched, so it may be stale.
class Trail {
 public:
  void restart() { next_ = 0; }

  void tensor(PyObject* object) {
    if (!is_raw(object)) return;
    const char* impl = impl_of(object);
    const char* storage = field<const char*>(impl, raw.at.storage);
    const char* meta = field<const char*>(impl, raw.at.grad_meta);
    pass({object, impl, storage, meta ? meta : field<const char*>(storage, raw.at.data)});  // of a parameter, its .grad
  }

  void dict(PyObject* object) {
    pass({object, reinterpret_cast<PyDictObject*>(object)->ma_keys, nullptr, nullptr});
  }

 private:
  struct Lines {
    const void *object, *body, *storage, *extra;
  };
  static constexpr size_t kAhead = 16;
  static constexpr int kBodyLines = 3;

  void pass(const Lines& lines) {
    if (next_ + kAhead < seen_.size()) {
      const Lines& soon = seen_[next_ + kAhead];
      __builtin_prefetch(soon.object);
      for (int k = 0; k < kBodyLines; ++k) __builtin_prefetch(static_cast<const char*>(soon.body) + 64 * k);
      __builtin_prefetch(soon.storage);
      __builtin_prefetch(soon.extra);
    }
    if (next_ == seen_.size()) seen_.push_back(lines);
    else seen_[next_] = lines;
    ++next_;
  }

  std::vector<Lines> seen_;
  size_t next_ = 0;
};

}  // namespace fuseopt
