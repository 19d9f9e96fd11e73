"""Adagrad (Duchi, Hazan & Singer 2011), as torch defines it."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer, StageOptions, Unpack


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """torch.optim.Adagrad in one pass (Duchi, Hazan & Singer 2011).

        sum = sum + g^2
        p = p - lr/(1 + (t - 1)*lr_decay) * g / (sqrt(sum) + eps)

    t counts the parameter's steps from 1. State: `step` (0-dim, fp32) and `sum`, in the parameter's shape and dtype.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, as torch takes them.
        lr: step size, >= 0; a one-element tensor is read anew at each step.
        lr_decay: at least 0.
        weight_decay: at least 0; coupled: weight_decay*p is added to g.
        initial_accumulator_value: what `sum` starts from, >= 0; the constructor's, whatever a group says.
        eps: added to the root, >= 0.
        foreach, fused: accepted and change nothing.
        maximize: ascend: the gradient's sign is turned.
        differentiable: must be False; True raises ValueError.
        decoupled_weight_decay: `p = p*(1 - lr*weight_decay)` first, not coupled; torch's has no such option.
        **stages: max_grad_norm, l1, ema, prune, statistics, backend, sharded: see FusedOptimizer.

    Raises what torch raises for wrong values, and TypeError for an unknown option.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **stages: Unpack[StageOptions],
    ) -> None:
        self._set_stage_defaults(stages, differentiable, decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            fused=fused,
        )

    @staticmethod
    def kernel(group: dict[str, Any]) -> str:
        return "adagrad"

    @staticmethod
    def slots(group: dict[str, Any]) -> tuple[str, ...]:
        return ("sum",)

    @staticmethod
    def initial(defaults: dict[str, Any]) -> float:
        return defaults["initial_accumulator_value"]

    @staticmethod
    def counters(group: dict[str, Any]) -> tuple[str, ...]:
        return ("step",)

    @staticmethod
    def hyper(group: dict[str, Any]) -> tuple[float, ...]:
        return float(group["lr"]), float(group["lr_decay"]), float(group["eps"])

    @staticmethod
    def update(
        p: Tensor, g: Tensor, slot: dict[str, Tensor], counter: dict[str, float], hyper: tuple[float, ...]
    ) -> Tensor:
        lr, lr_decay, eps = hyper
        t = counter["step"] = counter["step"] + 1
        slot["sum"] = total = slot["sum"] + g * g
        return p - lr / (1 + (t - 1) * lr_decay) * g / (total.sqrt() + eps)
