"""The update rules: csrc/rules.h in Triton, names, order and roundings alike.

Of each rule there is `update(p, g, slot, s)`, the formula on a tile, which returns (p, slot), and beside it
`prepare(hyper, counter)`, which advances the counters (dicts of "value" and "is_double") and forms the scalars `s` in
double. The formula of a rule that divides or takes a root does so correctly rounded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl


@dataclass
class CounterValue:
    """Of a 0-dim fp32 or fp64 tensor."""

    value: float
    is_double: bool

    def advance(self) -> float:
        self.value += 1
        return self.value

    def multiply(self, by: float) -> float:
        """Rounded as the tensor rounds, before anything is formed of it: so torch does."""
        self.value = self.value * by if self.is_double else float(np.float32(self.value) * np.float32(by))
        return self.value


@triton.jit
def div(a, b):
    # fp64 has one division, the rounded one; that of fp32 is approximate unless asked.
    if (a + b).dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def lerp(m, g, w):
    """torch.lerp: m + w(g - m), written from the nearer end so that w = 1 gives g exactly."""
    near_m = w < 0.5
    return tl.fma(tl.where(near_m, w, w - 1.0), g - m, tl.where(near_m, m, g))


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


# ---- Adam ------------------------------------------------------------------------------------------


def prepare_adam(hyper, counter):
    lr, beta1, beta2, eps = hyper
    t = counter[0].advance()
    bias_correction1, bias_correction2 = 1 - beta1**t, 1 - beta2**t
    return 1 - beta1, beta2, 1 - beta2, eps, -(lr / bias_correction1), math.sqrt(bias_correction2)


@triton.jit
def adam(p, g, slot, s):
    exp_avg = lerp(slot[0], g, s[0])
    exp_avg_sq = tl.fma(s[2] * g, g, s[1] * slot[1])
    if len(slot) == 3:  # amsgrad
        second = tl.where(exp_avg_sq <= slot[2], slot[2], exp_avg_sq)  # NaN too
        slot = (exp_avg, exp_avg_sq, second)
    else:
        second = exp_avg_sq
        slot = (exp_avg, exp_avg_sq)
    denom = div(sqrt(second), s[5]) + s[3]
    return p + div(s[4] * exp_avg, denom), slot


# ---- SGD -------------------------------------------------------------------------------------------


def prepare_sgd(hyper, counter):
    return (-hyper[0],)


@triton.jit
def sgd(p, g, slot, s):
    return tl.fma(s[0], g, p), slot


def prepare_sgd_momentum(hyper, counter):
    """counter[0] is 1 where the buffer is new: it then starts as the undamped gradient."""
    lr, momentum, dampening, nesterov = hyper
    return -lr, momentum, 1 - dampening, nesterov, counter[0].value


@triton.jit
def sgd_momentum(p, g, slot, s):
    buf = tl.where(s[4] != 0, g, tl.fma(s[2], g, s[1] * slot[0]))
    return tl.fma(s[0], tl.where(s[3] != 0, tl.fma(s[1], buf, g), buf), p), (buf,)


# ---- NAdam -----------------------------------------------------------------------------------------


def prepare_nadam(hyper, counter):
    lr, beta1, beta2, eps, momentum_decay = hyper
    t = counter[0].advance()
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = counter[1].multiply(mu)
    grad_step, moment_step = -lr * (1 - mu) / (1 - product), -lr * mu_next / (1 - product * mu_next)
    return 1 - beta1, beta2, 1 - beta2, eps, 1 - beta2**t, grad_step, moment_step


@triton.jit
def nadam(p, g, slot, s):
    exp_avg = lerp(slot[0], g, s[0])
    exp_avg_sq = tl.fma(s[2] * g, g, s[1] * slot[1])
    denom = sqrt(div(exp_avg_sq, s[4])) + s[3]
    p = p + div(s[5] * g, denom)
    return p + div(s[6] * exp_avg, denom), (exp_avg, exp_avg_sq)


# ---- Adagrad ---------------------------------------------------------------------------------------


def prepare_adagrad(hyper, counter):
    lr, lr_decay, eps = hyper
    return -(lr / (1 + (counter[0].advance() - 1) * lr_decay)), eps


@triton.jit
def adagrad(p, g, slot, s):
    total = tl.fma(g, g, slot[0])
    return p + div(s[0] * g, sqrt(total) + s[1]), (total,)


# ---- Lion ------------------------------------------------------------------------------------------


def prepare_lion(hyper, counter):
    lr, beta1, beta2 = hyper
    return -lr, 1 - beta1, 1 - beta2


@triton.jit
def lion(p, g, slot, s):
    return tl.fma(s[0], sign(lerp(slot[0], g, s[1])), p), (lerp(slot[0], g, s[2]),)


@dataclass(frozen=True)
class Rule:
    slots: int
    scalars: int
    prepare: Callable
    update: Callable


# By their names in fuseopt/schema.py, in the order of FUSEOPT_RULES.
RULES = {
    "adam": Rule(2, 6, prepare_adam, adam),
    "adam_amsgrad": Rule(3, 6, prepare_adam, adam),
    "sgd": Rule(0, 1, prepare_sgd, sgd),
    "sgd_momentum": Rule(1, 5, prepare_sgd_momentum, sgd_momentum),
    "nadam": Rule(2, 7, prepare_nadam, nadam),
    "adagrad": Rule(1, 2, prepare_adagrad, adagrad),
    "lion": Rule(1, 3, prepare_lion, lion),
}
