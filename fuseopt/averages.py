"""Which parameters have an average, and where it belongs in a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .checks import name_of
from .distributed import drop_gathered, local
from .interrupts import held


def made(opt, p: Tensor, k: int) -> bool:
    """Whether parameter p has average k, and a value in it."""
    return f"ema_{k}" in opt.state.get(p, {}) and f"ema_{k}" not in opt._placeholders.get(p, ())


def find_placeholders(opt) -> None:
    """Note which averages hold no value yet: those that are NaN throughout."""
    opt._placeholders.clear()
    for p, state in opt.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            if key.startswith("ema_") and isinstance(value, Tensor) and _all_nan(local(value)):
                opt._placeholders.setdefault(p, set()).add(key)


def _all_nan(x: Tensor) -> bool:
    return x.numel() > 0 and bool(x.flatten()[0].isnan()) and bool(x.isnan().all())


def of(opt, k: int) -> list[tuple[Tensor, Tensor]]:
    """(parameter, average) of every parameter that has average k. Raises ValueError if none has."""
    params = [p for group in opt.param_groups for p in group["params"] if made(opt, p, k)]
    if not params:
        kept = max(len(group["ema"]) for group in opt.param_groups)
        why = "take a step first" if isinstance(k, int) and 0 <= k < kept else "pass ema=fuseopt.EMA(decay)"
        raise ValueError(f"there is no average {k}: {why}")
    return [(p, opt.state[p][f"ema_{k}"]) for p in params]


@contextmanager
def swapped(opt, k: int) -> Iterator[None]:
    """What FusedOptimizer.swap_ema returns."""
    if opt._swapped:
        raise RuntimeError("swap_ema() inside swap_ema(): leave the first with-block before another")
    saved = [(p, p.detach().clone(), average) for p, average in of(opt, k)]

    # Detached, not under torch.no_grad(): an interrupt as that begins or ends would leave gradients off for good.
    def put_back() -> None:
        drop_gathered()
        for p, own, _ in saved:
            p.detach().copy_(own)
        opt._swapped.clear()

    try:
        opt._swapped.append(k)
        drop_gathered()
        for p, _, average in saved:
            p.detach().copy_(average)
        yield
    finally:
        try:
            with held():
                put_back()
        except BaseException:  # an interrupt came before they were held, or waited until the end
            put_back()
            raise


def match(opt, model: torch.nn.Module, k: int) -> list[tuple[Tensor, Tensor]]:
    """(parameter of model, what copy_ema_to writes to it) for each of the optimizer's parameters.

    That is average k, or the parameter itself where it was never stepped and so has none. Raises
    ValueError where the two do not match.
    """
    averaged = dict(of(opt, k))
    sources = {p: averaged.get(p, p) for group in opt.param_groups for p in group["params"]}
    drop_gathered()  # or the model would show us the gathered copies, which are lost when written
    own = {id(p) for p in model.parameters()}
    if all(id(p) in own for p in sources):
        return list(averaged.items())
    names = {p: n for g in opt.param_groups for p, n in zip(g["params"], g.get("param_names") or (), strict=False)}
    targets = dict(model.named_parameters())
    matched = []
    for p, source in sources.items():
        if p not in names or names[p] not in targets:
            raise ValueError(
                f"the model has no parameter {name_of(opt, p)}; build the optimizer from model.named_parameters()"
            )
        target = targets[names[p]]
        if target.shape != source.shape:
            raise ValueError(f"{names[p]!r} has shape {tuple(target.shape)}, its average {tuple(source.shape)}")
        matched.append((target, source))
    return matched
