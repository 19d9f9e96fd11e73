"""Verification before timing: the first steps of each variant against the same steps in float64."""

from collections.abc import Iterator

import torch
from case import EMA_DECAY, Case, Data
from torch import Tensor
from variants import Variant

from fuseopt.verify import recipe

FACTORS = (1.0, 0.5, 0.75)  # of the gradient, at the steps that are compared

# A result r may differ from the float64 one by CHANGE*(|d| + mean|d|) + 3*eps*|r|, where d is what the steps
# changed and eps the spacing of the dtype at 1. It is d that is compared, since r is mostly the start.
CHANGE = {torch.float32: 1e-4, torch.bfloat16: 2**-4}

CHUNK = 2**18  # entries at a time, so that what is computed in between stays in the cache
Piece = list[tuple[int, int, int]]  # (tensor, first entry, last + 1) of entries that follow each other


def pieces(case: Case) -> Iterator[tuple[slice, Piece]]:
    """The case's entries in chunks: where each lies in the flat vectors, and in the tensors."""
    begin, place, piece = 0, 0, []
    for k, shape in enumerate(case.shapes):
        n, done = torch.Size(shape).numel(), 0
        while done < n:
            take = min(n - done, CHUNK - (place - begin))
            piece.append((k, done, done + take))
            done, place = done + take, place + take
            if place - begin == CHUNK:
                yield slice(begin, place), piece
                begin, piece = place, []
    if piece:
        yield slice(begin, place), piece


def take_steps(data: Data, variant: Variant) -> None:
    """The steps that are compared, with a fresh variant."""
    for g in gradients(data, slice(None)):
        variant.set_gradient(data, g)
        variant.step()


def problems(case: Case, data: Data, variants: list[Variant]) -> list[str | None]:
    """What is wrong with each variant, which has taken the steps; None if nothing is.

    The float64 steps are taken chunk by chunk for all variants together: whole, they would not fit in memory.
    """
    found: list[str | None] = [None] * len(variants)
    clips = [_clip(data, g) if case.full else 1.0 for g in gradients(data, slice(None))]
    for freezes in (False, True):
        todo = [k for k, v in enumerate(variants) if v.freezes == freezes]
        for part, piece in pieces(case) if todo else ():
            expected = _steps(case, data, part, clips, freezes)
            for k in todo:
                if found[k] is None:
                    found[k] = _problem(case, data, variants[k], part, piece, expected)
    return found


def _problem(
    case: Case, data: Data, variant: Variant, part: slice, piece: Piece, expected: dict[str, Tensor]
) -> str | None:
    """What is wrong with a variant among some entries."""
    for name, right in expected.items():
        if name not in ("parameters", "EMA") and not variant.exact:
            continue  # its state is another one
        if name in ("parameters", "EMA"):
            tensors, start = (variant.params if name == "parameters" else variant.averages()), data.start[part].double()
        else:
            tensors, start = [variant.opt.state[p][name] for p in variant.params], right.new_zeros(())
        got = torch.cat([tensors[k].detach().reshape(-1)[a:b] for k, a, b in piece])
        change = CHANGE[case.dtype] if variant.exact else variant.change
        if wrong := _compare(got.double(), right, start, case.dtype, change):
            return f"{name}, among entries {part.start} to {part.stop}: {wrong}"
    return None


def _clip(data: Data, gradient: Tensor) -> float:
    norm = float(torch.where(data.effective, gradient, 0).norm(dtype=torch.float64))
    return min(1.0, data.max_grad_norm / (norm + 1e-6))


def _steps(case: Case, data: Data, part: slice, clips: list[float], freezes: bool) -> dict[str, Tensor]:
    """Parameters, moments and EMA of some entries after the steps, by torch.optim in float64 and torch.where."""
    start, effective = data.start[part].double(), data.effective[part]
    p, ema = start.clone(), None
    opt = oracle(case, [p])
    for gradient, clip in zip(gradients(data, part), clips, strict=True):
        p.grad = torch.where(effective, gradient.double(), 0.0) * clip
        opt.step()
        if freezes:
            p.copy_(torch.where(data.keep[part], p, start))
        ema = p.clone() if ema is None else ema.lerp_(p, 1 - EMA_DECAY)
    state = opt.state[p]
    moments = {name: state[name] for name in recipe.MOMENTS[type(opt)] if state.get(name) is not None}
    return {"parameters": p, **moments, **({"EMA": ema} if case.averaged else {})}


def oracle(case: Case, params: list[Tensor]) -> torch.optim.Optimizer:
    """torch's plain optimizer of the case's rule."""
    if case.torch_class is None:  # Lion
        return recipe.Lion(params, **{"betas": (0.9, 0.99), "maximize": False} | case.options)
    return case.torch_class(params, **case.options)


def gradients(data: Data, part: slice) -> Iterator[Tensor]:
    """The gradient of each step that is compared, of some entries.

    In a full case fuseopt selects what is pruned at the end of its first step, so until then pruned entries
    have no gradient.
    """
    for k, factor in enumerate(FACTORS):
        g = data.gradient[part] * factor
        yield torch.where(data.pruned[part], 0, g) if k == 0 else g


def _compare(got: Tensor, expected: Tensor, start: Tensor, dtype: torch.dtype, change: float) -> str | None:
    """None if every entry is what is expected and moved from the start where that did."""
    moved = (expected - start).abs()
    allowed = change * (moved + moved.mean()) + len(FACTORS) * torch.finfo(dtype).eps * expected.abs()
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
