"""state_dict and load_state_dict beyond torch's: stage state keeps its type, and bits travel row-major."""

from typing import Any

import torch
from torch import Tensor

from .schema import compute_dtype
from .stages import mask


def steps_of(opt) -> int:
    """The optimizer's step count as its parameters' state tells it, for checkpoints that do not hold it."""
    counts = [float(s["step"]) for s in opt.state.values() if isinstance(s, dict) and "step" in s]
    return int(max(counts, default=0))


def _numbered(opt) -> list[Tensor]:
    """The parameters in the order in which a state_dict numbers them."""
    return [p for group in opt.param_groups for p in group["params"]]


def outgoing(opt, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Bits in row-major order, so that a checkpoint does not depend on a parameter's memory format."""
    for k, p in enumerate(_numbered(opt)):
        state = state_dict["state"].get(k)
        if isinstance(state, dict) and "mask_order" in state:
            state_dict["state"][k] = state = dict(state)
            mask.reorder(state, p, list(range(p.dim())))
    return state_dict


def with_own_options(opt, state_dict: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The state_dict, its groups given this optimizer's values of the options that they lack, as torch's do."""
    groups = [
        {**{name: own[name] for name in names if name in own}, **saved}
        for own, saved in zip(opt.param_groups, state_dict["param_groups"], strict=True)
    ]
    return {**state_dict, "param_groups": groups}


def check(opt, state_dict: dict[str, Any]) -> None:
    """Raise ValueError unless the checkpoint fits: groups, numbers of parameters, shapes, kind of state."""
    saved, own = state_dict["param_groups"], opt.param_groups
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in own]
    if sizes[0] != sizes[1]:
        raise ValueError(f"loaded state dict has parameter groups of sizes {sizes[0]}, the optimizer {sizes[1]}")
    ids = [k for group in saved for k in group["params"]]
    groups = [{**now, **then} for now, then in zip(own, saved, strict=True) for _ in now["params"]]
    for k, p, group in zip(ids, _numbered(opt), groups, strict=True):
        state = state_dict["state"].get(k)
        if isinstance(state, dict):
            _check_state(opt, group, k, p, state)


# Every rule's state; what may be absent without the state being another rule's.
_RULE_KEYS = {"step", "mu_product", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"}
_OPTIONAL = {"max_exp_avg_sq", "momentum_buffer"}


def _check_state(opt, group: dict, k: int, p: Tensor, state: dict) -> None:
    """Raise ValueError unless the state of parameter k has this rule's keys and the parameter's shape."""
    try:
        slots, counters = opt.slots(group), opt.counters(group)
    except KeyError as missing:
        raise ValueError(
            f"the checkpoint's group lacks {missing}: it is of another optimizer than {type(opt).__name__}"
        ) from None
    expected = {*slots, *counters}
    found = {key for key in _RULE_KEYS if state.get(key) is not None}
    if found and (found - expected - _OPTIONAL or expected - found - _OPTIONAL):
        raise ValueError(
            f"state of parameter {k} holds {', '.join(sorted(found))}, but {type(opt).__name__} keeps "
            f"{', '.join(sorted(expected)) or 'none'}: the checkpoint is of another optimizer"
        )
    packed = {key: state[key] for key in ("prune_mask", "mask_keep") if isinstance(state.get(key), Tensor)}
    bits = {key: value.to(torch.uint8) for key, value in packed.items()}
    mask.check_state(f"parameter {k}", p.numel(), {**state, **bits})
    for key, value in state.items():
        if isinstance(value, Tensor) and (key in slots or key.startswith("ema_")) and value.shape != p.shape:
            raise ValueError(f"state {key!r} of parameter {k} has shape {tuple(value.shape)}, not {tuple(p.shape)}")


def restore_types(opt, state_dict: dict[str, Any]) -> None:
    """Undo torch's cast of stage state to the parameter's type; bring bits into the parameter's order."""
    ids = [k for group in state_dict["param_groups"] for k in group["params"]]
    for k, p in zip(ids, _numbered(opt), strict=True):
        saved = state_dict["state"].get(k)
        if not isinstance(saved, dict):
            continue
        for key, value in saved.items():
            if not isinstance(value, Tensor):
                continue
            if key.startswith("ema_"):
                opt.state[p][key] = value.to(p.device, compute_dtype(p.dtype))
            elif key in ("prune_mask", "mask_keep"):  # torch makes floats of them when it loads ours
                opt.state[p][key] = value.to("cpu", torch.uint8)
            elif key == "mu_product":
                opt.state[p][key] = value.cpu() if value.dtype == torch.float64 else value.to("cpu", torch.float32)
