"""Pruning (stage 10): the smallest weights become +0.0 and stay so.

A pruning step updates first, then selects on the new weights, then zeroes: no forward pass ever sees a
weight that should be gone. Between pruning steps the mask rides in the update pass.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

SCHEDULES = ("cubic", "linear", "once")
SCOPES = ("global", "tensor")


@dataclass(frozen=True)
class Prune:
    """Prunes the smallest weights to a sparsity, to a pattern, or everything below a threshold.

    With x running from 0 at `begin` to 1 at `end`, the sparsity after a step that acts is

        cubic   s*(1 - (1 - x)^3)      Zhu & Gupta 2017
        linear  s*x
        once    s, at `begin`

    Args:
        sparsity: the share s of zeros to reach, in [0, 1). Exactly `round(sparsity * n)` entries are
            pruned, the smallest by (magnitude as fp32, parameter order, row-major index), n being all entries of the
            prunable parameters; frozen entries count in n and are never chosen.
        pattern: one of

            - "unstructured" (default).
            - "n:m" such as "2:4", which takes no sparsity: of every m entries along
              dimension 1 (input features, or channels) the n largest stay, of equal ones the first, and a
              shorter last group is filled up with zeros. 0 < n < m <= 32.
            - "rows": exactly `round(sparsity * R)` of all R
              rows (dimension 0: output features, or channels), the smallest by (L2 norm, parameter
              order, row), of those without a frozen entry.
        scope: "global" (default) ranks the prunable parameters of all groups with equal Prune options together,
            "tensor" each alone.
        schedule: "cubic" (default), "linear" or "once".
        begin: the first step that acts, from 1, the default.
        end: the last one; acts at the steps t with begin <= t <= end and (t - begin) % every == 0, of which end must
            be one, or the sparsity would fall short. None (default), with any schedule, acts once: at `begin`, to
            the full sparsity.
        every: steps from one that acts to the next; 1 by default.
        regrow: at each step that acts, what was pruned is let go first (save frozen entries): the update
            moves every weight, and all are ranked anew. False (default): masks only grow.
        moments: "zero" (default) clears the optimizer's state of pruned entries, "keep" leaves it running.
        threshold: instead of a sparsity, prune |p| < threshold at every step from `begin` on.

    Floating parameters with two or more dimensions that are trained (requires_grad) are pruned; a group
    with prune=None leaves its own alone. A threshold acts on what has a gradient. Raises ValueError for
    values outside these.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    scope: Literal["global", "tensor"] = "global"
    schedule: Literal["cubic", "linear", "once"] = "cubic"
    begin: int = 1
    end: int | None = None
    every: int = 1
    regrow: bool = False
    moments: Literal["zero", "keep"] = "zero"
    threshold: float | None = None

    def __post_init__(self) -> None:
        self._check_pattern()
        if self.sparsity is not None and not (isinstance(self.sparsity, (int, float)) and 0 <= self.sparsity < 1):
            raise ValueError(f"Invalid sparsity: {self.sparsity!r}; give a number in [0, 1)")
        if self.threshold is not None and not (
            isinstance(self.threshold, (int, float)) and 0 <= self.threshold < float("inf")
        ):
            raise ValueError(f"Invalid threshold: {self.threshold!r}; give a finite number >= 0")
        _one_of("scope", self.scope, SCOPES)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("moments", self.moments, ("zero", "keep"))
        self._check_steps()

    def _check_pattern(self) -> None:
        """Raise ValueError unless pattern, sparsity, threshold and regrow go together."""
        n_m = self.pattern not in ("unstructured", "rows") and parse_n_m(self.pattern)
        if n_m and not self.sparsity is self.threshold is None:
            name = "threshold" if self.sparsity is None else "sparsity"
            raise ValueError(
                f"Invalid Prune {name}: {getattr(self, name)!r}; pattern={self.pattern!r} prunes "
                f"{n_m[1] - n_m[0]} of every {n_m[1]} whatever they are: leave {name} out"
            )
        if not n_m and (self.sparsity is None) == (self.threshold is None):
            raise ValueError("Invalid Prune: give either a sparsity or a threshold")
        if self.pattern == "rows" and self.threshold is not None:
            raise ValueError(f"Invalid Prune threshold: {self.threshold!r}; pattern='rows' takes a sparsity")
        if not isinstance(self.regrow, bool):
            raise ValueError(f"Invalid Prune regrow: {self.regrow!r}; give True or False")
        if self.regrow and self.threshold is not None:
            raise ValueError("Invalid Prune regrow: a threshold holds at every step; give a sparsity or 'n:m'")

    def _check_steps(self) -> None:
        """Raise ValueError unless begin, end and every go together."""
        for name in ("begin", "every") + (("end",) if self.end is not None else ()):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Invalid Prune {name}: {value!r}; give a whole number of steps, at least 1")
        if self.threshold is not None and (self.end is not None or self.every != 1):
            raise ValueError("Invalid Prune: a threshold holds at every step from `begin` on; leave out end and every")
        if self.end is None and self.every != 1 and self.schedule != "once":
            raise ValueError(f"Invalid Prune every: {self.every!r}; without an end it acts at `begin` alone: give end")
        if self.end is not None and self.end < self.begin:
            raise ValueError(f"Invalid Prune end: {self.end}; it lies before begin={self.begin}")
        if self.schedule == "once" and (self.end is not None or self.every != 1):
            raise ValueError("Invalid Prune: schedule='once' acts at `begin` alone; leave out end and every")
        if self.end is not None and (self.end - self.begin) % self.every:
            nearest = self.begin + max(1, round((self.end - self.begin) / self.every)) * self.every
            raise ValueError(
                f"Invalid Prune end: {self.end}; it is no step of every={self.every} from begin={self.begin}, "
                f"so the sparsity would not be reached: use end={nearest}"
            )


def parse_n_m(pattern: str) -> tuple[int, int]:
    """(n, m) of a pattern "n:m". Raises ValueError unless 0 < n < m <= 32."""
    found = isinstance(pattern, str) and re.fullmatch(r"(\d{1,2}):(\d{1,2})", pattern)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m <= 32:
        raise ValueError(
            f"Invalid Prune pattern: {pattern!r}; use 'unstructured', 'rows', or 'n:m' with 0 < n < m <= 32, as '2:4'"
        )
    return n, m


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Invalid Prune {name}: {value!r}; use one of {', '.join(map(repr, allowed))}")


def is_n_m(options: dict[str, Any] | None) -> bool:
    """Whether a group's options prune to a pattern n:m."""
    return options is not None and ":" in options["pattern"]


def sparsity_at(options: dict[str, Any] | None, t: int) -> float | None:
    """The sparsity to prune to at step t; None at steps that do not select."""
    if options is None or options["threshold"] is not None:
        return None
    begin, s = options["begin"], options["sparsity"]
    end = begin if options["end"] is None else options["end"]
    if not begin <= t <= end or (t - begin) % options["every"]:
        return None
    if s is None:  # n:m has no other
        n, m = parse_n_m(options["pattern"])
        return 1 - n / m
    x = 1.0 if end == begin else (t - begin) / (end - begin)
    return s * x if options["schedule"] == "linear" else s * (1 - (1 - x) ** 3)


def threshold_at(options: dict[str, Any] | None, t: int) -> float:
    """The threshold in force at step t; 0, which prunes nothing, where there is none."""
    if options is None or options["threshold"] is None or t < options["begin"]:
        return 0.0
    return float(options["threshold"])


def prunable(p: Tensor) -> bool:
    """Whether pruning applies to a parameter: floating, at least two dimensions, being trained."""
    return p.requires_grad and p.is_floating_point() and p.dim() >= 2 and p.numel() > 0


def smallest(weights: list[Tensor], candidates: list[Tensor], count: int) -> list[Tensor]:
    """The reference of the selection: boolean masks of the `count` smallest candidates.

    Ranked by (|p| as fp32, order in the list, flat row-major index). Shapes as `weights`.
    """
    magnitude = torch.cat([w.detach().float().abs().reshape(-1) for w in weights])
    free = torch.cat([c.reshape(-1) for c in candidates])
    index = free.nonzero().squeeze(1)
    chosen = torch.zeros_like(free)
    chosen[index[torch.sort(magnitude[index], stable=True).indices[:count]]] = True
    parts = chosen.split([w.numel() for w in weights])
    return [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]


def smallest_of_m(w: Tensor, candidates: Tensor, pruned: Tensor, n: int, m: int) -> Tensor:
    """The reference of n:m: which candidates go, one group after the other. Shapes as `w`."""
    flat = [x.movedim(1, -1).reshape(-1, w.shape[1]) for x in (w.detach().float().abs(), candidates, pruned)]
    chosen = torch.zeros(flat[1].shape, dtype=torch.bool).tolist()  # lists: indexing tensors is slow
    for row, keys, free, gone in zip(chosen, *(x.tolist() for x in flat), strict=True):
        for first in range(0, len(keys), m):
            group = range(first, min(first + m, len(keys)))
            count = len(group) - n - sum(gone[j] for j in group)
            ranked = sorted((j for j in group if free[j]), key=lambda j: (keys[j], -j))
            for j in ranked[: max(count, 0)]:
                row[j] = True
    moved = w.movedim(1, -1).shape
    return torch.tensor(chosen, dtype=torch.bool, device=w.device).reshape(moved).movedim(-1, 1)


def smallest_rows(weights: list[Tensor], candidates: list[Tensor], count: int) -> list[Tensor]:
    """The reference of "rows": masks of the `count` candidate rows of least norm, by (norm, tensor, row)."""
    squares = [w.detach().double().square().flatten(1).sum(1).tolist() for w in weights]
    free = [(square, k, i) for k, rows in enumerate(squares) for i, square in enumerate(rows) if candidates[k][i]]
    chosen = [torch.zeros_like(c) for c in candidates]
    for _, k, i in sorted(free)[:count]:
        chosen[k][i] = True
    return chosen


def apply(x: Tensor, pruned: Tensor) -> Tensor:
    """+0.0 where pruned."""
    return torch.where(pruned, 0.0, x)


def normalise(group: dict[str, Any]) -> None:
    """Turn group["prune"] (None, Prune or dict) into None or a plain dict, validated."""
    given = group["prune"]
    if given is None:
        return
    if not isinstance(given, (Prune, dict)):
        raise TypeError(f"Invalid prune: {given!r}; give fuseopt.Prune(sparsity) or None")
    if isinstance(given, dict) and (given.get("end") is None or given.get("threshold") is not None):
        given = {**given, "end": None, "every": 1}  # what older checkpoints hold though it meant nothing
    try:
        group["prune"] = asdict(given if isinstance(given, Prune) else Prune(**given))
    except TypeError as error:
        raise TypeError(f"Invalid prune: {given!r}; {error}") from None
