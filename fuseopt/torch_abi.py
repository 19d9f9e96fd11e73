"""How the compiled module reads tensors without being built against torch.

torch exports a C interface for code compiled ahead of time (torch/csrc/inductor/aoti_torch/c/shim.h). Its
functions take the address of an at::Tensor; a Python tensor holds one at a fixed offset, which is found
here by looking for a pointer that torch tells us in `Tensor._cdata`. Reading a tensor so takes about
10 ns; through Python, which is the fallback, about 500.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from . import schema

# In the order of `struct Shim` in csrc/tensor_view.cpp.
FUNCTIONS = ("layout", "device_type", "device_index", "dtype", "dim", "sizes", "strides", "data_ptr")


def find() -> tuple[list[int], int]:
    """(addresses of torch's C functions, offset of the at::Tensor in a Python tensor); ([], -1) if not found."""
    addresses = [_address(f"aoti_torch_get_{name}") for name in FUNCTIONS]
    if not all(addresses):
        return [], -1
    offset = _offset([torch.zeros(2), torch.ones(3, 1), torch.nn.Parameter(torch.zeros(1)), torch.zeros(())])
    return (addresses, offset) if offset is not None else ([], -1)


def more_functions() -> list[int]:
    """Addresses of torch::autograd::impl::bump_version(at::Tensor const&), 0 if torch has none, and of the
    functions that hold a tensor and let go of it; [] if torch lacks those."""
    held = [_address("aoti_torch_new_tensor_handle"), _address("aoti_torch_delete_tensor_object")]
    return [_address("_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"), *held] if all(held) else []


def _address(name: str) -> int:
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def _offset(samples: list[Tensor]) -> int | None:
    """The first offset past the object header at which every sample holds its own `_cdata`."""
    for offset in range(object.__basicsize__, torch.Tensor.__basicsize__ - 7, 8):
        if all(ctypes.c_void_p.from_address(id(t) + offset).value == t._cdata for t in samples):
            return offset
    return None


def describe(t: Tensor) -> tuple[int, int, int, tuple[int, ...], tuple[int, ...]]:
    """(address, number of the CUDA device or -1, storage id, shape, strides): the same through Python."""
    storage = schema.BITS if t.dtype == torch.uint8 else schema.STORAGES.get(t.dtype, -1)
    if t.device.type not in ("cpu", "cuda") or t.layout != torch.strided:
        return 0, -1, -1, (), ()
    device = t.device.index if t.device.type == "cuda" else -1
    return t.data_ptr(), device, storage, tuple(t.shape), tuple(t.stride())
