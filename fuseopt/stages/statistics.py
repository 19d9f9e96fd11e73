"""Sums gathered on the way (stage 12).

Of the update pass, over everything stepped: grad_norm, the L2 norm of the unscaled, masked gradient
before clipping; param_norm and update_norm, of the new weights and of their change; zeros, the number
of weights that are 0; nonfinite, the number of gradient entries that are infinite or NaN. At a step on
which pruning selects, they are of the pass before the selection.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WIDTH = 5  # of a row


def row(g: Tensor, before: Tensor, after: Tensor) -> tuple[float, ...]:
    """The sums of one parameter, in double: the reference.

    g: the gradient the rule saw, before clipping; before, after: the parameter. Equal shapes.
    """
    g, before, after = g.double(), before.double(), after.double()
    return (
        float(g.square().sum()),
        float(after.square().sum()),
        float((after - before).square().sum()),
        float((after == 0).sum()),
        float((~torch.isfinite(g)).sum()),
    )


def values(total: Sequence[float]) -> dict[str, float]:
    """The numbers that `opt.statistics()` gives, of the total of the rows."""
    grad, param, update, zeros, nonfinite = map(float, total)
    norms = map(math.sqrt, (grad, param, update))
    return dict(zip(NAMES, (*norms, int(zeros), int(nonfinite)), strict=True))


NAMES = ("grad_norm", "param_norm", "update_norm", "zeros", "nonfinite")


class Statistics(Mapping[str, float]):
    """The statistics of one step by name; later steps do not change them.

    What a GPU has summed up is fetched when a value is first read: by indexing, comparing or printing, not by
    iterating over the names. That waits for the GPU, and raises RuntimeError if every step so far was skipped.
    """

    def __init__(self, fetch: Callable[[], Mapping[str, float]]):
        self._fetch: Callable[[], Mapping[str, float]] | None = fetch
        self._values: dict[str, float] = {}

    def read(self) -> "Statistics":
        """Fetch the values now."""
        if self._fetch is not None:
            self._values, self._fetch = dict(self._fetch()), None  # lets go of memory on the GPU
        return self

    def __getitem__(self, name: str) -> float:
        if name not in NAMES:
            raise KeyError(f"{name!r} is none of the statistics: {', '.join(NAMES)}")
        return self.read()._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:  # a plain dict to pickle and to checkpoints
        return dict, (dict(self),)


def result(total: Sequence[float]) -> Statistics:
    """What `opt.statistics()` returns where the total of the rows is known."""
    return Statistics(lambda: values(total))
