"""Averages of a model's floating buffers, such as the statistics of batch normalisation.

Plain data in the first parameter group, which every checkpoint carries: group["ema_buffers"] is
{"ema_0": {"begun": bool, "values": {name: tensor}}, ...}; until "begun" the values mean nothing. Where the
buffers are is known to this process alone, by weak references.
"""

import warnings
import weakref
from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor

from .schema import compute_dtype

KEY = "ema_buffers"


class Tracked:
    """The floating buffers of a model, read anew at each step; the model is not kept alive."""

    def __init__(self, model: torch.nn.Module):
        self.places: dict[str, tuple] = {}
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            for key, buffer in module._buffers.items():
                if isinstance(buffer, Tensor) and buffer.is_floating_point() and id(buffer) not in seen:
                    seen.add(id(buffer))
                    self.places[f"{prefix}.{key}" if prefix else key] = (weakref.ref(module), key)

    def now(self) -> dict[str, Tensor]:
        """The buffers by name; none once the model is gone. Raises ValueError if one was removed."""
        modules = {name: place[0]() for name, place in self.places.items()}
        if any(module is None for module in modules.values()):
            return {}
        found = {}
        for name, (_, key) in self.places.items():
            found[name] = modules[name]._buffers.get(key)
            if not isinstance(found[name], Tensor):
                raise ValueError(f"the model has no buffer {name!r} any more; call average_buffers(model) again")
        return found


def track(opt, model: torch.nn.Module) -> None:
    """What FusedOptimizer.average_buffers does."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"Invalid model: {type(model).__name__}; give the torch.nn.Module whose buffers to average")
    if not any(group["ema"] for group in opt.param_groups):
        raise ValueError("there is no average to take buffers into: pass ema=fuseopt.EMA(decay)")
    tracked = Tracked(model)
    _check(opt, tracked.now())
    opt._tracked[:] = [tracked]
    _complete(opt, tracked.now())


def _entries(opt) -> dict[str, dict]:
    return opt.param_groups[0].get(KEY, {})


def _check(opt, now: dict[str, Tensor]) -> None:
    """Raise ValueError unless the averages that there are belong to these buffers."""
    for entry in _entries(opt).values():
        values = entry["values"]
        if values.keys() != now.keys():
            odd = ", ".join(map(repr, sorted(values.keys() ^ now.keys())))
            raise ValueError(
                f"the model's buffers are not those that were averaged, which differ by {odd}; give the same model, "
                f"or delete opt.param_groups[0][{KEY!r}] to start anew"
            )
        for name, value in values.items():
            if value.shape != now[name].shape:
                shapes = tuple(now[name].shape), tuple(value.shape)
                raise ValueError(f"buffer {name!r} has shape {shapes[0]}, its average {shapes[1]}; give the same model")


def _complete(opt, now: dict[str, Tensor]) -> None:
    """Make what is missing, so that every checkpoint has the same entries, and bring all to the buffers' devices."""
    entries = opt.param_groups[0].setdefault(KEY, {})
    for k in range(max(len(group["ema"]) for group in opt.param_groups)):
        if f"ema_{k}" not in entries:
            values = {name: b.detach().to(compute_dtype(b.dtype), copy=True) for name, b in now.items()}
            entries[f"ema_{k}"] = {"begun": False, "values": values}
    for entry in entries.values():
        for name, b in now.items():
            if entry["values"][name].device != b.device:
                entry["values"][name] = entry["values"][name].to(b.device)


def updates(opt, step) -> list[Iterable]:
    """What a step does to the averages of buffers, as iterators for interrupts.at_once.

    Raises ValueError, with nothing changed, if the buffers are not those that were averaged. Warns where averages
    were kept and their model is gone or was not given after loading: they would be exported as they are.
    """
    if not opt._tracked and KEY not in opt.param_groups[0]:
        return []
    now = opt._tracked[0].now() if opt._tracked else {}
    if not now:
        if any(entry["values"] for entry in _entries(opt).values()):
            warnings.warn(
                "the averages of buffers stand still: the model whose buffers they are is not known, as after loading "
                f"or copying; call average_buffers(model), or delete opt.param_groups[0][{KEY!r}] to leave them out",
                UserWarning,
                stacklevel=2,
            )
        return []
    _check(opt, now)
    _complete(opt, now)
    calls, done = [], set()
    for gs in step.groups:
        for key, weight in zip(gs.emas, gs.ema_weights, strict=True):
            if key in gs.due and key not in done:
                calls += _update(_entries(opt)[key], now, weight)
            done.add(key)
    return calls


def _update(entry: dict, now: dict[str, Tensor], weight: float) -> list[Iterable]:
    averages = [entry["values"][name] for name in now]
    buffers = [b.detach().to(e.dtype) for b, e in zip(now.values(), averages, strict=True)]
    if entry["begun"]:
        return [map(torch._foreach_lerp_, (averages,), (buffers,), (weight,))]
    begin = map(dict.__setitem__, (entry,), repeat("begun"), (True,))
    return [map(torch._foreach_copy_, (averages,), (buffers,)), begin]


def values(opt, k: int) -> dict[str, Tensor]:
    """The averages k of the buffers by name; none where they have had no update."""
    entry = _entries(opt).get(f"ema_{k}", {"begun": False})
    return entry["values"] if entry["begun"] else {}


def of(opt, k: int) -> list[tuple[Tensor, Tensor]]:
    """(buffer, average k) of every buffer of the model that is averaged."""
    now = opt._tracked[0].now() if opt._tracked else {}
    return [(now[name], value) for name, value in values(opt, k).items() if name in now]


def match(opt, model: torch.nn.Module, k: int) -> list[tuple[Tensor, Tensor]]:
    """(buffer of model, average k), by name. Raises ValueError where the model does not match."""
    theirs = dict(model.named_buffers(remove_duplicate=False))
    pairs = []
    for name, value in values(opt, k).items():
        if name not in theirs or theirs[name].shape != value.shape:
            found = tuple(theirs[name].shape) if name in theirs else "none"
            raise ValueError(
                f"the averaged buffer {name!r} has shape {tuple(value.shape)}, the model's: {found}; "
                "give a model of the kind that average_buffers was called with"
            )
        pairs.append((theirs[name], value))
    return pairs


def load(opt, k: int, found: dict[str, Tensor]) -> None:
    """Continue average k from these values; those of other names are left out."""
    entry = _entries(opt)[f"ema_{k}"]
    for name in entry["values"].keys() & found.keys():
        entry["values"][name].copy_(found[name])
    entry["begun"] = True
