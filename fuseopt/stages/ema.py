"""Exponential moving averages of the weights (stage 11): e = e + w*(p - e), w = 1 - d_t.

The first update copies the parameter. Pruned entries of the average are +0.0, so that it is exactly as
sparse as the model. It is kept in fp32 for 16-bit parameters (in their own type a bf16 average at 0.99
never moves) and in fp64 for fp64 ones. A parameter without a gradient is left out of a step, and its
averages with it.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..schema import MAX_EMA

WARMUPS = (None, "timm")
NAMES = tuple(f"ema_{k}" for k in range(MAX_EMA))  # state keys


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of the weights.

    Args:
        decay: d in [0, 1]; the share of the old average that stays at each step.
        warmup: None for d at every step after the first (which copies); "timm" for
            min(d, 1 - (1 + s)**(-2/3)) with s = t - 1, as timm's ModelEmaV3(use_warmup=True).

    Raises ValueError for a decay outside [0, 1] or an unknown warmup.
    """

    decay: float
    warmup: str | None = None

    def __post_init__(self):
        if not isinstance(self.decay, (int, float)) or not 0 <= self.decay <= 1:
            raise ValueError(f"Invalid EMA decay: {self.decay!r}; give a number in [0, 1]")
        if self.warmup not in WARMUPS:
            raise ValueError(f"Invalid EMA warmup: {self.warmup!r}; use None or 'timm'")


def weight(options: dict, t: int) -> float:
    """w = 1 - d_t at the optimizer's step t (from 1)."""
    if options["warmup"] == "timm":
        if t <= 1:
            return 1.0
        return 1 - min(options["decay"], 1 - float(t) ** (-2 / 3))
    return 1 - options["decay"]


def update(e: Tensor, p: Tensor, w: float, pruned: Tensor | None) -> Tensor:
    """e + w*(p - e); +0.0 where pruned."""
    e = e + w * (p - e)
    return e if pruned is None else torch.where(pruned, 0.0, e)


def names(group: dict) -> tuple[str, ...]:
    """The state keys of a group's averages."""
    return NAMES[: len(group["ema"])]


def normalise(group: dict) -> None:
    """Turn group["ema"] (None, EMA, dict, or a list of them) into a list of plain dicts, validated."""
    given = group["ema"]
    if given is None:
        given = []
    elif isinstance(given, (EMA, dict)):
        given = [given]
    elif not isinstance(given, (list, tuple)):
        raise TypeError(f"Invalid ema: {given!r}; give fuseopt.EMA(decay) or a list of them")
    plain = []
    for one in given:
        if not isinstance(one, (EMA, dict)):
            raise TypeError(f"Invalid ema: {one!r}; give fuseopt.EMA(decay) or a list of them")
        try:
            plain.append(asdict(one if isinstance(one, EMA) else EMA(**one)))
        except TypeError as error:
            raise TypeError(f"Invalid ema: {one!r}; {error}") from None
    if len(plain) > MAX_EMA:
        raise ValueError(f"Invalid ema: {len(plain)} averages; at most {MAX_EMA} are kept at once")
    group["ema"] = plain
