#include "tensor_view.h"

namespace fuseopt {
namespace {

// The part of DLPack's published binary interface that is used here (dlpack.h, version 1).
struct DLTensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchangeApi {
  uint32_t major, minor;
  DLPackExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};
constexpr int kCpu = 1, kUint = 1, kFloat = 2, kBfloat = 4;

PyTypeObject* tensor_type;
PyTypeObject* parameter_type;
PyObject* plain_dispatch;  // torch.Tensor.__torch_dispatch__
PyObject* describe;
int (*tensor_from_object)(void*, DLTensor*);

int storage_of(const DLTensor& t) {
  if (t.device.type != kCpu || t.dtype.lanes != 1) return -1;
  if (t.dtype.code == kFloat) return t.dtype.bits == 32 ? 0 : t.dtype.bits == 64 ? 1 : t.dtype.bits == 16 ? 3 : -1;
  if (t.dtype.code == kBfloat) return t.dtype.bits == 16 ? 2 : -1;
  return t.dtype.code == kUint && t.dtype.bits == 8 ? kBits : -1;
}

bool is_plain(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  if (type == tensor_type || type == parameter_type) return true;
  if (!PyType_IsSubtype(type, tensor_type)) return false;
  PyObject* dispatch = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__torch_dispatch__");
  if (!dispatch) PyErr_Clear();
  const bool plain = dispatch == plain_dispatch;
  Py_XDECREF(dispatch);
  return plain;
}

bool view_by_dlpack(PyObject* object, TensorView* out) {
  DLTensor t;
  if (tensor_from_object(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  out->data = static_cast<char*>(t.data) + t.byte_offset;
  out->storage = storage_of(t);
  out->ndim = t.ndim;
  out->shape = t.shape;
  out->strides = t.strides;
  return true;
}

bool view_by_python(PyObject* object, TensorView* out) {
  PyObject* row = PyObject_CallOneArg(describe, object);
  Py_ssize_t address;
  PyObject *shape, *strides;
  bool ok = row && PyArg_ParseTuple(row, "niO!O!", &address, &out->storage, &PyTuple_Type, &shape, &PyTuple_Type,
                                    &strides) && PyTuple_GET_SIZE(shape) <= TensorView::kMaxDims;
  if (ok) {
    out->data = reinterpret_cast<void*>(address);
    out->ndim = int(PyTuple_GET_SIZE(shape));
    for (int d = 0; d < out->ndim; ++d) {
      out->copied[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d));
      out->copied[TensorView::kMaxDims + d] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, d));
    }
    out->shape = out->copied;
    out->strides = out->copied + TensorView::kMaxDims;
  }
  Py_XDECREF(row);
  PyErr_Clear();
  return ok;
}

}  // namespace

void set_torch(PyObject* tensor, PyObject* parameter, PyObject* describe_function, bool use_dlpack) {
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  plain_dispatch = PyObject_GetAttrString(tensor, "__torch_dispatch__");
  Py_INCREF(tensor), Py_INCREF(parameter), Py_INCREF(describe_function);
  describe = describe_function;
  tensor_from_object = nullptr;
  PyObject* capsule = use_dlpack ? PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__") : nullptr;
  if (capsule) {
    auto* api = static_cast<DLPackExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (api && api->major > 1) api = api->previous;
    if (api && api->major == 1) tensor_from_object = api->tensor_from_object;
    Py_DECREF(capsule);
  }
  PyErr_Clear();
}

bool view(PyObject* object, TensorView* out) {
  if (!is_plain(object)) return false;
  if (!(tensor_from_object ? view_by_dlpack(object, out) : view_by_python(object, out))) return false;
  out->n = 1;
  for (int d = 0; d < out->ndim; ++d) out->n *= out->shape[d];
  return true;
}

bool TensorView::same_layout(const TensorView& other) const {
  if (ndim != other.ndim) return false;
  for (int d = 0; d < ndim; ++d) {
    if (shape[d] != other.shape[d]) return false;
    if (strides[d] != other.strides[d] && shape[d] > 1 && n > 0) return false;
  }
  return true;
}

bool TensorView::dense() const {
  if (n <= 1) return true;
  uint32_t done = 0;  // dimensions placed so far, innermost first
  for (int64_t expected = 1; expected < n;) {
    int next = -1;
    for (int d = ndim - 1; d >= 0 && next < 0; --d)
      if (!(done >> d & 1) && shape[d] > 1 && strides[d] == expected) next = d;
    if (next < 0) return false;
    done |= 1u << next;
    expected *= shape[next];
  }
  return true;
}

}  // namespace fuseopt
