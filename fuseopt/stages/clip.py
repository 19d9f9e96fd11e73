"""Clipping by the global norm of the gradient (stage 4), as torch.nn.utils.clip_grad_norm_ scales it."""

from typing import Any

import torch
from torch import Tensor


def square(g: Tensor) -> float:
    """What a gradient contributes to the square of the norm, summed in double."""
    return float(g.double().square().sum())


def factor(max_grad_norm: float | None, total_norm: float) -> float:
    """min(1, max_grad_norm / (norm + 1e-6)); 1 where nothing clips, NaN where the norm is."""
    if not max_grad_norm:
        return 1.0
    ratio = max_grad_norm / (total_norm + 1e-6)
    return 1.0 if ratio >= 1 else ratio


def clip(g: Tensor, scale: float) -> Tensor:
    """g * scale."""
    return g * scale


def unscale(g: Tensor, inv_grad_scale: float) -> Tensor:
    """g / grad_scale: undoes the loss scale of mixed precision (stage 1)."""
    return g * torch.as_tensor(inv_grad_scale, dtype=g.dtype)


def check(group: dict[str, Any]) -> None:
    """Raise ValueError unless max_grad_norm is None or a number > 0 (inf only measures)."""
    value = group["max_grad_norm"]
    if value is not None and (not isinstance(value, (int, float)) or not value > 0):
        raise ValueError(f"Invalid max_grad_norm value: {value!r}; give a number > 0, or None for no clipping")
