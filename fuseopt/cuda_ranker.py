"""The ranking of weights by the CUDA module."""

import torch
from torch import Tensor

from . import cpu_ranker, cuda, patterns, select
from .checks import in_layout_of
from .distributed import local

DIGITS = [11, 10, 10]  # a block of threads counts one in its shared memory: csrc/cuda/select.h


class Ranker(cpu_ranker.Ranker):
    """cpu_ranker.Ranker on a GPU. There, counts and quotas are of the table's blocks, which run side by side."""

    widths = DIGITS
    kth = select.by_digits

    def __init__(self, opt, members: select.Members):
        self.home = local(members[0][1]).device
        super().__init__(opt, members, cuda.native, cuda.number(self.home))

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        counts = torch.zeros(1 << width, dtype=torch.int64, device=self.home)
        self.table.histogram(prefix, shift, width, counts.data_ptr(), cuda.stream(self.home))
        return counts.cpu()

    def ties(self, kth: int) -> Tensor:
        return torch.stack([part.sum() for part in self._ties_of_blocks(kth).split(self.table.blocks())]).cpu()

    def prune_in_memory_order(self, kth: int, quotas: Tensor, shared: bool) -> None:
        shares = select.share_blocks(quotas, self._ties_of_blocks(kth), self.table.blocks(), shared)
        self.table.prune(kth, shares.data_ptr(), cuda.stream(self.home))

    def prune_n_m(self, n: int, m: int) -> None:
        here = local(self.members[0][1])
        self.table.prune_n_m(n, m, here.shape[1], here.stride(1), cuda.stream(self.home))

    def _ties_of_blocks(self, kth: int) -> Tensor:
        counts = torch.zeros(self.table.block_count, dtype=torch.int64, device=self.home)
        self.table.ties(kth, counts.data_ptr(), cuda.stream(self.home))
        return counts


class TorchRanker(patterns.TorchRanker):
    """For parameters whose memory has gaps. It may stand beside a Ranker, so it counts the same digits."""

    widths = DIGITS


def ranker(opt, members: select.Members) -> select.Ranker:
    """Who ranks these members."""
    here = [local(p) for _, p in members]
    return (Ranker if all(in_layout_of(p, p) is p for p in here) else TorchRanker)(opt, members)
