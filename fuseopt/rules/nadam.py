"""NAdam: Adam with Nesterov momentum (Dozat 2016), as torch defines it."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer, StageOptions, Unpack


class NAdam(FusedOptimizer, torch.optim.NAdam):
    """torch.optim.NAdam in one pass: Adam with Nesterov momentum (Dozat 2016).

        mu_t = b1*(1 - 0.96^(t*momentum_decay)/2)
        M_t = mu_1 * mu_2 * ... * mu_t
        m, v = as in Adam
        denom = sqrt(v/(1 - b2^t)) + eps
        p = p - lr*(1 - mu_t)/(1 - M_t) * g/denom - lr*mu_(t+1)/(1 - M_t*mu_(t+1)) * m/denom

    State: `step` and `mu_product` (M_t), both 0-dim, fp32; `exp_avg` (m) and `exp_avg_sq` (v), in the parameter's shape
    and dtype.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either, as torch takes them.
        lr: step size, >= 0; a one-element tensor is read anew at each step.
        betas: (b1, b2), each in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: at least 0; coupled: weight_decay*p is added to g.
        momentum_decay: at least 0; how fast mu_t grows to b1.
        decoupled_weight_decay: as AdamW: `p = p*(1 - lr*weight_decay)` first.
        foreach: accepted and changes nothing.
        maximize: ascend: the gradient's sign is turned.
        capturable: let a CUDA graph capture the step; on other devices it changes nothing.
        differentiable: must be False; True raises ValueError.
        **stages: max_grad_norm, l1, ema, prune, statistics, backend, sharded: see FusedOptimizer.

    Raises what torch raises for wrong values, and TypeError for an unknown option.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **stages: Unpack[StageOptions],
    ) -> None:
        self._set_stage_defaults(stages, differentiable)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
        )

    @staticmethod
    def kernel(group: dict[str, Any]) -> str:
        return "nadam"

    @staticmethod
    def slots(group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    @staticmethod
    def counters(group: dict[str, Any]) -> tuple[str, ...]:
        return ("step", "mu_product")

    @staticmethod
    def hyper(group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["momentum_decay"])

    @staticmethod
    def update(
        p: Tensor, g: Tensor, slot: dict[str, Tensor], counter: dict[str, float], hyper: tuple[float, ...]
    ) -> Tensor:
        lr, beta1, beta2, eps, momentum_decay = hyper
        t = counter["step"] = counter["step"] + 1
        mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
        grown = torch.tensor(counter["mu_product"]) * torch.tensor(mu)  # in the default type, as torch keeps it
        product = counter["mu_product"] = float(grown)
        slot["exp_avg"] = m = torch.lerp(slot["exp_avg"], g, 1 - beta1)
        slot["exp_avg_sq"] = v = beta2 * slot["exp_avg_sq"] + (1 - beta2) * g * g
        denom = (v / (1 - beta2**t)).sqrt() + eps
        p = p - lr * (1 - mu) / (1 - product) * g / denom
        return p - lr * mu_next / (1 - product * mu_next) * m / denom
