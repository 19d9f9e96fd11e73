"""Averages as the state_dicts of other classes hold them, and back.

"model": model.state_dict(). "averaged_model": torch.optim.swa_utils.AveragedModel. "timm": ModelEmaV3 (both
hold the model under "module."). "diffusers": EMAModel, the parameters in a list, in the model's order.
"""

from typing import Any

import torch
from torch import Tensor

from . import buffers, ema_state
from .checks import name_of
from .distributed import is_dtensor, local, part, placed_alike
from .interrupts import held
from .plan import make_state
from .stages import ema, mask

FORMATS = ("model", "averaged_model", "timm", "diffusers")
PREFIX = "module."


# ---- writing -------------------------------------------------------------------------------------


@torch.no_grad()
def write(opt, model: torch.nn.Module, k: int, format: str) -> dict[str, Any]:
    """What FusedOptimizer.ema_state_dict returns."""
    if format not in FORMATS:
        raise ValueError(f"Invalid format: {format!r}; use one of {', '.join(map(repr, FORMATS))}")
    group = ema_state.configured(opt, k)[0]
    options = group["ema"][k]
    count = ema.updates(options, group["steps"])
    pairs = ema_state.match(opt, model, k) + buffers.match(opt, model, k)
    if format != "model" and any(is_dtensor(target) for target, _ in pairs):
        raise ValueError(
            f"format {format!r} is of whole parameters, and the model's are shared by processes; use format='model' "
            "and torch.distributed.checkpoint, or copy_ema_to a whole model and write that one's"
        )
    sources = {id(target): source for target, source in pairs}
    if format == "diffusers":
        shadow = [sources.get(id(p), p).detach().clone() for p in model.parameters()]
        return {**_diffusers_schedule(options), "optimization_step": count, "shadow_params": shadow}
    out = _state_dict(model, sources, own_dtype=format == "model")
    if format == "model":
        return out
    head = {"n_averaged": torch.tensor(count)} if format == "averaged_model" else {}
    return head | {PREFIX + name: value for name, value in out.items()}


def _state_dict(model: torch.nn.Module, sources: dict[int, Tensor], own_dtype: bool) -> dict[str, Any]:
    """A snapshot of model.state_dict(), with `sources` in place of the tensors with these ids."""
    out = model.state_dict()
    for name, value in out.items():
        if isinstance(value, Tensor):
            out[name] = value.detach().clone()
    for name, target in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        source = sources.get(id(target))
        if source is not None and name in out:
            if own_dtype:
                here, fits = local(out[name]), placed_alike(target, source)
                here.copy_(local(source) if fits else part(target, source))
            else:
                out[name] = source.detach().clone()
    return out


def _diffusers_schedule(options: dict) -> dict[str, Any]:
    """The arguments of diffusers' EMAModel that make the same decays."""
    warmup, decay = options["warmup"], options["decay"]
    if warmup == "edm2":
        raise ValueError("diffusers' EMAModel has no schedule 'edm2'; use format 'model', 'averaged_model' or 'timm'")
    return {
        "decay": 1.0 if warmup == "swa" else float(decay),
        "min_decay": float(decay) if warmup is None else 0.0,
        "update_after_step": 0,
        "use_ema_warmup": warmup in ("timm", "swa"),
        "inv_gamma": 1.0,
        "power": 1.0 if warmup == "swa" else 2 / 3,
    }


# ---- reading -------------------------------------------------------------------------------------


def read(opt, state_dict: dict[str, Any], model: torch.nn.Module, k: int, updates: int | None) -> None:
    """What FusedOptimizer.load_ema_state_dict does."""
    groups = ema_state.configured(opt, k)
    if updates is not None and (not isinstance(updates, int) or updates < 0):
        raise ValueError(f"Invalid updates: {updates!r}; give a whole number of updates, at least 0")
    if not isinstance(state_dict, dict):
        raise TypeError(f"the averages are {type(state_dict).__name__}, not a dict; give what a state_dict() returned")
    found, others, count = _parse(state_dict, model)
    if count is not None and updates not in (None, count):
        raise ValueError(f"updates={updates}, but the state_dict has had {count}; leave updates out")
    count = updates if count is None else count
    starts = [_start(group, group["ema"][k], count) for group in groups]
    pairs = [(p, found[id(target)]) for p, target in ema_state.targets(opt, model, k)]
    for p, value in pairs:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != p.shape:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the average of {name_of(opt, p)} is {what}, the parameter {tuple(p.shape)}")
    make_state(opt)
    with held():
        _put(opt, k, pairs, empty=count == 0)
        if others and count != 0 and f"ema_{k}" in opt.param_groups[0].get(buffers.KEY, {}):
            buffers.load(opt, k, others)
        for group, start in zip(groups, starts, strict=True):
            group["ema"][k]["start"] = start


def _parse(state_dict: dict, model: torch.nn.Module) -> tuple[dict[int, Any], dict[str, Tensor], int | None]:
    """({id of a parameter of model: its average}, {name: average of a buffer}, updates or None if it does not tell)."""
    if "shadow_params" in state_dict:
        shadow, params = state_dict["shadow_params"], list(model.parameters())
        if not isinstance(shadow, (list, tuple)) or len(shadow) != len(params):
            size = len(shadow) if isinstance(shadow, (list, tuple)) else type(shadow).__name__
            raise ValueError(f"'shadow_params' has {size} entries, the model {len(params)} parameters; give its model")
        count = state_dict.get("optimization_step")
        count = None if count is None else max(0, int(count) - int(state_dict.get("update_after_step") or 0))
        return dict(zip(map(id, params), shadow, strict=True)), {}, count
    entries, count = dict(state_dict), state_dict.get("n_averaged")
    own = model.state_dict().keys()
    if entries.keys() != own:
        entries.pop("n_averaged", None)
        entries = {name.removeprefix(PREFIX) if name.startswith(PREFIX) else name: v for name, v in entries.items()}
    if entries.keys() != own:
        missing, odd = sorted(own - entries.keys()), sorted(entries.keys() - own)
        raise ValueError(
            f"the averages are not of this model: missing {_some(missing)}, unexpected {_some(odd)}; give a "
            "state_dict of AveragedModel, ModelEmaV3, EMAModel or of the model itself"
        )
    params = {id(p): entries[name] for name, p in model.named_parameters() if name in entries}
    others = {name: entries[name] for name, _ in model.named_buffers() if name in entries}
    for name, b in model.named_buffers():
        if name in others and (not isinstance(others[name], Tensor) or others[name].shape != b.shape):
            raise ValueError(f"buffer {name!r} of the averages is not of shape {tuple(b.shape)}, as the model's is")
    return params, others, None if count is None else int(count)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" and more" if len(names) > 3 else "") or "none"


def _start(group: dict, options: dict, count: int | None) -> int:
    """The option `start` with which an average goes on from so many updates; None: from this optimizer's own."""
    if count is None and ema.updates(options, group["steps"]):
        return options["start"]
    if count is None and options["warmup"] is not None:
        raise ValueError(
            f"warmup={options['warmup']!r} needs to know how many updates the average has had, which neither the "
            "state_dict nor this optimizer tells; pass updates="
        )
    return group["steps"] - (count or 0) * options["every"]


@torch.no_grad()
def _put(opt, k: int, pairs: list[tuple[Tensor, Tensor]], empty: bool) -> None:
    """Write the averages into the state; empty: they have no value yet."""
    key = f"ema_{k}"
    for p, value in pairs:
        state, options = opt.state[p], next(g for g in opt.param_groups if any(q is p for q in g["params"]))["ema"][k]
        if key not in state:  # of a parameter that is not trained
            state[key] = torch.empty_like(p, dtype=ema.dtype_of(options, p))
        if empty:
            state[key].fill_(torch.nan)
            opt._placeholders.setdefault(key, set()).add(p)
            continue
        here = local(state[key])
        here.copy_(local(value) if placed_alike(p, value) else part(p, value))
        pruned = mask.pruned(state, local(p))
        if pruned is not None:
            here.masked_fill_(pruned, 0.0)
        opt._placeholders.get(key, set()).discard(p)
