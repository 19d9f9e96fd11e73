#include "raw_view.h"

namespace fuseopt {

Raw raw;

void set_layout(PyObject* tensor_type, PyObject* parameter_type, Py_ssize_t handle, const std::vector<int64_t>& layout,
                const std::vector<intptr_t>& functions) {
  raw.tensor_type = reinterpret_cast<PyTypeObject*>(tensor_type);  // set_torch() holds both
  raw.parameter_type = reinterpret_cast<PyTypeObject*>(parameter_type);
  const bool known = layout.size() * sizeof(int64_t) == sizeof raw.at && functions.size() == 3;
  raw.handle = known ? handle : -1;
  if (!known) return;
  std::memcpy(&raw.at, layout.data(), sizeof raw.at);
  std::memcpy(&raw.bump_version, &functions[0], sizeof functions[0]);
  std::memcpy(&raw.new_reference, &functions[1], sizeof functions[1]);
  std::memcpy(&raw.drop_reference, &functions[2], sizeof functions[2]);
}

}  // namespace fuseopt
