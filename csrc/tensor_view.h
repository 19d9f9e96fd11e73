// Reads a torch tensor's address, type and layout without torch headers: through the DLPack exchange
// table that torch publishes from 2.10 on, otherwise through a Python function given by the package.
#pragma once

#include <Python.h>

#include <cstdint>

namespace fuseopt {

struct TensorView {
  static constexpr int kMaxDims = 24;
  void* data = nullptr;
  int storage = -1;  // index in FUSEOPT_STORAGES; kBits for uint8; -1 for any other type or device
  int ndim = 0;
  int64_t n = 0;  // elements
  const int64_t* shape = nullptr;    // valid until the tensor changes
  const int64_t* strides = nullptr;  // in elements
  int64_t copied[2 * kMaxDims];      // holds shape and strides where Python supplied them

  bool same_layout(const TensorView& other) const;
  bool dense() const;  // some order of the dimensions is contiguous
};
constexpr int kBits = 100;

// Called once at import: torch.Tensor, torch.nn.Parameter, and `describe(tensor)` which returns
// (address, storage, shape, strides).
void set_torch(PyObject* tensor_type, PyObject* parameter_type, PyObject* describe, bool use_dlpack);

// False when `object` is not a plain tensor: another kind of object, a wrapper subclass, sparse. Leaves
// no Python exception behind.
bool view(PyObject* object, TensorView* out);

}  // namespace fuseopt
