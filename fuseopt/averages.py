"""Which parameters have an average, and where it belongs in a model."""

import torch
from torch import Tensor

from .checks import name_of


def of(opt, k: int) -> list[tuple[Tensor, Tensor]]:
    """(parameter, average) of every parameter that has average k. Raises ValueError if none has."""
    pairs = [
        (p, opt.state[p][f"ema_{k}"])
        for group in opt.param_groups
        for p in group["params"]
        if p in opt.state and f"ema_{k}" in opt.state[p]
    ]
    if not pairs:
        kept = max(len(group["ema"]) for group in opt.param_groups)
        why = "take a step first" if isinstance(k, int) and 0 <= k < kept else "pass ema=fuseopt.EMA(decay)"
        raise ValueError(f"there is no average {k}: {why}")
    return pairs


def match(opt, model: torch.nn.Module, k: int) -> list[tuple[Tensor, Tensor]]:
    """(parameter of model, average) for copy_ema_to. Raises ValueError where they do not match."""
    pairs = of(opt, k)
    own = {id(p) for p in model.parameters()}
    if all(id(p) in own for p, _ in pairs):
        return pairs
    targets = dict(model.named_parameters())
    matched = []
    for p, average in pairs:
        name = name_of(opt, p).strip("'")
        if name not in targets:
            raise ValueError(f"the model has no parameter {name}; build the optimizer from model.named_parameters()")
        if targets[name].shape != average.shape:
            raise ValueError(f"{name!r} has shape {tuple(targets[name].shape)}, its average {tuple(average.shape)}")
        matched.append((targets[name], average))
    return matched
