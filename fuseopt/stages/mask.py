"""Masks (stages 3 and 9): entries whose gradient is dropped, or which are frozen bit for bit.

A mask is stored as packed bits without expanding it: element i of the parameter has bit
(i // inner) % period. A row mask of an (R, C) matrix keeps R bits (period R, inner C), a column mask C
bits, an element mask R*C. "mask_shape" is the shape in which it was given. A checkpoint holds masks as
boolean tensors, the user's in that shape, so that it depends neither on how they lie here nor on how many
processes share the parameter.

Note: order. Kernels walk memory, so bits must lie in the order of the parameter's memory, which changes
with its memory format. "mask_order" in the state holds the dimensions from outermost to innermost as the
bits have them; it is absent where they are row-major. Before a step, bits in another order than the
memory's are brought into it.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ..distributed import Parts, local, part, placed_alike, whole

MODES = ("freeze", "grad")
STATE_KEYS = ("mask_keep", "mask_period", "mask_inner", "mask_shape", "mask_freeze")
BITS = ("mask_keep", "prune_mask")


def pack(bits: Tensor) -> Tensor:
    """Boolean tensor -> uint8, 8 a byte from the least significant bit, padded to whole 32-bit words."""
    packed = np.packbits(bits.reshape(-1).cpu().numpy(), bitorder="little")
    return torch.from_numpy(np.pad(packed, (0, -len(packed) % 4))).to(bits.device)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first n bits of `pack`'s result, as a boolean tensor of shape (n,)."""
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little", count=n)
    return torch.from_numpy(bits.astype(np.bool_))


def count(packed: Tensor) -> int:
    """How many bits of `pack`'s result are set."""
    bits = packed.cpu().numpy()
    if bits.ndim == 1 and bits.size % 4 == 0:  # not the booleans of a checkpoint
        bits = bits.view(np.uint32 if hasattr(np, "bitwise_count") else np.uint8)
    ones = np.bitwise_count(bits) if hasattr(np, "bitwise_count") else _ONES[bits]  # numpy 2
    return int(ones.sum(dtype=np.int64))


_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def empty_bits(n: int, device: torch.device) -> Tensor:
    """n zero bits, packed."""
    return torch.zeros(-(-n // 32) * 4, dtype=torch.uint8, device=device)


def memory_order(p: Tensor) -> list[int]:
    """The dimensions of p from outermost to innermost in memory."""
    if p.is_contiguous():
        return list(range(p.dim()))
    return sorted(range(p.dim()), key=lambda d: (-p.stride(d), d))


def order_of(state: dict, p: Tensor) -> list[int]:
    """The order of the dimensions in which the bits in a parameter's state lie."""
    return state.get("mask_order", list(range(p.dim())))


def _flatten(x: Tensor, order: list[int]) -> Tensor:
    """x as a vector, its dimensions in this order."""
    return x.permute(order).reshape(-1)


def _unflatten(flat: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """The inverse of `_flatten`."""
    inverse = [order.index(d) for d in range(len(order))]
    return flat.reshape([shape[d] for d in order]).permute(inverse)


def fold(keep: Tensor, shape: torch.Size, order: list[int]) -> tuple[Tensor, int, int]:
    """(bits, period, inner) of a mask that broadcasts to a shape, stored no larger than it must be."""
    aligned = keep.reshape([1] * (len(shape) - keep.dim()) + list(keep.shape)).permute(order)
    sizes = [shape[d] for d in order]
    full = [d for d, size in enumerate(sizes) if size > 1 and aligned.shape[d] == size]
    if not full or aligned.all() or not aligned.any():  # one bit for the whole tensor
        return aligned.reshape(-1)[:1], 1, max(math.prod(sizes), 1)
    first, last = full[0], full[-1]
    between = [aligned.shape[d] if d in full else sizes[d] for d in range(first, last + 1)]
    inner = max(math.prod(sizes[last + 1 :]), 1)  # 1 in an empty parameter
    expanded = aligned.expand([*aligned.shape[:first], *between, *aligned.shape[last + 1 :]])
    bits = expanded.reshape(-1)
    return bits, bits.numel(), inner


def unfold(state: dict, p: Tensor) -> Tensor | None:
    """The user's mask of a parameter as a boolean tensor of its shape; None where it has none."""
    if "mask_keep" not in state:
        return None
    if state["mask_keep"].dtype == torch.bool:
        return state["mask_keep"].expand(p.shape)
    period, inner = state["mask_period"], state["mask_inner"]
    bits = unpack(state["mask_keep"], period)
    flat = bits.repeat_interleave(inner).repeat(max(1, p.numel() // max(1, period * inner)))[: p.numel()]
    return _unflatten(flat, p.shape, order_of(state, p)).to(p.device)


def pruned(state: dict, p: Tensor) -> Tensor | None:
    """Boolean tensor of the parameter's shape, True where pruned; None where there are no such bits."""
    if "prune_mask" not in state:
        return None
    if state["prune_mask"].dtype == torch.bool:
        return state["prune_mask"]
    return _unflatten(unpack(state["prune_mask"], p.numel()), p.shape, order_of(state, p)).to(p.device)


def set_pruned(state: dict, p: Tensor, mask: Tensor) -> None:
    """Write the bits that `pruned` reads."""
    state["prune_mask"].copy_(pack(_flatten(mask, order_of(state, p))))


def reorder(state: dict, p: Tensor, order: list[int]) -> None:
    """Bring the bits in a parameter's state into another order of its dimensions."""
    zeros, keep = pruned(state, p), unfold(state, p)
    if order == list(range(p.dim())):
        state.pop("mask_order", None)
    else:
        state["mask_order"] = order
    if zeros is not None:
        state["prune_mask"] = pack(_flatten(zeros, order))
    if keep is not None and p.numel():
        bits, state["mask_period"], state["mask_inner"] = fold(keep, p.shape, order)
        state["mask_keep"] = pack(bits)


def into_memory_order(state: dict, p: Tensor) -> None:
    """Make the masks in a parameter's state what the kernels read: bits in the order of its memory, whole words.

    Who writes a checkpoint's entries into the state himself, as ZeroRedundancyOptimizer does, leaves booleans.
    """
    if any(key in state and state[key].dtype == torch.bool for key in BITS):
        restore(state, p, dict(state), {})
    p = local(p)
    for key in BITS:
        if key in state and state[key].device != p.device:
            state[key] = state[key].to(p.device)
    if any(key in state for key in BITS):
        aligned = all(state[key].data_ptr() % 4 == 0 for key in BITS if key in state)
        if not aligned or order_of(state, p) != memory_order(p):
            reorder(state, p, memory_order(p))


def check_state(name: str, p: Tensor, state: dict) -> None:
    """Raise ValueError unless the masks in the state of a parameter fit it, packed or as a checkpoint has them."""
    masks = {key: state[key] for key in BITS if key in state}
    booleans = [key for key, value in masks.items() if isinstance(value, Tensor) and value.dtype == torch.bool]
    for key in booleans:
        shape = masks.pop(key).shape
        if len(shape) != p.dim() or any(a not in (1, b) for a, b in zip(shape, p.shape, strict=True)):
            raise ValueError(f"state {key!r} of {name} has shape {tuple(shape)}, not {tuple(p.shape)}")
    count = {"prune_mask": p.numel()}
    if "mask_keep" in masks:
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise ValueError(f"state 'mask_keep' of {name} lacks {', '.join(missing)}; set it again with opt.mask")
        count["mask_keep"] = period = state["mask_period"]
        if period < 1 or state["mask_inner"] < 1 or p.numel() % (period * state["mask_inner"]):
            raise ValueError(f"state 'mask_keep' of {name} does not fit its {p.numel()} entries; set it with opt.mask")
    for key, value in masks.items():
        n = count[key]
        if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.numel() < -(-n // 32) * 4:
            raise ValueError(f"state {key!r} of {name} is not {n} packed bits (uint8); delete it to start afresh")


def given(state: dict, p: Tensor) -> Tensor:
    """The user's mask on this process, of size 1 in the dimensions in which it was given so."""
    shape, here = state["mask_shape"], local(p)
    if not here.numel():
        own = [n if size == m else 1 for n, m, size in zip(here.shape, p.shape, shape, strict=True)]
        return unpack(state["mask_keep"], math.prod(own)).reshape(own)
    keep = unfold(state, here)
    for d, size in enumerate(shape):
        keep = keep.narrow(d, 0, 1) if size == 1 else keep
    return keep.contiguous()  # not a view that would save all of it


def check_keep(shape: torch.Size, keep: Tensor, name: str) -> None:
    """Raise TypeError or ValueError unless `keep` is a boolean tensor that broadcasts to a shape."""
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        found = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"mask of {name}: keep is {found}; give a boolean tensor, True where it may change")
    try:
        fits = torch.broadcast_shapes(keep.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask of {name}: keep has shape {tuple(keep.shape)}, which does not broadcast to the "
            f"parameter's {tuple(shape)}; add axes, as in keep[:, None] for rows"
        )


def check_mode(mode: str, name: str) -> None:
    """Raise ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"mask of {name}: mode {mode!r} is unknown; use 'freeze' or 'grad'")


def replace(state: dict, p: Tensor, keep: Tensor | None, freeze: bool) -> None:
    """Give a parameter's state the mask `keep`, which broadcasts to the whole of it, or None."""
    for key in STATE_KEYS:
        state.pop(key, None)
    if keep is None:
        return
    here = local(p)
    if keep.dim() < p.dim():
        keep = keep.reshape([1] * (p.dim() - keep.dim()) + list(keep.shape))
    own = local(keep) if keep.shape == p.shape and placed_alike(p, keep) else part(p, keep)
    _store(state, here, own)
    state["mask_shape"], state["mask_freeze"] = list(keep.shape), freeze


def _store(state: dict, p: Tensor, own: Tensor) -> None:
    """Write the bits of a mask that broadcasts to a parameter's part on this process."""
    bits, period, inner = fold(own, p.shape, order_of(state, p))
    if not p.numel():  # a process may hold no entry of a parameter and yet has to save its mask
        bits = own.reshape(-1) if own.numel() else torch.ones(1, dtype=torch.bool)
        period, inner = bits.numel(), 1
    state["mask_keep"], state["mask_period"], state["mask_inner"] = pack(bits.to(p.device)), period, inner


def widen(state: dict, p: Tensor) -> None:
    """Have a parameter's mask saved in the shape of the parameter, in which any other that comes later fits."""
    here = local(p)
    if not here.numel():
        _store(state, here, given(state, p).expand(here.shape))
    state["mask_shape"] = list(p.shape)


def all_frozen(state: dict) -> bool:
    """Whether a "freeze" mask holds every entry."""
    return bool(state.get("mask_freeze")) and not state["mask_keep"].any()


def entries(state: dict) -> dict:
    """The entries of the user's mask in a parameter's state."""
    return {key: state[key] for key in (*STATE_KEYS, "mask_t", "mask_order") if key in state}


def saved(state: dict, p: Tensor, prunable: bool) -> dict:
    """A parameter's state as a checkpoint holds it: masks as boolean tensors of the whole parameter.

    What is prunable has its mask from the first checkpoint on: to load in place, as
    torch.distributed.checkpoint does, the same entries must be there before and after pruning began.
    """
    out = {key: value for key, value in state.items() if key not in (*STATE_KEYS, *BITS, "mask_order")}
    here = local(p)
    if prunable or "prune_mask" in state:
        zeros = pruned(state, here)
        zeros = torch.zeros(here.shape, dtype=torch.bool, device=here.device) if zeros is None else zeros
        out["prune_mask"] = whole(p, zeros, set(range(p.dim())))
    if "mask_keep" in state and state["mask_keep"].dtype == torch.bool:  # loaded so; see into_memory_order
        out["mask_keep"], out["mask_freeze"] = state["mask_keep"], state["mask_freeze"]
    elif "mask_keep" in state:
        split = {d for d, size in enumerate(state["mask_shape"]) if size == p.shape[d]}
        out["mask_keep"], out["mask_freeze"] = whole(p, given(state, p), split), state["mask_freeze"]
    return out


def restore(state: dict, p: Tensor, saved: dict, own: dict) -> None:
    """Put the masks of a checkpoint into the state of a parameter: the inverse of `saved`.

    own: the `entries` of the mask that it had before, for a checkpoint without one.
    """
    for key in (*BITS, "mask_freeze"):
        state.pop(key, None)
    if "mask_keep" in saved:
        replace(state, p, saved["mask_keep"].bool(), bool(saved["mask_freeze"]))
    else:
        state.update(own)
    if "prune_mask" in saved:
        zeros, here = saved["prune_mask"], local(p)
        zeros = (local(zeros) if placed_alike(p, zeros) else part(p, zeros)).bool()
        if Parts([p]).total(lambda _: zeros.sum()):
            state["prune_mask"] = pack(_flatten(zeros.to(here.device), order_of(state, here)))
