"""Stochastic gradient descent with momentum, dampening and Nesterov's form, as torch defines them."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer, StageOptions, Unpack


class SGD(FusedOptimizer, torch.optim.SGD):
    """torch.optim.SGD in one pass (momentum: Polyak 1964; Nesterov's as in Sutskever et al. 2013).

        buf = momentum*buf + (1 - dampening)*g      at the parameter's first step buf = g
        d = g + momentum*buf if nesterov else buf
        p = p - lr*d

    Without momentum d = g and there is no state; with it, `momentum_buffer` (buf), in the parameter's shape and dtype.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, as torch takes them.
        lr: step size, >= 0; a one-element tensor is read anew at each step.
        momentum: at least 0.
        dampening: share of g that does not enter the buffer.
        weight_decay: at least 0; coupled: weight_decay*p is added to g.
        nesterov: needs momentum > 0 and dampening 0.
        maximize: ascend: the gradient's sign is turned.
        foreach, fused: accepted and change nothing.
        differentiable: must be False; True raises ValueError.
        decoupled_weight_decay: `p = p*(1 - lr*weight_decay)` first, not coupled; torch's has no such option.
        **stages: max_grad_norm, l1, ema, prune, statistics, backend, sharded: see FusedOptimizer.

    Raises what torch raises for wrong values, and TypeError for an unknown option.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **stages: Unpack[StageOptions],
    ) -> None:
        self._set_stage_defaults(stages, differentiable, decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )

    @staticmethod
    def kernel(group: dict[str, Any]) -> str:
        return "sgd_momentum" if group["momentum"] else "sgd"

    @staticmethod
    def slots(group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    @staticmethod
    def initial(defaults: dict[str, Any]) -> None:
        return None

    @staticmethod
    def counters(group: dict[str, Any]) -> tuple[str, ...]:
        return ()

    @staticmethod
    def hyper(group: dict[str, Any]) -> tuple[float, ...]:
        lr = float(group["lr"])
        if not group["momentum"]:
            return (lr,)
        return lr, float(group["momentum"]), float(group["dampening"]), float(group["nesterov"])

    @staticmethod
    def update(
        p: Tensor, g: Tensor, slot: dict[str, Tensor], counter: dict[str, float], hyper: tuple[float, ...]
    ) -> Tensor:
        if not slot:
            return p - hyper[0] * g
        lr, momentum, dampening, nesterov = hyper
        buf = g if counter["first"] else momentum * slot["momentum_buffer"] + (1 - dampening) * g
        slot["momentum_buffer"] = buf
        return p - lr * (g + momentum * buf if nesterov else buf)
