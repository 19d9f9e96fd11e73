"""Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), with AMSGrad (Reddi et al. 2018)."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer, StageOptions, Unpack


class Adam(FusedOptimizer, torch.optim.Adam):
    """torch.optim.Adam in one pass (Kingma & Ba 2015; with amsgrad Reddi, Kale & Kumar 2018).

        m = b1*m + (1 - b1)*g
        v = b2*v + (1 - b2)*g^2
        p = p - lr/(1 - b1^t) * m / (sqrt(v)/sqrt(1 - b2^t) + eps)

    t counts the parameter's steps from 1. State: `step` (0-dim, fp32), `exp_avg` (m), `exp_avg_sq` (v) and, with
    amsgrad, `max_exp_avg_sq`, in the parameter's shape and dtype.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, as torch takes them.
        lr: step size, >= 0; a one-element tensor is read anew at each step.
        betas: (b1, b2), each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: at least 0; coupled: weight_decay*p is added to g.
        amsgrad: the largest v so far takes v's place in the denominator.
        foreach, fused: accepted and change nothing.
        maximize: ascend: the gradient's sign is turned.
        capturable: let a CUDA graph capture the step; on other devices it changes nothing.
        differentiable: must be False; True raises ValueError.
        decoupled_weight_decay: as AdamW: `p = p*(1 - lr*weight_decay)` first.
        **stages: max_grad_norm, l1, ema, prune, statistics, backend, sharded: see FusedOptimizer.

    Raises what torch raises for wrong values, and TypeError for an unknown option.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **stages: Unpack[StageOptions],
    ) -> None:
        self._set_stage_defaults(stages, differentiable, decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            fused=fused,
        )

    @staticmethod
    def kernel(group: dict[str, Any]) -> str:
        return "adam_amsgrad" if group["amsgrad"] else "adam"

    @staticmethod
    def slots(group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    @staticmethod
    def counters(group: dict[str, Any]) -> tuple[str, ...]:
        return ("step",)

    @staticmethod
    def hyper(group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(group["lr"]), float(beta1), float(beta2), float(group["eps"])

    @staticmethod
    def update(
        p: Tensor, g: Tensor, slot: dict[str, Tensor], counter: dict[str, float], hyper: tuple[float, ...]
    ) -> Tensor:
        lr, beta1, beta2, eps = hyper
        t = counter["step"] = counter["step"] + 1
        slot["exp_avg"] = m = torch.lerp(slot["exp_avg"], g, 1 - beta1)
        slot["exp_avg_sq"] = v = beta2 * slot["exp_avg_sq"] + (1 - beta2) * g * g
        if "max_exp_avg_sq" in slot:
            slot["max_exp_avg_sq"] = v = torch.maximum(slot["max_exp_avg_sq"], v)
        denom = v.sqrt() / math.sqrt(1 - beta2**t) + eps
        return p - lr / (1 - beta1**t) * m / denom


class AdamW(Adam, torch.optim.AdamW):
    """torch.optim.AdamW in one pass: Adam with decoupled weight decay (Loshchilov & Hutter 2019).

        p = p*(1 - lr*weight_decay)
        m, v, p = as in Adam

    State as Adam's.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, as torch takes them.
        lr: step size, >= 0; a one-element tensor is read anew at each step.
        betas: (b1, b2), each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: at least 0, decoupled.
        amsgrad: the largest v so far takes v's place in the denominator.
        maximize: ascend: the gradient's sign is turned.
        foreach, fused: accepted and change nothing.
        capturable: let a CUDA graph capture the step; on other devices it changes nothing.
        differentiable: must be False; True raises ValueError.
        **stages: max_grad_norm, l1, ema, prune, statistics, backend, sharded: see FusedOptimizer.

    Raises what torch raises for wrong values, and TypeError for an unknown option.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **stages: Unpack[StageOptions],
    ) -> None:
        self._set_stage_defaults(stages, differentiable, decoupled_weight_decay=True)
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
