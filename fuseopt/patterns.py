"""Pruning to patterns: n of every m entries, and whole rows. What each step lets go first, where it regrows.

n:m is decided within a group of m entries, so it needs no ranking of the whole and processes agree if each has
whole groups. Rows are ranked as select.py ranks entries, by the sums of their squares.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import plan, select
from .checks import name_of
from .distributed import indices, is_dtensor, local
from .stages import mask
from .stages.prune import parse_n_m

CHUNK = 1 << 18  # entries that are widened at once: what fits the cache


def held(opt, gs: plan.GroupStep, p: Tensor) -> tuple[Tensor, Tensor]:
    """(pruned, frozen): boolean tensors over p's entries on this process; where this step lets entries go first,
    only what is frozen too is still pruned."""
    state, here = opt.state.get(p, {}), local(p)
    nothing = torch.zeros(here.shape, dtype=torch.bool, device=here.device)
    pruned, frozen = (nothing if x is None else x for x in (mask.pruned(state, here), plan.frozen(state, here)))
    return (pruned & frozen if gs.group["prune"]["regrow"] else pruned), frozen


@torch.no_grad()
def let_go(opt, step: plan.Step) -> None:
    """Where this step regrows: entries that are not frozen are no longer pruned."""
    for gs in step.groups:
        if gs.sparsity is None or not gs.group["prune"]["regrow"]:
            continue
        for p in plan.prunable(gs):
            state = opt.state.get(p, {})
            if "prune_mask" in state:
                mask.into_memory_order(state, p)
                if state.get("mask_freeze"):
                    mask.set_pruned(state, local(p), held(opt, gs, p)[0])
                else:
                    state["prune_mask"].zero_()


def check(opt, selection: select.Selection) -> None:
    """Raise ValueError, with nothing changed, if a selection asks for what masks or processes do not allow."""
    {"unstructured": select.check_enough, "rows": _check_rows}.get(selection.pattern, _check_n_m)(opt, selection)


def prune(opt, selection: select.Selection, make_ranker: Callable[[select.Members], select.Ranker]) -> None:
    """Zero what a selection chooses of the new weights, their moments and averages."""
    if selection.pattern == "unstructured":
        select.prune(opt, selection, make_ranker)
    elif selection.pattern == "rows":
        _prune_rows(opt, selection, make_ranker)
    else:
        (_, p), (n, m) = selection.members[0], parse_n_m(selection.pattern)
        if local(p).numel() and local(p).shape[1] > n:
            make_ranker(selection.members).prune_n_m(n, m)


# ---- n of every m --------------------------------------------------------------------------------


def groups(x: Tensor, m: int, fill: int | bool = 0) -> Tensor:
    """x with dimension 1 cut into groups of m, which come last; a short one is filled up."""
    x = x.movedim(1, -1)
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % m), value=fill)
    return x.reshape(*x.shape[:-1], -1, m)


def _check_n_m(opt, selection: select.Selection) -> None:
    (gs, p), (n, m) = selection.members[0], parse_n_m(selection.pattern)
    name, total = name_of(opt, p), selection.parts.total
    if is_dtensor(p) and total(lambda _: torch.tensor(not _has_whole_groups(p, m))):
        raise ValueError(
            f"{name} of shape {tuple(p.shape)} is split among processes along dimension 1, within groups of {m}; for "
            f"pattern {selection.pattern!r} split it along dimension 0, or at multiples of {m}"
        )
    if opt.state.get(p, {}).get("mask_freeze"):
        pruned, frozen = held(opt, gs, p)
        stuck = int(total(lambda _: (groups(frozen & ~pruned, m).sum(-1) > n).sum()))
        if stuck:
            raise ValueError(
                f"pattern {selection.pattern!r} keeps {n} of every {m} entries, but in {stuck} groups of {name} masks "
                f"freeze more; unfreeze some, or put {name} in a group with prune=None"
            )


def _has_whole_groups(p: Tensor, m: int) -> bool:
    """Whether the part of a DTensor that lies here is cut between groups of m along dimension 1."""
    index = indices(p, 1)
    place = torch.arange(len(index), device=index.device)
    together = index - place % m == index[place - place % m]
    full = len(index) % m == 0 or int(index[-1]) == p.shape[1] - 1
    return full and bool((together & (index % m == place % m)).all())


class TorchRanker(select.TorchRanker):
    """select.Ranker with torch operations."""

    def prune_n_m(self, n: int, m: int) -> None:
        (gs, p), key, free = self.members[0], self.keys[0], self.free[0]
        pruned = held(self.opt, gs, p)[0]
        rows = max(1, CHUNK * len(key) // key.numel())
        parts = zip(*(x.split(rows) for x in (key, free, pruned)), strict=True)
        self.zero(gs, p, torch.cat([_beyond(*part, n, m) for part in parts]))


def _beyond(key: Tensor, free: Tensor, pruned: Tensor, n: int, m: int) -> Tensor:
    """Which of the entries `free` go."""
    rank = groups(key.long(), m) * m + torch.arange(m - 1, -1, -1, device=key.device)
    free, gone = groups(free, m, False), groups(pruned, m, True)
    order = torch.where(free, rank, torch.iinfo(torch.int64).max).argsort(-1)
    chosen = (order.argsort(-1) < m - n - gone.sum(-1, keepdim=True)) & free
    return chosen.flatten(-2)[..., : key.shape[1]].movedim(-1, 1)


# ---- whole rows ----------------------------------------------------------------------------------


def squares(p: Tensor) -> Tensor:
    """The sum of squares of each row in double, by halving: in a fixed order, whatever the number of threads."""
    sums = []
    for x in p.detach().flatten(1).split(max(1, CHUNK * len(p) // max(1, p.numel()))):
        x = x.double().square()
        while x.shape[1] > 1:
            half = -(-x.shape[1] // 2)
            x[:, : x.shape[1] - half] += x[:, half:]
            x = x[:, :half]
        sums.append(x[:, 0])
    return torch.cat(sums)


def _keys(sums: Tensor) -> Tensor:
    """Integers in the order of sums of squares, NaN last."""
    return sums.view(torch.int64) & ((1 << 63) - 1)


def _rows(opt, gs: plan.GroupStep, p: Tensor) -> tuple[Tensor, Tensor]:
    """(wholly pruned, candidates): which rows that lie here are gone, and which may be chosen."""
    if not opt.state.get(p, {}).get("mask_freeze"):
        gone = _gone(opt, gs, p)
        return gone, ~gone
    pruned, frozen = (x.flatten(1) for x in held(opt, gs, p))
    gone = pruned.all(1)
    return gone, ~gone & ~frozen.any(1)


def _gone(opt, gs: plan.GroupStep, p: Tensor) -> Tensor:
    """Which rows that lie here are wholly pruned, where nothing is frozen. Unfolds no mask if it need not."""
    state, here = opt.state.get(p, {}), local(p)
    if "prune_mask" not in state or gs.group["prune"]["regrow"] or not here.numel():
        return torch.zeros(len(here), dtype=torch.bool, device=here.device)
    bits, columns = state["prune_mask"], here.numel() // len(here)
    if bits.dtype == torch.bool or columns % 8 or mask.order_of(state, here)[0] != 0:
        return mask.pruned(state, here).flatten(1).all(1)
    rows = bits[: here.numel() // 8].view(len(here), -1)
    gone = rows[:, 0] == 255
    gone[gone.clone()] = (rows[gone] == 255).all(1)
    return gone


def _count_rows(opt, selection: select.Selection) -> list[int]:
    """[rows, pruned ones, candidates] of a selection on all processes."""

    def count(members: list[int]) -> Tensor:
        found = [_rows(opt, *selection.members[k]) for k in members]
        sums = [[len(gone), int(gone.sum()), int(free.sum())] for gone, free in found]
        return torch.tensor(sums, dtype=torch.int64).reshape(-1, 3).sum(0)

    return selection.parts.total(count).tolist()


def _check_rows(opt, selection: select.Selection) -> None:
    for _, p in selection.members:
        if is_dtensor(p) and any(getattr(x, "dim", 0) != 0 for x in p.placements):
            raise ValueError(
                f"{name_of(opt, p)} has placements {p.placements}; pattern 'rows' needs whole rows on a process: "
                "split it along dimension 0 only, or put it in a group with prune=None"
            )
    rows, gone, free = _count_rows(opt, selection)
    select.check_room(opt, selection, rows, gone + free, "rows, but masks freeze entries of")


def _prune_rows(opt, selection: select.Selection, make_ranker: Callable[[select.Members], select.Ranker]) -> None:
    rows, gone, free = _count_rows(opt, selection)
    step_of = {p: gs for gs, p in selection.members}
    select.prune_smallest(
        selection,
        round(selection.sparsity * rows) - gone,
        free,
        make_ranker,
        lambda p, kth: _rows(opt, step_of[p], p)[1] & (_keys(squares(local(p))) == kth),
    )


class RowRanker(select.TorchRanker):
    """select.Ranker of rows in place of entries."""

    widths = [11, 11, 11, 10, 10, 10]

    def __init__(self, opt, members: select.Members):
        self.opt, self.members = opt, members
        self.keys = [_keys(self.squares(local(p))) for _, p in members]
        self.free = [_rows(opt, gs, p)[1] for gs, p in members]
        found = [key[free] for key, free in zip(self.keys, self.free, strict=True)]
        self.all_free = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)  # no members lie here

    def squares(self, p: Tensor) -> Tensor:
        """The sum of squares of each row."""
        return squares(p)

    def kth(self, count: int, of: int) -> tuple[int, int]:
        """By sorting: rows are few."""
        ordered = self.all_free.sort().values
        kth = ordered[count - 1]
        return int(kth), count - int(torch.searchsorted(ordered, kth))

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        key = self.all_free
        digits = (key[key >> (shift + width) == prefix] >> shift) & ((1 << width) - 1)
        return torch.bincount(digits, minlength=1 << width).cpu()

    def zero(self, gs: plan.GroupStep, p: Tensor, chosen: Tensor) -> None:
        here = local(p)
        super().zero(gs, p, chosen.reshape(-1, *[1] * (here.dim() - 1)).expand(here.shape))
