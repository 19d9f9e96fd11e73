"""Weight decay: L2 and L1, coupled (stage 5) and decoupled (stages 6 and 8).

Coupled, the penalty joins the gradient before the moments see it: g + l2*p + l1*sign(p).
Decoupled, it acts on the weights: p*(1 - lr*l2) before the rule, the soft threshold
sign(p)*max(|p| - lr*l1, 0) after it.
"""

from typing import Any

import torch
from torch import Tensor


def scalars(group: dict[str, Any], lr: float) -> dict[str, float]:
    """The decay scalars of a step, in double; each is neutral where its form is not chosen.

    L1 follows weight decay: coupled where the decay is coupled, a soft threshold where it is decoupled.
    """
    l2, l1 = float(group["weight_decay"]), float(group["l1"])
    if group.get("decoupled_weight_decay"):
        return {"l2": 0.0, "l1": 0.0, "decay": 1 - lr * l2, "soft_threshold": lr * l1}
    return {"l2": l2, "l1": l1, "decay": 1.0, "soft_threshold": 0.0}


def coupled(g: Tensor, p: Tensor, l2: float, l1: float) -> Tensor:
    """g + l2*p + l1*sign(p), with sign(0) = 0."""
    g = g + l2 * p if l2 else g
    return g + l1 * torch.sign(p)


def decoupled(p: Tensor, decay: float) -> Tensor:
    """p*(1 - lr*weight_decay)."""
    return p * decay


def soft_threshold(p: Tensor, threshold: float) -> Tensor:
    """sign(p)*max(|p| - lr*l1, 0), the proximal step of an L1 penalty."""
    return torch.copysign((p.abs() - threshold).clamp(min=0), p)


def check(group: dict[str, Any]) -> None:
    """Raise ValueError unless l1 is a finite number >= 0."""
    l1 = group["l1"]
    if not isinstance(l1, (int, float)) or not 0 <= l1 < float("inf"):
        raise ValueError(f"Invalid l1 value: {l1!r}; give a finite number >= 0")
