"""Pruning to a sparsity: which weights go. Processes agree on it by adding up histograms, never weights.

The k-th smallest magnitude is found digit by digit (radix select on the bits of |p| as fp32). Of the entries
equal to it the first go, by (parameter order, flat row-major index); where processes share a parameter and
only some of its ties go, the last one is found in the same way on the flat index.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .checks import name_of
from .distributed import Parts, indices, is_dtensor, local, local_state
from .plan import GroupStep, Step, frozen, prunable
from .stages import ema, mask
from .stages import prune as prune_options

Members = list[tuple[GroupStep, Tensor]]


@dataclass
class Selection:
    """Parameters that are ranked together, and the share of their entries that is pruned afterwards."""

    members: Members
    sparsity: float
    parts: Parts
    pattern: str = "unstructured"  # else patterns.py chooses


class Ranker(Protocol):
    """What a backend does for some members. A candidate is an entry neither frozen nor pruned.

    widths: of the digits that `histogram` counts, the highest first; all rankers of a selection have the same.
    """

    widths: list[int]

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        """Candidates by digit: of the magnitudes m with m >> (shift + width) == prefix, m >> shift, `width` bits."""
        ...

    def kth(self, count: int, of: int) -> tuple[int, int]:
        """(the count-th smallest of all `of` candidates, from 1, its rank among the keys equal to it)."""
        ...

    def ties(self, kth: int) -> Tensor:
        """The number of candidates with magnitude kth, for each member."""
        ...

    def prune(self, kth: int, quotas: Tensor) -> None:
        """Prune the candidates below kth, and of those equal to it the first quotas[i] of member i; or, if
        quotas is a single number for several members, the first so many of them all."""
        ...

    def prune_n_m(self, n: int, m: int) -> None:
        """Prune the only member: of the candidates of each group of m entries along dimension 1 the smallest, of
        equal ones the last, until n are left."""
        ...


def selections(opt, step: Step) -> list[Selection]:
    """What prunes at this step: the parameters of all groups whose options are equal, or each tensor alone."""
    found: list[tuple[dict, Selection]] = []
    for gs in step.groups:
        if gs.sparsity is None:
            continue
        members = [(gs, p) for p in prunable(gs)]
        options = gs.group["prune"]
        alike = next((selection for seen, selection in found if seen == options), None)
        pattern = options["pattern"]
        if options["scope"] == "tensor" or prune_options.is_n_m(options):
            found += [(options, Selection([member], gs.sparsity, Parts([member[1]]), pattern)) for member in members]
        elif alike is None:
            found.append((options, Selection(members, gs.sparsity, None, pattern)))
        else:
            alike.members += members
    for _, selection in found:
        selection.parts = selection.parts or Parts([p for _, p in selection.members], opt.defaults["sharded"])
    return [selection for _, selection in found if selection.parts.members]


def candidates(opt, p: Tensor) -> Tensor:
    """Boolean tensor over p's entries on this process: True where neither frozen nor pruned."""
    state, p = opt.state.get(p, {}), local(p)
    free = torch.ones(p.shape, dtype=torch.bool, device=p.device)
    for held in (mask.pruned(state, p), frozen(state, p)):
        free = free if held is None else free & ~held
    return free


def magnitudes(p: Tensor) -> Tensor:
    """|p| as fp32, as the integers of the same order (NaN last), of p's entries on this process."""
    return local(p).detach().float().abs().contiguous().view(torch.int32)


def _counts(opt, selection: Selection) -> list[int]:
    """[entries, pruned ones, candidates] of a selection on all processes. Reads no weights."""

    def count(members: list[int]) -> Tensor:
        rows = []
        for k in members:
            p = selection.members[k][1]
            state, n = opt.state.get(p, {}), local(p).numel()
            pruned = mask.count(state["prune_mask"]) if "prune_mask" in state else 0
            free = int(candidates(opt, p).sum()) if state.get("mask_freeze") else n - pruned
            rows.append((n, pruned, free))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).sum(0)

    return selection.parts.total(count).tolist()


def check_enough(opt, selection: Selection) -> None:
    """Raise ValueError if the sparsity asks for more entries than are not frozen."""
    n, pruned, free = _counts(opt, selection)
    check_room(opt, selection, n, free + pruned, "entries, but masks freeze")


def check_room(opt, selection: Selection, n: int, room: int, what: str) -> None:
    """Raise ValueError if the sparsity asks for more than `room` of n; what: they are, and what holds the others."""
    target = round(selection.sparsity * n)
    if target > room:
        where = "the prunable parameters" if len(selection.members) > 1 else name_of(opt, selection.members[0][1])
        raise ValueError(
            f"sparsity {selection.sparsity:g} of {where} asks to prune {target} of {n} {what} all but {room}; "
            "lower the sparsity, or put frozen parameters in a group with prune=None"
        )


def kth_smallest(count: int, widths: list[int], histogram: Callable[[int, int, int], Tensor]) -> tuple[int, int, int]:
    """(the count-th smallest key, its rank among the keys equal to it, how many are equal to it), count from 1.

    histogram(prefix, shift, width): how many keys with key >> (shift + width) == prefix have each value of
    the next `width` bits. widths: of the digits, the highest first.
    """
    key, shift, equal = 0, sum(widths), 0
    for width in widths:
        shift -= width
        counts = histogram(key, shift, width)
        running = counts.cumsum(0)
        if count > int(running[-1]):
            raise RuntimeError("fuseopt found fewer entries to prune than its checks did; please report this")
        digit = int(torch.searchsorted(running, count))
        equal = int(counts[digit])
        count -= int(running[digit]) - equal
        key = key << width | digit
    return key, count, equal


def by_digits(ranker: Ranker, count: int, of: int) -> tuple[int, int]:
    """What Ranker.kth returns, by histograms."""
    return kth_smallest(count, ranker.widths, ranker.histogram)[:2]


def prune(opt, selection: Selection, make_ranker: Callable[[Members], Ranker]) -> None:
    """Zero the smallest of the new weights, their moments and averages, until the sparsity is reached."""
    n, pruned, free = _counts(opt, selection)
    count = round(selection.sparsity * n) - pruned
    prune_smallest(selection, count, free, make_ranker, lambda p, kth: candidates(opt, p) & (magnitudes(p) == kth))


def prune_smallest(
    selection: Selection,
    count: int,
    of: int,
    make_ranker: Callable[[Members], Ranker],
    tied: Callable[[Tensor, int], Tensor],
) -> None:
    """Prune the `count` smallest of all `of` candidates of the members, which have keys of sum(ranker.widths) bits.

    tied(p, kth): where the candidates of parameter p on this process are that have the key kth.
    """
    if count <= 0:
        return
    parts = selection.parts
    rankers = {tuple(m): make_ranker([selection.members[k] for k in m]) for m in parts.members.values()}
    if list(parts.members) == [()]:  # all on this process: the ranker counts off the ties by itself
        ranker = rankers[tuple(parts.members[()])]
        kth, rank = ranker.kth(count, of)
        ranker.prune(kth, torch.tensor([rank]))
        return
    widths = next(iter(rankers.values())).widths
    kth, rank, equal = kth_smallest(
        count, widths, lambda *digit: parts.total(lambda members: rankers[tuple(members)].histogram(*digit))
    )
    shares = torch.full((len(selection.members),), equal)
    if rank < equal:
        ties = torch.zeros_like(shares)
        for members, ranker in rankers.items():
            ties[list(members)] = ranker.ties(kth)
        shares = quotas(selection.parts, ties, rank, lambda p: tied(p, kth))
    for members, ranker in rankers.items():
        ranker.prune(kth, shares[list(members)])


def share(rank: int | Tensor, ties: Tensor) -> Tensor:
    """How many of each member's ties are among the first `rank` of all, taken in the order of the members."""
    return (rank - (ties.cumsum(0) - ties)).clamp(min=0).minimum(ties)


def share_blocks(quotas: Tensor, ties: Tensor, blocks: list[int], shared: bool) -> Tensor:
    """How many of each block's ties go: the first quotas[i] of member i, which has blocks[i], or quotas[0] of all."""
    parts = [ties] if shared else ties.split(blocks)
    return torch.cat([share(quota, part) for quota, part in zip(quotas.tolist(), parts, strict=True)])


def row_major(opt, members: Members, kth: int, quotas: Tensor, ties: Tensor) -> Tensor:
    """Prune with torch the members of which some ties go and others not; what is left of each one's quota.

    For rankers that take ties in the order of memory, where that is not row-major. One at most, as a rule.
    """
    left = share(quotas, ties) if quotas.numel() < len(members) else quotas.clone()
    for k in ((left > 0) & (left < ties)).nonzero().flatten().tolist():
        TorchRanker(opt, members[k : k + 1]).prune(kth, left[k : k + 1])
        left[k] = 0
    return left


def quotas(parts: Parts, ties: Tensor, rank: int, tied: Callable[[Tensor], Tensor]) -> Tensor:
    """How many of each parameter's ties on this process are among the first `rank` of all."""
    total = parts.each(ties)
    chosen = share(rank - parts.before(ties.sum()), total)
    shares = torch.where(chosen == total, ties, chosen)
    for k in ((chosen > 0) & (chosen < total)).nonzero().flatten().tolist():  # one at most
        p = parts.params[k]
        if is_dtensor(p):
            shares[k] = _first_here(p, tied(p), int(chosen[k]))
    return shares


def _first_here(p: Tensor, tied: Tensor, count: int) -> Tensor:
    """How many of the entries (or rows) `tied` on this process are among the first `count` of the whole parameter."""
    index = torch.zeros(int(tied.sum()), dtype=torch.int64)
    for d, position in enumerate(tied.nonzero(as_tuple=True)):
        index = index * p.shape[d] + indices(p, d)[position].cpu()
    parts = Parts([p])
    widths = [16] * -(-p.numel().bit_length() // 16)

    def histogram(prefix: int, shift: int, width: int) -> Tensor:
        digits = (index[index >> (shift + width) == prefix] >> shift) & ((1 << width) - 1)
        return parts.total(lambda _: torch.bincount(digits, minlength=1 << width))

    last, _, _ = kth_smallest(count, widths, histogram)
    return (index <= last).sum()


class TorchRanker:
    """Ranks with torch operations."""

    widths = [16, 15]
    kth = by_digits

    def __init__(self, opt, members: Members):
        self.opt, self.members = opt, members
        self.keys = [magnitudes(p) for _, p in members]
        self.free = [candidates(opt, p) for _, p in members]

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        total = torch.zeros(1 << width, dtype=torch.int64)
        for key, free in zip(self.keys, self.free, strict=True):
            digits = (key[free & (key >> (shift + width) == prefix)] >> shift) & ((1 << width) - 1)
            total += torch.bincount(digits, minlength=1 << width).cpu()
        return total

    def ties(self, kth: int) -> Tensor:
        counts = [int((free & (key == kth)).sum()) for key, free in zip(self.keys, self.free, strict=True)]
        return torch.tensor(counts, dtype=torch.int64)

    @torch.no_grad()
    def prune(self, kth: int, quotas: Tensor) -> None:
        shared = quotas.numel() < len(self.members)
        left = quotas.tolist() * (len(self.members) if shared else 1)
        for k, ((gs, p), key, free) in enumerate(zip(self.members, self.keys, self.free, strict=True)):
            tied = free & (key == kth)
            first = (tied.flatten().cumsum(0) <= left[k]).reshape(tied.shape) & tied
            if shared:
                left = [left[k] - int(first.sum())] * len(left)
            self.zero(gs, p, free & (key < kth) | first)

    def zero(self, gs: GroupStep, p: Tensor, chosen: Tensor) -> None:
        """Prune what was chosen of p's candidates on this process."""
        zero(local_state(self.opt.state[p]), gs, local(p), chosen)


@torch.no_grad()
def zero(state: dict, gs: GroupStep, p: Tensor, new: Tensor) -> None:
    """Prune the entries `new` of a parameter."""
    mask.set_pruned(state, p, mask.pruned(state, p) | new)
    p.masked_fill_(new, 0.0)
    for key in gs.emas if gs.stage["keep_moments"] else gs.slots + gs.emas:
        if key in state and not (key in gs.emas and ema.is_empty(state[key])):
            state[key].masked_fill_(new, 0.0)
