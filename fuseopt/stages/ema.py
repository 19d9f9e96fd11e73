"""Moving averages of the weights (stage 11): e = e + w*(p - e), w = 1 - d.

The first update copies the parameter. Pruned entries of the average are +0.0, so that it is exactly as
sparse as the model; frozen ones keep their bits. It is kept in fp32 for 16-bit parameters (in their own
type a bf16 average at 0.99 never moves) and in fp64 for fp64 ones. A parameter without a gradient is left
out of a step, and its averages with it.

Note: no value yet. The memory of an average is made at its parameter's first step, so that every checkpoint
has the same entries, and holds NaN throughout until the first update, which copies the parameter into every entry
that is NaN, whatever w is, frozen ones too. Nothing but that update writes to it.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..schema import MAX_EMA, compute_dtype

DECAYING = (None, "timm", "diffusers")  # the schedules that take a decay
WARMUPS = (*DECAYING, "edm2", "swa")
DTYPES = ("float32", "parameter")
NAMES = tuple(f"ema_{k}" for k in range(MAX_EMA))  # state keys
MAX_SIGMA_REL = 12**-0.5  # gamma = 0, the plain mean


@dataclass(frozen=True)
class EMA:
    """A moving average of the weights, updated in the pass.

        e = e + (1 - d)*(p - e)

    It is updated at the steps t > start (from 1) with (t - start) % every == 0. The number of such an update
    is u = (t - start) / every, from 1; the first one copies the weights, whatever d is. Before it the average
    is the weights themselves. Pruned entries are +0.0, frozen ones keep their bits.

    Args:
        decay: d in [0, 1], the share of the old average that stays; for warmup None, "timm", "diffusers".
        warmup: how d grows with the number of the update, s = u - 1 being 0 at the first:

            - None (default): d.
            - "timm": min(d, 1 - (1 + s)^(-2/3)), timm's ModelEmaV3(use_warmup=True), and with
              use_ema_warmup=True diffusers' EMAModel.
            - "diffusers": min(d, (1 + s) / (10 + s)), diffusers' EMAModel.
            - "edm2": (1 - 1/u)^(gamma + 1), the power function of Karras et al., "Analyzing and Improving the
              Training Dynamics of Diffusion Models" (2024), eq. 127, gamma being given by sigma_rel.
            - "swa": 1 - 1/u, the mean of the weights at the updates: stochastic weight averaging (Izmailov et
              al. 2018), torch.optim.swa_utils.AveragedModel's default.
        start: the step after which averaging begins, default 0. Negative: that many steps (updates times `every`) were
            averaged before this optimizer's first, as load_ema_state_dict sets it.
        every: update at each `every`-th step only; at least 1, the default.
        dtype: "float32" (default; also torch.float32), fp64 for fp64 parameters; or "parameter", the
            parameter's own, rounded to nearest even: half the memory for 16-bit ones, but where d is near 1
            such an average hardly moves.
        sigma_rel: for "edm2": the width of the average relative to the length of training, in
            (0, 12^(-1/2)]; sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises ValueError for values outside these, or an argument that the schedule does not take.
    """

    decay: float | None = None
    warmup: Literal["timm", "diffusers", "edm2", "swa"] | None = None
    start: int = 0
    every: int = 1
    dtype: Literal["float32", "parameter"] | torch.dtype = "float32"
    sigma_rel: float | None = None

    def __post_init__(self) -> None:
        if self.warmup not in WARMUPS:
            raise ValueError(f"Invalid EMA warmup: {self.warmup!r}; use one of {', '.join(map(repr, WARMUPS))}")
        if self.sigma_rel is not None and self.warmup != "edm2":
            raise ValueError(f"Invalid EMA sigma_rel: {self.sigma_rel!r}; it belongs to warmup='edm2'")
        if self.warmup in DECAYING:
            if not isinstance(self.decay, (int, float)) or not 0 <= self.decay <= 1:
                raise ValueError(f"Invalid EMA decay: {self.decay!r}; give a number in [0, 1]")
        elif self.decay is not None:
            raise ValueError(f"Invalid EMA decay: {self.decay!r}; warmup={self.warmup!r} takes none, leave it out")
        if self.warmup == "edm2" and not (
            isinstance(self.sigma_rel, (int, float)) and 0 < self.sigma_rel <= MAX_SIGMA_REL
        ):
            raise ValueError(
                f"Invalid EMA sigma_rel: {self.sigma_rel!r}; warmup='edm2' takes a number in (0, 12**-0.5]"
            )
        if isinstance(self.start, bool) or not isinstance(self.start, int):
            raise ValueError(f"Invalid EMA start: {self.start!r}; give a whole number of steps")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"Invalid EMA every: {self.every!r}; give a whole number of steps, at least 1")
        if self.dtype is torch.float32:
            object.__setattr__(self, "dtype", "float32")  # plain data, for checkpoints
        if self.dtype not in DTYPES:
            raise ValueError(f"Invalid EMA dtype: {self.dtype!r}; use 'float32' or 'parameter'")


@lru_cache
def gamma(sigma_rel: float) -> float:
    """The exponent of EDM2's power function: the greatest root of sigma_rel's formula, which is a cubic in it."""
    t = float(sigma_rel) ** -2
    return max(0.0, float(np.roots([1, 7, 16 - t, 12 - t]).real.max()))


def updates(options: dict[str, Any], t: int) -> int:
    """How many updates an average has had after the optimizer's step t."""
    return max(0, (t - options["start"]) // options["every"])


def is_due(options: dict[str, Any], t: int) -> bool:
    """Whether step t (from 1) updates an average."""
    return t > options["start"] and (t - options["start"]) % options["every"] == 0


def weight(options: dict[str, Any], t: int) -> float:
    """w = 1 - d of step t, for the update that it makes; -1 where it makes none."""
    if not is_due(options, t):
        return -1.0
    u = updates(options, t)
    if options["warmup"] == "swa" or u == 1 and options["warmup"] is not None:
        return 1 / u
    if options["warmup"] == "edm2":
        return 1 - (1 - 1 / u) ** (gamma(options["sigma_rel"]) + 1)
    if options["warmup"] == "timm":
        return 1 - min(options["decay"], 1 - float(u) ** (-2 / 3))
    if options["warmup"] == "diffusers":
        return 1 - min(options["decay"], u / (9 + u))
    return 1 - options["decay"]


def update(e: Tensor, p: Tensor, w: float, pruned: Tensor | None, frozen: Tensor | None = None) -> Tensor:
    """e + w*(p - e), p where e is NaN; e where frozen, +0.0 where pruned.

    p is in the type of the arithmetic; e is rounded once. w < 0: no update, and a NaN stays. w = 0 keeps what there is.
    """
    empty = e.isnan()
    if w >= 0:
        wide = e.to(p.dtype)
        moved = torch.where(empty, p, wide + w * (p - wide)).to(e.dtype) if w else torch.where(empty, p.to(e.dtype), e)
        e = moved if frozen is None else torch.where(frozen & ~empty, e, moved)
    elif pruned is not None:
        pruned = pruned & ~empty
    return e if pruned is None else torch.where(pruned, 0.0, e)


def is_empty(e: Tensor) -> bool:
    """Whether an average holds no value yet. Mostly its first entry tells."""
    return e.numel() == 0 or bool(e[(0,) * e.dim()].isnan() and e.isnan().all())


def dtype_of(options: dict[str, Any], p: Tensor) -> torch.dtype:
    """The type in which an average of p is kept."""
    return p.dtype if options["dtype"] == "parameter" else compute_dtype(p.dtype)


def names(group: dict[str, Any]) -> tuple[str, ...]:
    """The state keys of a group's averages."""
    return NAMES[: len(group["ema"])]


def normalise(group: dict[str, Any]) -> None:
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
