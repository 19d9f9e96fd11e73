"""The options that every optimizer takes beside torch's own, and their validation."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from .stages import clip, decay, ema, prune
from .stages.ema import EMA
from .stages.prune import Prune

try:  # Python 3.11
    from typing import Unpack
except ImportError:  # typing_extensions comes with torch
    from typing_extensions import Unpack

__all__ = ["StageOptions", "Unpack"]


class StageOptions(TypedDict, total=False):
    """The keyword options; see FusedOptimizer."""

    max_grad_norm: float | None
    l1: float
    ema: EMA | dict[str, Any] | Sequence[EMA | dict[str, Any]] | None
    prune: Prune | dict[str, Any] | None
    statistics: bool
    backend: Literal["cpu", "cuda", "triton", "torch"] | None
    sharded: bool


GROUP_OPTIONS = {"max_grad_norm": None, "l1": 0.0, "ema": None, "prune": None}
WHOLE_OPTIONS = {"statistics": False, "backend": None, "sharded": False}


def snapshot(group: dict[str, Any]) -> tuple[Any, ...]:
    """Copies of a group's normalised options."""
    return tuple([_copied(group[name]) for name in GROUP_OPTIONS])


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [dict(one) for one in value]
    return dict(value) if isinstance(value, dict) else value


def fill_in(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Give a group the options that it lacks, each a copy of its own."""
    for name in (*GROUP_OPTIONS, "decoupled_weight_decay"):
        if name in defaults and name not in group:
            group[name] = _copied(defaults[name])


def drop_whole(group: dict[str, Any]) -> None:
    """Remove what torch copies from the defaults into every group, though it holds for the optimizer."""
    for name in WHOLE_OPTIONS:
        group.pop(name, None)


def refuse_differentiable(differentiable: bool) -> None:
    """Raise ValueError for torch's differentiable=True."""
    if differentiable:
        raise ValueError("fuseopt does not support differentiable=True; use the class of torch.optim")


def normalise(group: dict[str, Any]) -> None:
    """Validate the stage options of a group and turn them into plain data."""
    refuse_differentiable(group.get("differentiable", False))
    decay.check(group)
    clip.check(group)
    ema.normalise(group)
    prune.normalise(group)
