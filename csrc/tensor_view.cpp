#include "tensor_view.h"

#include <cstring>

namespace fuseopt {
namespace {

using Handle = void*;  // AtenTensorHandle: the address of an at::Tensor
// Functions of torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h), in the order in which
// fuseopt/torch_abi.py looks them up. Each returns 0 on success.
struct Shim {
  int32_t (*layout)(Handle, int32_t*);
  int32_t (*device_type)(Handle, int32_t*);
  int32_t (*device_index)(Handle, int32_t*);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*dim)(Handle, int64_t*);
  int32_t (*sizes)(Handle, int64_t**);
  int32_t (*strides)(Handle, int64_t**);
  int32_t (*data_ptr)(Handle, void**);
};
constexpr int32_t kStrided = 0, kCpu = 0, kCuda = 1;  // c10::Layout, c10::DeviceType

PyTypeObject* tensor_type;
PyTypeObject* parameter_type;
PyObject* plain_dispatch;  // torch.Tensor.__torch_dispatch__
PyObject* describe;
PyGetSetDef* grad_property;  // torch.Tensor.grad, if it is a plain C property
Shim shim;
Py_ssize_t handle_offset = -1;  // where a Python tensor holds its at::Tensor; -1: ask `describe`

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

bool view_by_shim(PyObject* object, TensorView* out) {
  const Handle tensor = reinterpret_cast<char*>(object) + handle_offset;
  int32_t layout, kind, device, dtype;
  int64_t ndim, *shape, *strides;
  if (shim.layout(tensor, &layout) || layout != kStrided) return false;
  if (shim.device_type(tensor, &kind) || shim.device_index(tensor, &device) || shim.dtype(tensor, &dtype) || shim.dim(tensor, &ndim) ||
      shim.sizes(tensor, &shape) || shim.strides(tensor, &strides) ||
      shim.data_ptr(tensor, &out->data))
    return false;
  out->device = kind == kCuda ? device : kHost;
  out->storage = kind == kCpu || kind == kCuda ? storage_of(dtype) : -1;
  out->ndim = int(ndim);
  out->shape = shape;
  out->strides = strides;
  return true;
}

bool view_by_python(PyObject* object, TensorView* out) {
  PyObject* row = PyObject_CallOneArg(describe, object);
  Py_ssize_t address;
  PyObject *shape, *strides;
  bool ok = row && PyArg_ParseTuple(row, "niiO!O!", &address, &out->device, &out->storage, &PyTuple_Type, &shape, &PyTuple_Type,
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

void set_torch(PyObject* tensor, PyObject* parameter, PyObject* describe_function,
               const std::vector<intptr_t>& functions, Py_ssize_t offset) {
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor);
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter);
  plain_dispatch = PyObject_GetAttrString(tensor, "__torch_dispatch__");
  Py_INCREF(tensor), Py_INCREF(parameter), Py_INCREF(describe_function);
  describe = describe_function;
  PyObject* grad = PyObject_GetAttrString(tensor, "grad");
  const bool plain = grad && Py_IS_TYPE(grad, &PyGetSetDescr_Type);
  grad_property = plain ? reinterpret_cast<PyGetSetDescrObject*>(grad)->d_getset : nullptr;
  Py_XDECREF(grad);  // its type holds it
  handle_offset = functions.size() * sizeof(intptr_t) == sizeof shim ? offset : -1;
  if (handle_offset >= 0) std::memcpy(&shim, functions.data(), sizeof shim);
}

PyObject* grad_of(PyObject* param) {
  PyTypeObject* type = Py_TYPE(param);
  if (grad_property && (type == tensor_type || type == parameter_type))  // spare the look-up of the name
    return grad_property->get(param, grad_property->closure);
  return PyObject_GetAttrString(param, "grad");
}

// torch's class is only there once somebody imported its module, so it is looked up until found.
bool is_dtensor(PyObject* object) {
  static PyTypeObject* dtensor_type = nullptr;
  PyTypeObject* type = Py_TYPE(object);
  if (type == tensor_type || type == parameter_type) return false;
  if (!dtensor_type) {
    PyObject* name = PyUnicode_FromString("torch.distributed.tensor");
    PyObject* module = name ? PyImport_GetModule(name) : nullptr;
    if (module) dtensor_type = reinterpret_cast<PyTypeObject*>(PyObject_GetAttrString(module, "DTensor"));
    Py_XDECREF(name), Py_XDECREF(module);
    PyErr_Clear();
  }
  return type == dtensor_type;
}

bool placed_alike(PyObject* a, PyObject* b) {
  if (!is_dtensor(a) || !is_dtensor(b)) return !is_dtensor(b);
  PyObject *x = PyObject_GetAttrString(a, "_spec"), *y = PyObject_GetAttrString(b, "_spec");
  const bool alike = x && y && PyObject_RichCompareBool(x, y, Py_EQ) == 1;
  Py_XDECREF(x), Py_XDECREF(y);
  PyErr_Clear();
  return alike;
}

bool view(PyObject* object, TensorView* out) {
  if (is_dtensor(object)) {
    static PyObject* local = PyUnicode_InternFromString("_local_tensor");
    PyObject* part = PyObject_GetAttr(object, local);
    const bool plain = part && view(part, out);
    Py_XDECREF(part);  // the DTensor holds it
    PyErr_Clear();
    return plain;
  }
  if (!is_plain(object)) return false;
  return handle_offset >= 0 ? view_by_shim(object, out) : view_by_python(object, out);
}

bool TensorView::contiguous(const int* order) const {
  if (count() <= 1) return true;
  int64_t expected = 1;
  for (int k = ndim - 1; k >= 0; --k) {
    const int d = order ? order[k] : k;
    if (shape[d] > 1 && strides[d] != expected) return false;
    expected *= shape[d];
  }
  return true;
}

bool TensorView::dense() const {
  const int64_t n = count();
  if (n <= 1) return true;
  uint64_t done = 0;  // dimensions placed so far, innermost first
  for (int64_t expected = 1; expected < n;) {
    int next = -1;
    for (int d = ndim - 1; d >= 0 && next < 0; --d)
      if (!(done >> d & 1) && shape[d] > 1 && strides[d] == expected) next = d;
    if (next < 0) return false;
    done |= uint64_t(1) << next;
    expected *= shape[next];
  }
  return true;
}

}  // namespace fuseopt
