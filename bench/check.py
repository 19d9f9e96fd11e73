"""Verification before timing: a variant's first steps against the same steps in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor
from variants import EMA_DECAY, LR, MOMENTUM, WEIGHT_DECAY, Case, Data, Variant

FACTORS = (1.0, 0.5, 0.75)  # of the gradient, at the steps that are compared

# A result r may differ from the float64 one by CHANGE*(|d| + mean|d|) + 3*eps*|r|, where d is what the steps
# changed and eps the spacing of the dtype at 1. It is d that is compared, since r is mostly the start.
CHANGE = {torch.float32: 1e-4, torch.bfloat16: 2**-4}


CHUNK = 2**18  # entries at a time, so that what is computed in between stays in the cache


class Oracle:
    """Results of the case's first steps in float64, by torch.optim on flat tensors and torch.where."""

    def __init__(self, case: Case, data: Data, freezes: bool):
        names = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"]}[case.rule]
        names = ["parameters", *names, *(["EMA"] if case.full else [])]
        self.results = {name: torch.empty_like(data.start, dtype=torch.float64) for name in names}
        clips = [_clip(data, g) if case.full else 1.0 for g in gradients(data, slice(None))]
        for k in range(0, case.elements, CHUNK):
            part = slice(k, k + CHUNK)
            for result, value in zip(
                self.results.values(), _steps(case, data, part, clips, freezes), strict=True
            ):
                result[part] = value


def _clip(data: Data, gradient: Tensor) -> float:
    norm = float(torch.where(data.effective, gradient, 0).norm(dtype=torch.float64))
    return min(1.0, data.max_grad_norm / (norm + 1e-6))


def _steps(case: Case, data: Data, part: slice, clips: list[float], freezes: bool) -> list[Tensor]:
    """Parameters, moments and EMA of some entries after the steps."""
    start, effective = data.start[part].double(), data.effective[part]
    p, ema = start.clone(), None
    options = {"momentum": MOMENTUM} if case.rule == "sgd" else {"weight_decay": WEIGHT_DECAY}
    opt = (torch.optim.SGD if case.rule == "sgd" else torch.optim.AdamW)([p], lr=LR, **options)
    for gradient, clip in zip(gradients(data, part), clips, strict=True):
        p.grad = torch.where(effective, gradient.double(), 0.0) * clip
        opt.step()
        if freezes:
            p.copy_(torch.where(data.keep[part], p, start))
        ema = p.clone() if ema is None else ema.lerp_(p, 1 - EMA_DECAY)
    moments = [value for key, value in opt.state[p].items() if key != "step"]
    return [p, *moments, *([ema] if case.full else [])]


def gradients(data: Data, part: slice) -> Iterator[Tensor]:
    """The gradient of each step that is compared, of some entries.

    In a full case fuseopt selects what is pruned at the end of its first step, so until then pruned entries
    have no gradient.
    """
    for k, factor in enumerate(FACTORS):
        g = data.gradient[part] * factor
        yield torch.where(data.pruned[part], 0, g) if k == 0 else g


def problem(case: Case, data: Data, variant: Variant, oracle: Oracle) -> str | None:
    """Take the steps with a fresh variant; None if all is right, otherwise what is not."""
    for g in gradients(data, slice(None)):
        variant.set_gradient(data, g)
        variant.step()
    found = {"parameters": variant.params, "EMA": variant.averages()}
    for name, expected in oracle.results.items():
        tensors = found.get(name) or [variant.opt.state[p][name] for p in variant.params]
        got = torch.cat([t.detach().reshape(-1) for t in tensors])
        for k in range(0, case.elements, CHUNK):
            part = slice(k, k + CHUNK)
            start = data.start[part].double() if name in found else torch.zeros((), dtype=torch.float64)
            wrong = _compare(got[part].double(), expected[part], start, case.dtype)
            if wrong:
                return f"{name}, among entries {k} to {k + expected[part].numel()}: {wrong}"
    return None


def _compare(got: Tensor, expected: Tensor, start: Tensor, dtype: torch.dtype) -> str | None:
    """None if every entry is what is expected and moved from the start where that did."""
    moved = (expected - start).abs()
    allowed = CHANGE[dtype] * (moved + moved.mean()) + len(FACTORS) * torch.finfo(dtype).eps * expected.abs()
    wrong = ~((got - expected).abs() <= allowed)  # also where NaN
    if wrong.any():
        k = int(wrong.nonzero()[0])
        return f"{int(wrong.sum())} differ, such as {got[k]:.9g} instead of {expected[k]:.9g}"
    stuck = (moved > allowed) & (got == start)
    if stuck.any():
        return f"{int(stuck.sum())} did not move"
    drifted = (moved == 0) & (got != start)
    if drifted.any():
        return f"{int(drifted.sum())} moved that should not"
    return None
