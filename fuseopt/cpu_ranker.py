"""The ranking of weights by the compiled module."""

import math
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, distributed, patterns, plan, schema, select
from .checks import in_layout_of
from .stages import mask

SAMPLED = 1 << 16  # candidates from which on a sample tells enough
FINE = 15  # low bits of a key that the sample does not count
LARGE = 1 << 22  # candidates from which on it is worth its time to count more digits at once


class Ranker:
    """select.Ranker by compiled loops over a table of the members.

    They take ties in the order of memory. Where that is not row-major and only some of a member's ties go, torch
    prunes that member.
    """

    widths = [16, 15]

    def __init__(self, opt, members: select.Members, module: ModuleType | None = None, device: int = -1):
        """module: the compiled one, for the CPU unless given; device: the number of a GPU."""
        specs, grads = [], {}
        for gs, p in members:  # a parameter may have no gradient, or no state yet
            mask.into_memory_order(opt.state[p], p)
            has = opt.state[p].__contains__  # see plan.settle_state
            emas = tuple((key, -1.0, key in gs.narrow, True) for key in gs.emas if has(key))
            specs.append(cpu.spec(gs, [p], tuple(filter(has, gs.slots)), (), emas))
            grads[p] = (p, False, None)
        self.opt, self.members, self.table = opt, members, (module or cpu.native).TensorTable()
        if self.table.gather(specs, opt.state, grads, 1.0, device):
            raise RuntimeError("fuseopt cannot read a parameter that its checks accept; please report this")

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        return self._count(prefix << (shift + width), shift, 1 << width)[1]

    def kth(self, count: int, of: int) -> tuple[int, int]:
        """A sample says about where the key lies, so that one reading of the weights mostly finds it."""
        return self._search(count, of, *self._window(count, of)) or select.by_digits(self, count, of)

    def _count(self, first: int, shift: int, digits: int, sample: bool = False) -> tuple[int, Tensor]:
        """(candidates with a key below `first`, those above by (key - first) >> shift, which is below `digits`)."""
        counts = torch.zeros(digits, dtype=torch.int64)
        return self.table.histogram(first, shift, digits, sample, counts.data_ptr()), counts

    def _window(self, count: int, of: int) -> tuple[int, int]:
        """(first, span): the key sought is very likely one of the `span` from `first` on."""
        if of < SAMPLED:
            return 0, 1 << 31
        running = self._count(0, FINE, 1 << (31 - FINE), sample=True)[1].cumsum(0)
        seen, share = int(running[-1]), count / of
        margin = 4 * math.sqrt(seen * share * (1 - share)) + 1  # four standard deviations, were they drawn by chance
        ends = torch.tensor([share * seen - margin, share * seen + margin]).clamp(1, max(1, seen))
        low, high = torch.searchsorted(running, ends.long()).tolist()
        return low << FINE, (high - low + 1) << FINE

    def _search(self, count: int, of: int, first: int, span: int) -> tuple[int, int] | None:
        """(the count-th key, its rank among its equals), if it is one of the `span` from `first` on."""
        most = 18 if of > LARGE else 13
        while True:
            shift = max(0, (span - 1).bit_length() - most)
            below, counts = self._count(first, shift, -(-span >> shift))
            running = counts.cumsum(0)
            if not below < count <= below + int(running[-1]):
                return None
            digit = int(torch.searchsorted(running, count - below))
            if not shift:
                return first + digit, count - below - int(running[digit]) + int(counts[digit])
            first, span = first + (digit << shift), 1 << shift

    def ties(self, kth: int) -> Tensor:
        counts = torch.zeros(len(self.members), dtype=torch.int64)
        self.table.ties(kth, counts.data_ptr())
        return counts

    def prune(self, kth: int, quotas: Tensor) -> None:
        shared = quotas.numel() < len(self.members)
        if not all(distributed.local(p).is_contiguous() for _, p in self.members):
            quotas, shared = select.row_major(self.opt, self.members, kth, quotas, self.ties(kth)), False
        self.prune_in_memory_order(kth, quotas.contiguous(), shared)

    def prune_in_memory_order(self, kth: int, quotas: Tensor, shared: bool) -> None:
        self.table.prune(kth, quotas.data_ptr(), shared)

    def prune_n_m(self, n: int, m: int) -> None:
        here = distributed.local(self.members[0][1])
        self.table.prune_n_m(n, m, here.shape[1], here.stride(1))


class RowRanker(patterns.RowRanker):
    """patterns.RowRanker by compiled loops. Members whose rows do not lie one after the other are left to torch."""

    def squares(self, p: Tensor) -> Tensor:
        x = p.detach().flatten(1).contiguous()
        sums = torch.empty(len(x), dtype=torch.float64)
        cpu.native.square_rows(x.data_ptr(), schema.STORAGES[x.dtype], *x.shape, sums.data_ptr())
        return sums

    def zero(self, gs: plan.GroupStep, p: Tensor, chosen: Tensor) -> None:
        here = distributed.local(p)
        if in_layout_of(here, here) is not here or mask.memory_order(here)[0] != 0:
            return super().zero(gs, p, chosen)
        rows = mask.pack(chosen)
        Ranker(self.opt, [(gs, p)]).table.prune_rows([(rows.data_ptr(), len(chosen))])


def ranker(opt, members: select.Members) -> select.Ranker:
    """Parameters whose memory has gaps are ranked by torch."""
    here = [distributed.local(p) for _, p in members]
    return (Ranker if all(in_layout_of(p, p) is p for p in here) else patterns.TorchRanker)(opt, members)
