"""Lion: sign of an interpolated momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms")."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer, StageOptions, Unpack


class Lion(FusedOptimizer):
    """Lion in one pass (Chen et al. 2023, algorithm 2), with the arguments of AdamW: torch has no such class.

        p = p*(1 - lr*weight_decay)
        p = p - lr*sign(m + (1 - b1)*(g - m))
        m = m + (1 - b2)*(g - m)

    sign(0) = 0, so an entry that never had a gradient does not move. State: `exp_avg` (m), in the parameter's shape and
    dtype.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, as torch takes them.
        lr: step size, >= 0; usual values are 3 to 10 times smaller than AdamW's. A tensor is read anew at each step.
        betas: (b1, b2), each in [0, 1).
        weight_decay: at least 0, decoupled; usual values are 3 to 10 times larger than AdamW's.
        maximize: ascend: the gradient's sign is turned.
        foreach, fused: accepted and change nothing.
        capturable: let a CUDA graph capture the step; on other devices it changes nothing.
        differentiable: must be False; True raises ValueError.
        **stages: max_grad_norm, l1, ema, prune, statistics, backend, sharded: see FusedOptimizer.

    Raises ValueError for values outside these ranges, TypeError for what is no number and for an unknown option.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **stages: Unpack[StageOptions],
    ) -> None:
        self._set_stage_defaults(stages, differentiable, decoupled_weight_decay=True)
        for name, value in (("learning rate", lr), ("weight_decay", weight_decay)):
            if not isinstance(value, (int, float, Tensor)):
                raise TypeError(f"Invalid {name}: {value!r}; give a number")
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not 0.0 <= lr:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"Invalid betas: {betas!r}; give two numbers in [0, 1)")
        for k, beta in enumerate(betas):
            if not isinstance(beta, (int, float, Tensor)):
                raise TypeError(f"Invalid beta parameter at index {k}: {beta!r}; give a number in [0, 1)")
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {k}: {beta}")
        if not 0.0 <= weight_decay:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": False,
            "fused": fused,
        }
        super().__init__(params, defaults)

    @staticmethod
    def kernel(group: dict[str, Any]) -> str:
        return "lion"

    @staticmethod
    def slots(group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    @staticmethod
    def counters(group: dict[str, Any]) -> tuple[str, ...]:
        return ()

    @staticmethod
    def hyper(group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(group["lr"]), float(beta1), float(beta2)

    @staticmethod
    def update(
        p: Tensor, g: Tensor, slot: dict[str, Tensor], counter: dict[str, float], hyper: tuple[float, ...]
    ) -> Tensor:
        lr, beta1, beta2 = hyper
        m = slot["exp_avg"]
        slot["exp_avg"] = torch.lerp(m, g, 1 - beta2)
        return p - lr * torch.sign(torch.lerp(m, g, 1 - beta1))
