// Reads a torch tensor's address, type and layout without torch headers: through torch's C interface,
// found at run time, or through a Python function where that is not to be had.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

namespace fuseopt {

constexpr int kHost = -1;

struct TensorView {
  static constexpr int kMaxDims = 24;
  void* data = nullptr;
  int device = kHost;  // or the number of a CUDA device
  int storage = -1;  // index in FUSEOPT_STORAGES; kBits for uint8; -1 for any other type or kind of device
  int ndim = 0;
  const int64_t* shape = nullptr;    // valid until the tensor changes
  const int64_t* strides = nullptr;  // in elements
  int64_t copied[2 * kMaxDims];      // holds shape and strides where Python supplied them

  int64_t count() const;  // elements
  bool same_layout(const TensorView& other) const;
  bool dense() const;  // some order of the dimensions is contiguous
  bool contiguous(const int* order) const;  // this order, outermost first; nullptr: row-major
};
constexpr int kBits = 100;

inline int storage_of(int32_t scalar_type) {  // of a c10::ScalarType
  switch (scalar_type) {
    case 6: return 0;
    case 7: return 1;
    case 15: return 2;
    case 5: return 3;
    case 0: return kBits;
    default: return -1;
  }
}

// Called once at import: torch.Tensor, torch.nn.Parameter, `describe(tensor)` which returns (address,
// device, storage, shape, strides), and from fuseopt/torch_abi.py the addresses of torch's C functions with the
// offset of the at::Tensor in a Python tensor. Without functions, `describe` is used.
void set_torch(PyObject* tensor_type, PyObject* parameter_type, PyObject* describe,
               const std::vector<intptr_t>& functions, Py_ssize_t offset);

// `.grad` of a parameter: a new reference, or nullptr with a Python exception set.
PyObject* grad_of(PyObject* param);

// False when `object` is not a plain tensor: another kind of object, a wrapper subclass, sparse. Of a DTensor
// it shows the local tensor. Leaves no Python exception behind.
bool view(PyObject* object, TensorView* out);

bool is_dtensor(PyObject* object);

// False for two DTensors that lie on the processes in different ways. A plain tensor stands for a part.
bool placed_alike(PyObject* a, PyObject* b);

inline int64_t TensorView::count() const {
  int64_t n = 1;
  for (int d = 0; d < ndim; ++d) n *= shape[d];
  return n;
}

inline bool TensorView::same_layout(const TensorView& other) const {
  if (ndim != other.ndim) return false;
  bool empty = false, same = true;
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] != other.shape[d]) return false;
    same &= strides[d] == other.strides[d] || shape[d] <= 1;
    empty |= shape[d] == 0;
  }
  return same || empty;
}

}  // namespace fuseopt
