"""Ready masks for `opt.mask`: which entries of a parameter are trained.

Rankings, for fn=, keep exactly round(share * n) entries, those of the largest score; equal scores go by
(parameter order, row-major index), NaN comes last, as -inf does. n is all entries of a parameter, or with
scope="global" of all parameters that were set with the same object and are recomputed at this step, wherever they
lie (one without a gradient keeps its mask and is not counted):

    opt.mask("*", fn=fuseopt.masks.Fisher(0.005), every=100)

Functions of a parameter, for keep=, are called once:

    opt.mask("*", keep=fuseopt.masks.nonzero)
"""

import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .distributed import part

__all__ = ["Fisher", "Movement", "Random", "TopGradient", "new_rows", "nonzero"]


@dataclass(frozen=True)
class Ranking:
    """Keeps the share of entries with the largest score."""

    share: float
    sums: ClassVar[bool] = False  # whether scores are added up, at every step; else they are of one step
    reads: ClassVar[int] = 1  # how many of gradient and weight it reads

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 <= self.share <= 1:
            raise ValueError(f"Invalid {type(self).__name__} share: {self.share!r}; give a number in [0, 1]")

    @property
    def ranks_all(self) -> bool:
        """Whether parameters are ranked together, not each alone."""
        return False

    def score(self, p: Tensor, w: Tensor, g: Tensor, t: int, place: int) -> Tensor:
        """The score of one step, of the entries on this process.

        p: the parameter; w: its entries here, g: their gradient of what is minimised, unscaled, both in the type
        in which p is computed; t: the step; place: the parameter's, among all of the optimizer.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Scoped(Ranking):
    """Of each parameter, or of all together."""

    scope: Literal["tensor", "global"] = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"Invalid {type(self).__name__} scope: {self.scope!r}; use 'tensor' or 'global'")

    @property
    def ranks_all(self) -> bool:
        return self.scope == "global"


class TopGradient(Scoped):
    """The largest |g| at the steps that recompute it.

    Args:
        share: of the entries to train, in [0, 1].
        scope: "tensor" (default) ranks each parameter alone, "global" all of them together.

    Raises ValueError for values outside these.
    """

    def score(self, p: Tensor, w: Tensor, g: Tensor, t: int, place: int) -> Tensor:
        return g.abs()


class Fisher(Scoped):
    """The largest sums of g^2, the diagonal of the empirical Fisher information (FISH mask, Sung et al. 2021).

    Sums (fp32; fp64 for fp64) run from the step after it was set, over every step; the gradient is the mini-batch's,
    where the paper takes single examples. This costs a pass over gradients and sums at each step.

    Args:
        share: of the entries to train, in [0, 1].
        scope: "tensor" (default) ranks each parameter alone, "global" all of them together.

    Raises ValueError for values outside these.
    """

    sums: ClassVar[bool] = True

    def score(self, p: Tensor, w: Tensor, g: Tensor, t: int, place: int) -> Tensor:
        return g * g


class Movement(Scoped):
    """The largest sums of -g*w: what moves away from zero (movement pruning, Sanh et al. 2020).

    Signed: what shrinks comes last. Sums (fp32; fp64 for fp64) run from the step after it was set, over every step, w
    being the weight before it; under maximize=True the sign is turned. This costs a pass over gradients, weights and
    sums at each step.

    Args:
        share: of the entries to train, in [0, 1].
        scope: "tensor" (default) ranks each parameter alone, "global" all of them together.

    Raises ValueError for values outside these.
    """

    sums: ClassVar[bool] = True
    reads: ClassVar[int] = 2

    def score(self, p: Tensor, w: Tensor, g: Tensor, t: int, place: int) -> Tensor:
        return -g * w


@dataclass(frozen=True)
class Random(Ranking):
    """As many entries of each parameter, drawn anew at the steps that recompute it.

    They depend on (seed, step, place of the parameter in the optimizer) alone, not on how processes share the
    parameter. With sharded=True places are counted on each process for itself.

    Args:
        share: of the entries to train, in [0, 1].
        seed: a whole number, default 0.

    Raises ValueError for values outside these.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"Invalid Random seed: {self.seed!r}; give a whole number")

    def score(self, p: Tensor, w: Tensor, g: Tensor, t: int, place: int) -> Tensor:
        mixed = zlib.crc32(f"{self.seed} {t} {place}".encode())  # torch's generator takes 32 bits of a seed
        drawn = torch.rand(p.shape, generator=torch.Generator().manual_seed(mixed), device="cpu")
        return part(p, drawn).expand(w.shape).to(w.device)  # from 1 to 0 entries, too


def nonzero(param: Tensor) -> Tensor:
    """Keep what is not zero now: a pruned model stays pruned while it is trained on.

    Args:
        param: the parameter, of any shape and dtype. Returns a boolean tensor of its shape.
    """
    return param.detach() != 0


def new_rows(param: Tensor, first: int) -> Tensor:
    """Keep the rows from `first` on: the new tokens of an embedding that was resized.

    Args:
        param: the parameter, of shape (rows, ...). Returns a boolean tensor of shape (rows, 1, ...).
        first: index of the first row to train.

    Raises ValueError if `first` is no row, nor just behind the last; TypeError for a module in place of its weight.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"Invalid param: {type(param).__name__}; give the parameter, as embedding.weight")
    rows = param.shape[0] if param.dim() else 0
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first <= rows:
        raise ValueError(f"Invalid first: {first!r}; the parameter has {rows} rows")
    return (torch.arange(rows, device=param.device) >= first).reshape([-1] + [1] * (param.dim() - 1))
