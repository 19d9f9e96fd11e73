"""Where torch keeps a tensor's address and layout in memory, so that the compiled module reads them directly.

Through torch's C interface (torch_abi.py) a tensor takes seven calls, about 25 ns; so it takes 5. No offset
is written down here: each is found by looking into tensors whose values are known. A tensor is read so
only if its key set is that of a plain, dense CPU tensor and its memory is torch's own. All others, and all
tensors where a field was not found, go through the C interface.
"""

import ctypes
import types
from collections.abc import Callable

import torch
from torch import Tensor

IMPL, STORAGE, AUTOGRAD = 176, 48, 96  # bytes searched of a TensorImpl, a StorageImpl and autograd metadata
INLINE = 5  # sizes, then strides, of up to so many dimensions lie in the TensorImpl, after their number
SCALAR_TYPES = {torch.float32: 6, torch.float64: 7, torch.bfloat16: 15, torch.float16: 5, torch.uint8: 0}


def find() -> list[int]:
    """[key set of a plain tensor, then the offsets of `struct Layout` in csrc/raw_view.h]; [] if not found."""
    try:
        with torch.device("cpu"):
            return _layout(_plain_samples(), _other_samples())
    except Exception:  # another torch may differ in any way, and must still be importable with
        return []


def _plain_samples() -> list[Tensor]:
    flat = torch.zeros(1300, dtype=torch.float32)
    samples = [flat[27:126].view(9, 11).t(), torch.zeros(4, 3, 5, 2, dtype=torch.float64)[1:], flat[5]]
    samples += [torch.zeros(7, dtype=dtype) for dtype in SCALAR_TYPES]
    return [*samples, torch.nn.Parameter(torch.zeros(2, 1, 4, 3, 6)), samples[0].detach().requires_grad_()]


def _other_samples() -> list[Tensor]:
    with torch.inference_mode():
        inference = torch.zeros(3)
    negative = torch.zeros(3, dtype=torch.complex64).conj().imag
    others = [torch.zeros(3, device="meta"), torch.zeros(3).to_sparse(), negative, inference]
    if torch.backends.mkldnn.is_available():
        others.append(torch.zeros(3, dtype=torch.float32).to_mkldnn())
    return others


def _word(address: int, kind: type = ctypes.c_int64) -> int:
    return kind.from_address(address).value


def _first(samples: list[Tensor], holds: Callable[[int, Tensor], bool], step: int = 8) -> int:
    """The first offset in a TensorImpl at which every sample holds what it should."""
    for offset in range(0, IMPL, step):
        if all(holds(t._cdata + offset, t) for t in samples):
            return offset
    raise LookupError


def _holds_dims(at: int, t: Tensor) -> bool:
    n = t.dim()
    if at + 8 * (1 + INLINE + n) > t._cdata + IMPL or _word(at) != n:
        return False
    words = [_word(at + 8 * k) for k in range(1, 1 + INLINE + n)]
    return words[:n] == list(t.shape) and words[INLINE:] == list(t.stride())


def _layout(plain: list[Tensor], others: list[Tensor]) -> list[int]:
    def plain_only(at: int, t: Tensor) -> bool:
        offset = at - t._cdata
        return _word(at) == _word(plain[0]._cdata + offset) and all(
            _word(at) != _word(other._cdata + offset) for other in others
        )

    storage = _first(plain, lambda at, t: _word(at) == t.untyped_storage()._cdata)
    dims = _first(plain, _holds_dims)
    storage_offset = _first(plain, lambda at, t: _word(at) == t.storage_offset())
    dtype = _first(plain, lambda at, t: _word(at, ctypes.c_int16) == SCALAR_TYPES[t.dtype], step=2)
    key_set = _first(plain, plain_only)
    py_object = _first(plain, lambda at, t: _word(at) == id(t))
    with_grad = [t for t in plain if t.requires_grad or not t._is_view()]
    grad_meta = _first(with_grad, lambda at, t: (_word(at) != 0) == t.requires_grad)
    value = _word(plain[0]._cdata + key_set)
    fields = [key_set, storage, dims, storage_offset, dtype, py_object, grad_meta]
    return [value, *fields, *_data_and_context(plain), _grad(with_grad, grad_meta)]


def _grad(samples: list[Tensor], grad_meta: int) -> int:
    """Where the autograd metadata holds `.grad`."""
    if not isinstance(torch.Tensor.grad, types.GetSetDescriptorType):
        raise LookupError  # someone replaced it
    for t in samples:
        if t.requires_grad:
            t.grad = torch.zeros_like(t)
    metas = [(_word(t._cdata + grad_meta), t.grad._cdata) for t in samples if t.requires_grad]
    return next(at for at in range(0, AUTOGRAD, 8) if all(_word(meta + at) == grad for meta, grad in metas))


def _data_and_context(plain: list[Tensor]) -> list[int]:
    """Where a StorageImpl holds its address: twice, if torch's allocator made it and it is not shared by a lazy
    clone, which must be copied before it is written."""

    def found(t: Tensor) -> list[int]:
        storage = t.untyped_storage()
        return [at for at in range(0, STORAGE, 8) if _word(storage._cdata + at) == storage.data_ptr()]

    data, context = found(plain[0])
    shared = torch.zeros(3)
    lazy = torch._lazy_clone(shared)
    words = [_word(shared.untyped_storage()._cdata + at) for at in (data, context)]
    if any(found(t) != [data, context] for t in plain) or words[0] == words[1] or lazy.numel() != 3:
        raise LookupError
    return [data, context]
