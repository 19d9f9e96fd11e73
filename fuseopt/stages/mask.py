"""Masks (stages 3 and 9): entries whose gradient is dropped, or which are frozen bit for bit.

A mask is stored as packed bits without expanding it: element i of the parameter has bit
(i // inner) % period. A row mask of an (R, C) matrix keeps R bits (period R, inner C), a column mask C
bits, an element mask R*C.

Note: order. Kernels walk memory, so bits must lie in the order of the parameter's memory, which changes
with its memory format. "mask_order" in the state holds the dimensions from outermost to innermost as the
bits have them; it is absent where they are row-major. Before a step, bits in another order than the
memory's are brought into it.
"""

import math

import numpy as np
import torch
from torch import Tensor

MODES = ("freeze", "grad")
STATE_KEYS = ("mask_keep", "mask_period", "mask_inner", "mask_freeze")
BITS = ("mask_keep", "prune_mask")


def pack(bits: Tensor) -> Tensor:
    """Boolean tensor -> uint8, 8 a byte from the least significant bit, padded to whole 32-bit words."""
    packed = np.packbits(bits.reshape(-1).cpu().numpy(), bitorder="little")
    return torch.from_numpy(np.pad(packed, (0, -len(packed) % 4)))


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first n bits of `pack`'s result, as a boolean tensor of shape (n,)."""
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little", count=n)
    return torch.from_numpy(bits.astype(np.bool_))


def empty_bits(n: int) -> Tensor:
    """n zero bits, packed."""
    return torch.zeros(-(-n // 32) * 4, dtype=torch.uint8)


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
    if not full:  # one bit for the whole tensor
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
    period, inner = state["mask_period"], state["mask_inner"]
    bits = unpack(state["mask_keep"], period)
    flat = bits.repeat_interleave(inner).repeat(max(1, p.numel() // max(1, period * inner)))[: p.numel()]
    return _unflatten(flat, p.shape, order_of(state, p)).to(p.device)


def pruned(state: dict, p: Tensor) -> Tensor | None:
    """Boolean tensor of the parameter's shape, True where pruned; None where there are no such bits."""
    if "prune_mask" not in state:
        return None
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
    if keep is not None:
        bits, state["mask_period"], state["mask_inner"] = fold(keep, p.shape, order)
        state["mask_keep"] = pack(bits)


def into_memory_order(state: dict, p: Tensor) -> None:
    """Make the bits in a parameter's state what the kernels read: in the order of its memory, whole words."""
    if any(key in state for key in BITS):
        aligned = all(state[key].data_ptr() % 4 == 0 for key in BITS if key in state)
        if not aligned or order_of(state, p) != memory_order(p):
            reorder(state, p, memory_order(p))


def check_state(name: str, n: int, state: dict) -> None:
    """Raise ValueError unless the packed bits in the state of a parameter of n entries fit it."""
    bits = {"prune_mask": n} if "prune_mask" in state else {}
    found = [key for key in STATE_KEYS if key in state]
    if found and len(found) < len(STATE_KEYS):
        missing = ", ".join(key for key in STATE_KEYS if key not in state)
        raise ValueError(f"state of {name} has {', '.join(found)} but lacks {missing}; set it again with opt.mask")
    if found:
        bits["mask_keep"], inner = state["mask_period"], state["mask_inner"]
        if n and n % (bits["mask_keep"] * inner):
            raise ValueError(f"state 'mask_keep' of {name} does not fit its {n} entries; set it again with opt.mask")
    for key, count in bits.items():
        value = state[key]
        if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.numel() < -(-count // 32) * 4:
            raise ValueError(f"state {key!r} of {name} is not {count} packed bits (uint8); delete it to start afresh")


def new_state(p: Tensor, keep: Tensor, mode: str, name: str, order: list[int]) -> dict:
    """The state entries of a mask, its bits in this order of the dimensions.

    Raises TypeError or ValueError on a mask that cannot be meant.
    """
    if mode not in MODES:
        raise ValueError(f"mask of {name}: mode {mode!r} is unknown; use 'freeze' or 'grad'")
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        found = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"mask of {name}: keep is {found}; give a boolean tensor, True where it may change")
    try:
        fits = torch.broadcast_shapes(keep.shape, p.shape) == p.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask of {name}: keep has shape {tuple(keep.shape)}, which does not broadcast to the "
            f"parameter's {tuple(p.shape)}; add axes, as in keep[:, None] for rows"
        )
    bits, period, inner = fold(keep, p.shape, order)
    return {"mask_keep": pack(bits), "mask_period": period, "mask_inner": inner, "mask_freeze": mode == "freeze"}
