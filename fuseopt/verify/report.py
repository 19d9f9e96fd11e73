"""The bounds, the figures gathered against them, and how they are printed."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .judge import Interval, ulp

# stream -> (bound, reason). "step" starts from the live state at every checked step; "trajectory" started
# from it once and never again.
_VALUE = "the change of the float64 recipe when every input is 8 roundoffs off, in the stored type"
BOUNDS = {
    "p, moments": (_VALUE, "a step is under 16 roundings in sequence; see the note on intervals in judge.py"),
    "ema_k": (
        "as above, from the stored weight",
        "an average follows the weight as it is stored; its first update copies",
    ),
    "trajectory": (
        "as above, inputs also off by the last allowance",
        "roundings add up; moments forget theirs",
    ),
    "counters": ("0", "step counts are whole numbers, mu_product is kept in fp32 by torch too"),
    "frozen": ("0 bits", "frozen weights, moments and averages are written back as they were read"),
    "untouched": ("0 bits", "a parameter without a gradient takes no step"),
    "skipped": ("0 bits", "found_inf skips the step, its counts and its schedules"),
    "pruned": ("0 entries", "pruned weights, their moments and averages are exactly +0.0"),
    "prune_mask": ("0 entries", "decisions: on the live weights, wrong only if no rounding could excuse it"),
    "prune_count": ("0 entries", "exactly round(sparsity * n) entries, or rows, are pruned; m - n of every m"),
    "statistics": ("8 roundoffs, relative", "double sums over gradients that were rounded once or twice"),
}


@dataclass
class Figure:
    """The worst difference seen of one stream of one parameter."""

    check: str  # "step" or "trajectory"
    parameter: str
    stream: str
    max_abs: float = 0.0
    max_ulp: float = 0.0  # of the stored type, at the largest of the old and both new values
    allowed_ulp: float = 0.0  # what the bound was where its share was greatest
    share: float = 0.0  # greatest difference / bound, each at its own element
    differences: int = 0  # entries beyond the bound
    at_step: int = 0  # where the share was greatest, or the first step beyond the bound

    def row(self) -> dict[str, Any]:
        return {**self.__dict__, "passed": self.differences == 0}


@dataclass
class Tally:
    """Gathers figures."""

    figures: dict[tuple[str, str, str], Figure] = field(default_factory=dict)

    def _at(self, check: str, parameter: str, stream: str) -> Figure:
        key = check, parameter, stream
        return self.figures.setdefault(key, Figure(*key))

    def values(
        self, check: str, name: str, stream: str, t: int, live: Tensor, copy: Interval, old: Tensor
    ) -> bool:
        """Compare a live stream with the copy's; True if within bounds. All flat, of one type."""
        figure = self._at(check, name, stream)
        if live.numel() == 0:
            return True
        same = (live == copy.value) | (live.isnan() & copy.value.isnan())
        if bool(same.all()):
            return True
        live, copy, old = live[~same], copy.at(~same), old[~same]
        error = (live.double() - copy.value.double()).abs().nan_to_num(float("inf"))
        unit = ulp(torch.maximum(torch.maximum(live.abs(), copy.value.abs()), old.abs()))
        allowed = copy.slack()
        beyond = int((~copy.allows(live)).sum())
        share = error / allowed
        worst = int(share.argmax())
        if float(share[worst]) > figure.share:
            figure.share, figure.at_step = (
                float(share[worst]),
                t if not figure.differences else figure.at_step,
            )
            figure.allowed_ulp = float(allowed[worst] / unit[worst])
        if beyond and not figure.differences:
            figure.at_step = t
        figure.differences += beyond
        figure.max_abs = max(figure.max_abs, float(error.max()))
        figure.max_ulp = max(figure.max_ulp, float((error / unit).max()))
        return beyond == 0

    def count(self, check: str, name: str, stream: str, t: int, differences: int) -> None:
        """Add entries that differ although none may."""
        figure = self._at(check, name, stream)
        if differences and not figure.differences:
            figure.at_step = t
        figure.differences += differences

    def number(self, name: str, stream: str, t: int, live: float, copy: float, bound: float) -> None:
        """Compare two numbers, which may differ by `bound`; a NaN equals a NaN."""
        figure = self._at("step", name, stream)
        if live == copy or (math.isnan(live) and math.isnan(copy)):
            return
        error = abs(live - copy)
        share = error / bound if bound else math.inf
        figure.max_abs = max(figure.max_abs, error)
        if share > figure.share:
            figure.share, figure.at_step = share, t
        figure.differences += not share <= 1


class Report:
    """What a checker found. str() is a table: of each check and stream the worst parameter.

    Attributes:
        rows: every figure, as dicts.
        steps: steps repeated from the live state.
        trajectory_steps: steps of the copy that never resynchronises.
        notes: lines that say what else happened, such as skipped steps.
    """

    def __init__(self, tally: Tally, steps: int, trajectory_steps: int, notes: list[str]):
        self.rows = [figure.row() for figure in tally.figures.values()]
        self.steps, self.trajectory_steps, self.notes = steps, trajectory_steps, list(notes)

    @property
    def passed(self) -> bool:
        """Whether everything is within its bound, and something was checked."""
        return self.steps > 0 and all(row["passed"] for row in self.rows)

    def worst(self) -> list[dict[str, Any]]:
        """Of each check and stream, the row with the most entries beyond its bound, or else nearest to it."""
        worst: dict[tuple[str, str], dict[str, Any]] = {}
        for row in self.rows:
            key = row["check"], row["stream"]
            rank = (row["differences"] > 0, row["share"], row["differences"], row["max_abs"])
            if key not in worst or rank > worst[key]["rank"]:
                worst[key] = {**row, "rank": rank}
        return [{k: v for k, v in row.items() if k != "rank"} for row in worst.values()]

    def verdict(self) -> str:
        """One line: pass or fail, and over how much."""
        over = sum(not row["passed"] for row in self.rows)
        if self.steps == 0:
            return "FAIL: no step has been checked"
        what = f"{self.steps} steps from the live state, {self.trajectory_steps} along one trajectory"
        return (
            f"FAIL: {over} of {len(self.rows)} figures beyond their bounds; {what}"
            if over
            else f"PASS: {what}"
        )

    def __str__(self) -> str:
        head = ("check", "stream", "worst parameter", "step", "max abs", "max ulp", "of bound", "beyond", "")
        table = [head]
        for row in sorted(self.worst(), key=lambda row: row["check"]):
            exact = row["share"] == 0 and row["max_abs"] == 0
            sizes = [f"{row[key]:.3g}" for key in ("max_abs", "max_ulp", "share")]
            cells = [row["check"], row["stream"], row["parameter"], str(row["at_step"] or "")]
            cells += ["0", "0", ""] if exact else sizes
            table.append((*cells, str(row["differences"]), "ok" if row["passed"] else "FAIL"))
        widths = [max(len(line[k]) for line in table) for k in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        return "\n".join([*lines, *self.notes, self.verdict()])
