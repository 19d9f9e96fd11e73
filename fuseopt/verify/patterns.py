"""Pruning to patterns, judged: n of every m entries, and whole rows."""

import torch
from torch import Tensor

from .judge import Candidate

SUM = 1e-12  # how far two double sums of the same squares may differ, relative


def n_m_mismatches(c: Candidate, shape: torch.Size, n: int, m: int, ties: bool) -> tuple[int, int]:
    """(entries wrongly chosen, how far the counts are off) of one parameter.

    In each group of m along dimension 1 a choice is wrong if an entry that was kept is smaller whatever the
    roundings were, or equal and later. ties: also judge entries that are equal in float64 before and after.
    """
    cut = {name: _groups(getattr(c, name), shape, m) for name in Candidate.__annotations__}
    real = _groups(torch.ones_like(c.before), shape, m)
    chosen, kept = cut["after"] & ~cut["before"], real & ~cut["after"] & ~cut["frozen"]
    wrong = (chosen & cut["frozen"]) | (cut["before"] & ~cut["after"])
    certain, place = cut["least"] == cut["greatest"], torch.arange(m, device=chosen.device)
    for k in range(m):
        of_k = {name: x[:, k : k + 1] for name, x in cut.items()}
        equal = certain & certain[:, k : k + 1] & (cut["least"] == of_k["least"])
        if ties:  # then the inputs were the same
            equal |= (cut["exact"] == of_k["exact"]) & (cut["old"] == of_k["old"])
        worse = (cut["least"] > of_k["greatest"]) | (equal & (place < k))
        wrong |= chosen & kept[:, k : k + 1] & worse
    target = torch.maximum(real.sum(1) - n, cut["before"].sum(1))
    return int(wrong.sum()), int((cut["after"].sum(1) - target).abs().sum())


def _groups(x: Tensor, shape: torch.Size, m: int) -> Tensor:
    """A flat stream as rows of m neighbours along dimension 1, filled up with zeros."""
    lines = x.reshape(shape).transpose(1, -1).reshape(-1, shape[1])
    return torch.nn.functional.pad(lines, (0, -shape[1] % m)).reshape(-1, m)


def by_rows(c: Candidate, shape: torch.Size) -> tuple[Candidate, int]:
    """(what the selection saw of the rows, entries pruned outside pruned rows or let go); magnitudes are squares."""
    rows = {name: getattr(c, name).reshape(shape[0], -1) for name in Candidate.__annotations__}
    square = {name: rows[name].double().square().sum(1) for name in ("least", "greatest", "exact", "old")}
    square["least"], square["greatest"] = square["least"] * (1 - SUM), square["greatest"] * (1 + SUM)
    before, after = rows["before"].all(1), rows["after"].all(1)
    broken = (rows["after"] & ~rows["before"] & ~after[:, None]) | (rows["before"] & ~rows["after"])
    return Candidate(**square, before=before, after=after, frozen=rows["frozen"].any(1)), int(broken.sum())
