"""Which parameters have an average, and where it belongs in a model."""

import torch
from torch import Tensor

from .checks import name_of
from .distributed import drop_gathered, local
from .plan import is_placeholder
from .stages.ema import is_empty


def made(opt, p: Tensor, k: int) -> bool:
    """Whether parameter p has average k, and a value in it."""
    key = f"ema_{k}"
    return key in opt.state.get(p, {}) and not is_placeholder(opt, p, key)


def find_placeholders(opt, untouched: bool) -> None:
    """Note what holds no value yet: averages that are NaN throughout; before the first step every moment."""
    opt._placeholders.clear()
    for group in opt.param_groups if untouched and opt.state else ():
        for key in opt.slots(group):
            made = {p for p in group["params"] if opt.state.get(p, {}).get(key) is not None}
            opt._placeholders.setdefault(key, set()).update(made)
    for p, state in opt.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            if key.startswith("ema_") and isinstance(value, Tensor) and local(value).numel() and is_empty(local(value)):
                opt._placeholders.setdefault(key, set()).add(p)


def configured(opt, k: int) -> list[dict]:
    """The parameter groups that keep an average k. Raises ValueError if none does."""
    groups = [group for group in opt.param_groups if isinstance(k, int) and 0 <= k < len(group["ema"])]
    if not groups:
        most = max(len(group["ema"]) for group in opt.param_groups)
        kept = f"the optimizer keeps {most}, counted from 0" if most else "pass ema=fuseopt.EMA(decay)"
        raise ValueError(f"there is no average {k}: {kept}")
    return groups


def of(opt, k: int) -> list[tuple[Tensor, Tensor]]:
    """(parameter, average) of every parameter whose average k has a value."""
    params = [p for group in configured(opt, k) for p in group["params"] if made(opt, p, k)]
    return [(p, opt.state[p][f"ema_{k}"]) for p in params]


def targets(opt, model: torch.nn.Module, k: int) -> list[tuple[Tensor, Tensor]]:
    """(parameter of the optimizer that keeps an average k, the parameter of model that it is).

    By identity or else by name. Groups without that average may be of another model. Raises ValueError where
    optimizer and model do not match.
    """
    params = [p for group in configured(opt, k) for p in group["params"]]
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"Invalid model: {type(model).__name__}; give the torch.nn.Module")
    drop_gathered()  # or the model would show us the gathered copies, which are lost when written
    own = {id(p) for p in model.parameters()}
    if all(id(p) in own for p in params):
        return [(p, p) for p in params]
    names = {p: n for g in opt.param_groups for p, n in zip(g["params"], g.get("param_names") or (), strict=False)}
    others = dict(model.named_parameters(remove_duplicate=False))
    matched = []
    for p in params:
        if p not in names:
            raise ValueError(
                f"the model does not hold {name_of(opt, p)}, and there are no names to go by; give the trained model, "
                "or build the optimizer from model.named_parameters()"
            )
        if names[p] not in others:
            raise ValueError(
                f"the model has no parameter {names[p]!r}; give the trained model or one of its kind, and put what it "
                "does not hold in a group with ema=None"
            )
        target = others[names[p]]
        if target.shape != p.shape:
            raise ValueError(f"{names[p]!r} has shape {tuple(target.shape)}, its average {tuple(p.shape)}")
        matched.append((p, target))
    return matched


def match(opt, model: torch.nn.Module, k: int) -> list[tuple[Tensor, Tensor]]:
    """(parameter of model, its average k) for each of the optimizer's parameters.

    The parameter itself where its average has no value yet. Raises ValueError where the two do not match.
    """
    averaged = dict(of(opt, k))
    pairs = [(target, averaged.get(p, p)) for p, target in targets(opt, model, k)]
    return [(target, source) for target, source in pairs if target is not source]
