"""NAdam: Adam with Nesterov momentum (Dozat 2016), as torch defines it."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer, StageOptions, Unpack


class NAdam(FusedOptimizer, torch.optim.NAdam):
    """torch.optim.NAdam in one pass.

    mu_t = b1*(1 - 0.96^(t*momentum_decay)/2);  M_t = mu_1*...*mu_t;  m, v as in Adam;
    denom = sqrt(v/(1-b2^t)) + eps;
    p = p - lr*(1-mu_t)/(1-M_t) * g/denom - lr*mu_{t+1}/(1-M_t*mu_{t+1}) * m/denom

    Arguments are torch's, then the stage options of FusedOptimizer by keyword. foreach is accepted and changes nothing;
    are accepted and change nothing. Raises what torch raises for wrong values.
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
