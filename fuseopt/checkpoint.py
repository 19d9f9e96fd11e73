"""state_dict and load_state_dict beyond torch's: stage state keeps its type, masks travel as booleans."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cuda_memory, plan
from .distributed import placed_alike
from .options import GROUP_OPTIONS, normalise
from .schema import compute_dtype
from .stages import ema, mask, prune


def steps_of(opt) -> int:
    """The optimizer's step count as its parameters' state tells it, for checkpoints that do not hold it."""
    counts = [float(s["step"]) for s in opt.state.values() if isinstance(s, dict) and "step" in s]
    return int(max(counts, default=0))


def _numbered(opt) -> list[Tensor]:
    """The parameters in the order in which a state_dict numbers them."""
    return [p for group in opt.param_groups for p in group["params"]]


def outgoing(opt, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Masks as boolean tensors, so that a checkpoint depends neither on memory formats nor on processes."""
    pruned = {p for group in opt.param_groups if group["prune"] for p in group["params"] if prune.prunable(p)}
    for k, p in enumerate(_numbered(opt)):
        state = state_dict["state"].get(k)
        if isinstance(state, dict):
            state_dict["state"][k] = mask.saved(state, p, p in pruned)
    state_dict["param_groups"] = [_without_neutral(opt, group) for group in state_dict["param_groups"]]
    return state_dict


def _without_neutral(opt, group: dict) -> dict:
    """A group without the options that are off: an optimizer that uses none saves exactly what torch's does.

    torch.distributed.checkpoint loads only between dicts of the same keys.
    """
    off = {key for key, value in GROUP_OPTIONS.items() if group[key] == value or group[key] == []}
    scheduled = any(own["ema"] or own["prune"] for own in opt.param_groups)
    scheduled = scheduled or any("mask_t" in state for state in opt.state.values() if isinstance(state, dict))
    if "step" in opt.counters(group) and not scheduled:
        off.add("steps")  # which only schedules read; loading takes it from the state
    if isinstance(opt, (torch.optim.SGD, torch.optim.Adagrad)) and not group["decoupled_weight_decay"]:
        off.add("decoupled_weight_decay")
    return {key: value for key, value in group.items() if key not in off}


def with_own_options(opt, state_dict: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The state_dict, its groups given this optimizer's values of the options that they lack, as torch's do.

    Old checkpoints hold options that are off; lacking averages and pruning is the same as having none.
    """
    groups = []
    for own, saved in zip(opt.param_groups, state_dict["param_groups"], strict=True):
        group = {**{name: own[name] for name in names if name in own}, **saved}
        group.update({name: own[name] for name in ("ema", "prune") if name in own and not group.get(name)})
        groups.append(group)
    return {**state_dict, "param_groups": groups}


def check_form(state_dict: Any) -> None:
    """Raise ValueError or TypeError unless the checkpoint has the form of an optimizer's state_dict."""
    if not isinstance(state_dict, dict):
        found = _kind(state_dict)
        raise TypeError(f"the checkpoint is {found}, not a dict; give what an optimizer's state_dict() returns")
    for key, kind in (("state", dict), ("param_groups", list)):
        if key not in state_dict:
            raise ValueError(f"the checkpoint has no {key!r}; give what an optimizer's state_dict() returns")
        if not isinstance(state_dict[key], kind):
            raise TypeError(f"the checkpoint's {key!r} is {_kind(state_dict[key])}, not a {kind.__name__}")
    for k, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, dict):
            raise TypeError(f"the checkpoint's group {k} is {_kind(group)}, not a dict")
        if not isinstance(group.get("params"), list):
            raise ValueError(f"the checkpoint's group {k} has no list 'params'")
        steps = group.get("steps", 0)
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"the checkpoint's group {k} has {steps!r} as its 'steps'; they are a whole number >= 0")


def _kind(value: Any) -> str:
    return type(value).__name__


def check_sizes(opt, state_dict: dict[str, Any]) -> None:
    """Raise ValueError unless groups and numbers of parameters are the optimizer's."""
    sizes = [[len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], opt.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"loaded state dict has parameter groups of sizes {sizes[0]}, the optimizer {sizes[1]}")


def check(opt, state_dict: dict[str, Any]) -> None:
    """Raise ValueError or TypeError unless the groups can be stepped and every state fits its parameter."""
    groups = _groups_after_loading(opt, state_dict)
    for k, group in enumerate(groups):
        try:
            plan.group_step(opt, group, 1, 1.0)
        except KeyError as missing:
            raise ValueError(
                f"the checkpoint's group {k} lacks {missing}: it is of another optimizer than {type(opt).__name__}"
            ) from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the checkpoint's group {k} holds a wrong hyper-parameter: {error}") from None
    ids = [(k, group) for group in groups for k in group["params"]]
    for (k, group), p in zip(ids, _numbered(opt), strict=True):
        if k in state_dict["state"]:
            _check_state(opt, group, k, p, state_dict["state"][k])


def _groups_after_loading(opt, state_dict: dict[str, Any]) -> list[dict]:
    """The groups as torch's __setstate__ completes them, made in an optimizer of its own."""
    trial = object.__new__(type(opt))
    groups = copy.deepcopy(state_dict["param_groups"])
    trial.__setstate__({"defaults": opt.defaults, "state": {}, "param_groups": groups})
    return groups


def _rule_keys(*also: type) -> tuple[set[str], set[str]]:
    """State keys of all rules, and those among them that options switch on, which may be absent."""
    from . import rules  # which imports this module

    every, needed = defaultdict(lambda: True), defaultdict(lambda: False)
    found, optional = set(), set()
    for cls in (*rules.ALL, *also):
        most = {*cls.slots(every), *cls.counters(every)}
        found |= most
        optional |= most - {*cls.slots(needed), *cls.counters(needed)}
    return found, optional


def _check_state(opt, group: dict, k: int, p: Tensor, state: Any) -> None:
    """Raise ValueError or TypeError unless the state of parameter k is this rule's, of the parameter's shape."""
    if not isinstance(state, dict):
        raise TypeError(f"state of parameter {k} is {_kind(state)}, not a dict")
    slots, counters = opt.slots(group), opt.counters(group)
    expected = {*slots, *counters}
    known, optional = _rule_keys(type(opt))
    found = {key for key in known if state.get(key) is not None}
    if found and (found - expected - optional or expected - found - optional):
        raise ValueError(
            f"state of parameter {k} holds {', '.join(sorted(found))}, but {type(opt).__name__} keeps "
            f"{', '.join(sorted(expected)) or 'none'}: the checkpoint is of another optimizer"
        )
    for key, value in state.items():
        if key in counters and not _is_number(value):
            raise TypeError(f"state {key!r} of parameter {k} is {_kind(value)}, not one number")
        if key in slots or key == "mask_score" or key.startswith("ema_"):
            _check_values(key, value, k, p)
    _check_masks(state, k, p)


def _check_masks(state: dict, k: int, p: Tensor) -> None:
    """Raise ValueError or TypeError unless the masks fit parameter k."""
    if ("mask_keep" in state) != ("mask_freeze" in state):
        raise ValueError(f"state of parameter {k} has only one of 'mask_keep' and 'mask_freeze'; they go together")
    for key in ("mask_keep", "prune_mask"):
        value = state.get(key, torch.ones(p.shape, device="meta"))
        if not isinstance(value, Tensor):
            raise TypeError(f"state {key!r} of parameter {k} is {_kind(value)}, not a boolean tensor")
        fits = value.dim() == p.dim() and all(
            a == b or (a == 1 and key == "mask_keep") for a, b in zip(value.shape, p.shape)
        )
        if not fits:
            raise ValueError(
                f"state {key!r} of parameter {k} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}"
            )


def _is_number(value: Any) -> bool:
    """Whether a counter can be read: torch's older versions kept plain numbers."""
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))


def _check_values(key: str, value: Any, k: int, p: Tensor) -> None:
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"state {key!r} of parameter {k} is {_kind(value)}, not a tensor")
    if value is not None and value.shape != p.shape:
        raise ValueError(f"state {key!r} of parameter {k} has shape {tuple(value.shape)}, not {tuple(p.shape)}")
    if value is not None and not placed_alike(p, value):
        raise ValueError(
            f"state {key!r} of parameter {k} is not spread over the processes as the parameter is; load the checkpoint "
            "with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )


def load(opt, state_dict: dict[str, Any], torch_load: Callable[[dict], None]) -> None:
    """FusedOptimizer.load_state_dict, around torch's: every check comes before anything changes."""
    kept: dict = {}
    cuda_memory.settle(opt)
    check_form(state_dict)

    def last_hook(_: Any, final: dict) -> dict:  # runs after the user's own
        check_form(final)
        check_sizes(opt, final)
        kept.update(with_own_options(opt, final, (*GROUP_OPTIONS, "decoupled_weight_decay")))
        for group in kept["param_groups"]:
            normalise(group)
        check(opt, kept)
        return kept

    hook, own_masks = opt.register_load_state_dict_pre_hook(last_hook), _own_masks(opt)
    try:
        torch_load(state_dict)
    finally:
        hook.remove()
    _restore(opt, kept, own_masks)
    cuda_memory.loaded(opt)
    _warn_of_fresh_starts(opt, kept)


def _own_masks(opt) -> dict[Tensor, dict]:
    """The masks that the user set, for `_restore` to keep where a checkpoint has none."""
    return {
        p: mask.entries(state) for p, state in opt.state.items() if isinstance(state, dict) and "mask_keep" in state
    }


def _restore(opt, state_dict: dict[str, Any], own_masks: dict[Tensor, dict]) -> None:
    """Undo torch's cast of stage state to the parameter's type; bring masks into the form that steps read."""
    ids = [(k, group["ema"]) for group in state_dict["param_groups"] for k in group["params"]]
    for (k, averages), p in zip(ids, _numbered(opt), strict=True):
        saved, kept_as = state_dict["state"].get(k, {}), dict(zip(ema.NAMES, averages, strict=False))
        if "mask_keep" in saved or "prune_mask" in saved or p in own_masks:
            mask.restore(opt.state[p], p, saved, own_masks.get(p, {}))
        for key, value in saved.items():
            if not isinstance(value, Tensor):
                continue
            if key == "mask_score" or key.startswith("ema_"):
                dtype = ema.dtype_of(kept_as[key], p) if key in kept_as else compute_dtype(p.dtype)
                opt.state[p][key] = value.to(p.device, dtype)
            elif key == "mu_product":
                opt.state[p][key] = value.cpu() if value.dtype == torch.float64 else value.to("cpu", torch.float32)


def _too_late(opt, steps: int) -> bool:
    """Whether no group will select any more."""
    options = [group["prune"] for group in opt.param_groups if group["prune"]]
    return all(one["threshold"] is None and (one["end"] or one["begin"]) <= steps for one in options)


def _warn_of_fresh_starts(opt, state_dict: dict[str, Any]) -> None:
    """Tell what this optimizer keeps and the checkpoint, of torch or of other options, has not."""
    states = [state for state in state_dict["state"].values() if isinstance(state, dict)]
    saved = {key for state in states for key in state}
    steps = max(group["steps"] for group in opt.param_groups)
    averages = {key for group in opt.param_groups for key in ema.names(group)} - saved
    for group in opt.param_groups:
        for key, options in zip(ema.names(group), group["ema"], strict=True):
            begun = ema.updates(options, steps) > 0  # there should be a value in the average of what was stepped
            empty = opt._placeholders.get(key, set()).intersection(group["params"]) if begun else ()
            averages |= {key} if any(float(opt.state[p].get("step", 0)) for p in empty) else set()
    missing = [f"{', '.join(sorted(averages))} start anew, as copies of the weights"] if averages else []
    if any(group["prune"] for group in opt.param_groups) and "prune_mask" not in saved:
        missing.append("no weight is pruned yet" + (_too_late(opt, steps) * ", and none will be: its schedule is past"))
    if states and missing:
        warnings.warn(
            f"the checkpoint does not hold all that {type(opt).__name__} keeps here: {'; '.join(missing)}. "
            f"Schedules go on from its {steps} steps",
            UserWarning,
            stacklevel=4,
        )
