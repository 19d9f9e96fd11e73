"""Verification before timing: a variant's first steps against the same steps in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor
from variants import EMA_DECAY, LR, MOMENTUM, WEIGHT_DECAY, Case, Data, Variant

FACTORS = (1.0, 0.5, 0.75)  # of the gradient, at the steps that are compared

# A result r may differ from the float64 one by CHANGE*(|d| + mean|d|) + 3*eps*|r|, where d is what the steps
# changed and eps the spacing of the dtype at 1. It is d that is compared, since r is mostly the start.
CHANGE = {torch.float32: 1e-4, torch.bfloat16: 2**-4}


class Oracle:
    """Start and result of the case in float64, by torch.optim on one flat tensor and torch.where."""

    def __init__(self, case: Case, data: Data, freezes: bool):
        self.start = data.start.double()
        p = self.start.clone()
        kind = torch.optim.SGD if case.rule == "sgd" else torch.optim.AdamW
        options = {"momentum": MOMENTUM} if case.rule == "sgd" else {"weight_decay": WEIGHT_DECAY}
        opt = kind([p], lr=LR, **options)
        self.ema = None
        for gradient in gradients(case, data):
            p.grad = torch.where(data.effective, gradient.double(), 0.0)
            if case.full:
                p.grad *= min(1.0, data.max_grad_norm / (float(p.grad.norm()) + 1e-6))
            opt.step()
            if freezes:
                p.copy_(torch.where(data.keep, p, self.start))
            self.ema = p.clone() if self.ema is None else self.ema.lerp_(p, 1 - EMA_DECAY)
        self.p = p
        self.moments = {key: value for key, value in opt.state[p].items() if key != "step"}


def gradients(case: Case, data: Data) -> Iterator[Tensor]:
    """The gradient of each step that is compared.

    In a full case fuseopt selects what is pruned at the end of its first step, so until then pruned entries
    have no gradient.
    """
    for k, factor in enumerate(FACTORS):
        g = data.gradient * factor
        yield torch.where(data.pruned, 0, g) if k == 0 else g


def problem(case: Case, data: Data, variant: Variant, oracle: Oracle) -> str | None:
    """Take the steps with a fresh variant; None if all is right, otherwise what is not."""
    for g in gradients(case, data):
        variant.set_gradient(data, g)
        variant.step()
    eps = torch.finfo(case.dtype).eps
    found = _compare("parameters", variant.params, oracle.p, oracle.start, CHANGE[case.dtype], eps)
    zero = torch.zeros((), dtype=torch.float64)
    for key, expected in oracle.moments.items():
        moments = [variant.opt.state[p][key] for p in variant.params]
        found = found or _compare(key, moments, expected, zero, CHANGE[case.dtype], eps)
    if case.full:
        averages = variant.averages()
        found = found or _compare("EMA", averages, oracle.ema, oracle.start, CHANGE[case.dtype], eps)
    return found


def _compare(what: str, tensors: list[Tensor], expected: Tensor, start: Tensor, change: float, eps: float) -> str | None:
    """None if the tensors together are what is expected, entry by entry, and moved where it did."""
    got = torch.cat([t.detach().reshape(-1) for t in tensors]).double()
    moved = (expected - start).abs()
    allowed = change * (moved + moved.mean()) + len(FACTORS) * eps * expected.abs()
    wrong = ~((got - expected).abs() <= allowed)  # also where NaN
    if wrong.any():
        k = int(wrong.nonzero()[0])
        return f"{what}: {int(wrong.sum())} of {got.numel()} differ; entry {k} is {got[k]:.9g}, not {expected[k]:.9g}"
    stuck = (moved > allowed) & (got == start)
    if stuck.any():
        return f"{what}: {int(stuck.sum())} of {got.numel()} entries did not move"
    drifted = (moved == 0) & (got != start)
    if drifted.any():
        return f"{what}: {int(drifted.sum())} of {got.numel()} entries moved that should not"
    return None
