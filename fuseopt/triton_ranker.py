"""Ranking weights for pruning by the Triton kernels."""

import torch
from torch import Tensor

from . import distributed, patterns, select, triton_table
from .checks import in_layout_of
from .kernels import rules
from .kernels import select as kernels
from .kernels import table as t
from .stages import mask
from .triton_backend import launch, triton_type
from .triton_table import Launch, Memory, Row


class Ranker:
    """select.Ranker. The kernels take ties in the order of memory, as cpu_ranker.Ranker and with the same exception."""

    widths = [16, 15]
    kth = select.by_digits

    def __init__(self, opt, members: select.Members):
        self.opt, self.members = opt, members
        self.device = distributed.local(members[0][1]).device
        memory, rows = Memory(self.device), []
        for gs, p in members:
            state, here = opt.state[p], distributed.local(p)
            mask.into_memory_order(state, p)
            rows.append(Row(memory, gs, distributed.local_state(state), here, here, list(gs.emas)))
            if gs.stage["keep_moments"]:
                rows[-1].values[t.SLOT : t.EMA] = [0] * (t.EMA - t.SLOT)
        self.blocks, self.rows = triton_table.number(rows, t.IN_SUMS), rows
        self.launches = triton_table.launches(memory, rows)

    def _constants(self, one: Launch) -> dict:
        slots = rules.RULES[one.kernel].slots
        return {"SLOTS": slots, "AVERAGES": one.averages, "NARROW": one.narrow, "DTYPE": triton_type(one.p)}

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        counts = torch.zeros(1 << width, dtype=torch.int64, device=self.device)
        for one in self.launches:
            arguments = one.table, len(one.rows), counts, prefix, shift, width
            launch(kernels.histogram, one.blocks, one.p, *arguments, DTYPE=triton_type(one.p))
        return counts.cpu()

    def _ties(self, kth: int) -> Tensor:
        """Of each block."""
        counts = torch.zeros(self.blocks, dtype=torch.int64, device=self.device)
        for one in self.launches:
            launch(kernels.ties, one.blocks, one.p, one.table, len(one.rows), counts, kth, DTYPE=triton_type(one.p))
        return counts

    def ties(self, kth: int) -> Tensor:
        parts = self._ties(kth).split([row.blocks for row in self.rows])
        return torch.stack([part.sum() for part in parts]).cpu()

    def prune(self, kth: int, quotas: Tensor) -> None:
        shared = quotas.numel() < len(self.members)
        if not all(row.p.is_contiguous() for row in self.rows):
            quotas, shared = select.row_major(self.opt, self.members, kth, quotas, self.ties(kth)), False
        of_blocks = select.share_blocks(quotas, self._ties(kth), [row.blocks for row in self.rows], shared)
        for one in self.launches:
            launch(
                kernels.prune_smallest, one.blocks, one.p, one.table, len(one.rows), kth, of_blocks,
                **self._constants(one),
            )  # fmt: skip

    def prune_n_m(self, n: int, m: int) -> None:
        (row,), (one,) = self.rows, self.launches
        marks = torch.zeros(-(-row.p.numel() // 32), dtype=torch.int32, device=self.device)
        geometry = n, m, row.p.shape[1], row.p.stride(1)
        launch(kernels.mark_n_m, one.blocks, one.p, one.table, marks, *geometry, DTYPE=triton_type(one.p))
        launch(kernels.prune_marked, one.blocks, one.p, one.table, marks, **self._constants(one))


def ranker(opt, members: select.Members) -> select.Ranker:
    """Parameters whose memory has gaps are ranked by torch."""
    here = [distributed.local(p) for _, p in members]
    return (Ranker if all(in_layout_of(p, p) is p for p in here) else patterns.TorchRanker)(opt, members)
