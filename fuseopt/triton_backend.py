"""The Triton backend: a step by the kernels of kernels/. See triton_table.py for what they work on."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from . import cpu, distributed, plan, schema, triton_table
from .checks import share_memory
from .kernels import aot, reduce, rules, step
from .kernels import table as t
from .stages import clip, statistics
from .triton_table import Launch, Memory, Row, Scalars, launches, rounded


def launch(kernel, programs: int, p: Tensor, *arguments, **constants) -> None:
    """Run a kernel that streams tensors like p on torch's current stream of its device."""
    with nullcontext() if p.device.type == "cpu" else getattr(torch, p.device.type).device(p.device):
        options = aot.options(str(p.dtype), statistics=constants.get("STATISTICS", False))
        kernel[(programs,)](*arguments, **constants, **options)


def triton_type(p: Tensor) -> tl.dtype:
    return getattr(tl, str(p.dtype).removeprefix("torch."))


class Pass:
    """A step over all that has a gradient: its rows, launches and scalars."""

    def __init__(self, opt, step: plan.Step, prepared: dict[Tensor, plan.Prepared]):
        self.opt, self.step, self.members = opt, step, plan.stepped(step)
        self.params = [p for _, p in self.members]
        here = [distributed.local(p) for _, p in self.members]
        self.memory = opt.__dict__.pop("_triton", None)  # the step has it to itself, see cpu.gather
        if self.memory is None or self.memory.device != here[0].device:
            self.memory = Memory(here[0].device)
        seen, scalars = {}, Scalars()
        self.rows = [self._row(*member, part, prepared, seen) for member, part in zip(self.members, here, strict=True)]
        self.memory.seen = seen
        for row, (gs, p) in zip(self.rows, self.members, strict=True):
            fresh = p in prepared and prepared[p].fresh
            kind = schema.compute_dtype(row.p.dtype)
            row.values[t.SCALARS] = scalars.place(gs, opt.state.get(p, {}), kind, fresh)
            row.values[t.GROUP] = next(k for k, one in enumerate(step.groups) if one is gs)
        self.in_sums = triton_table.number(self.rows, t.IN_SUMS)
        # What is wholly frozen is there for the statistics alone.
        moved = [row for row in self.rows if opt.defaults["statistics"] or not row.all_frozen]
        self.launches = launches(self.memory, moved, share_memory(here))
        self.scalars, self.counters = scalars.upload(self.memory), scalars.counters.values()
        every = [p for group in opt.param_groups for p in group["params"]]
        self.shared = opt.defaults["sharded"] or any(map(distributed.is_dtensor, every))

    def _row(self, gs: plan.GroupStep, p: Tensor, part: Tensor, prepared: dict, seen: dict) -> Row:
        """The row of a parameter, which is kept as long as nothing about it changes."""
        state, made = self.opt.state.get(p, {}), prepared.get(p)
        glimpse, emas, row = self.memory.seen[p] if made is None else (None, None, None)
        now = triton_table.averages(gs, state)
        if row is None or now != emas:
            grad = p.grad if made is None else made.grad
            row = Row(self.memory, gs, distributed.local_state(state), part, grad, now)
        if made is not None and made.grad is p.grad and row.copy is part:
            glimpse = triton_table.glimpse(self.opt, gs, p)
        if glimpse is not None:
            seen[p] = glimpse, now, row
        return row

    # ---- the norm ------------------------------------------------------------------------------

    def _squares(self) -> Tensor:
        """The sum of squares of each block's gradient; 0 of what is wholly frozen, which has its place all the same."""
        sums = self.memory.room("squares", self.in_sums)
        if sum(one.blocks for one in self.launches) < self.in_sums:
            sums.zero_()
        for one in self.launches:
            scalars = self.scalars[schema.compute_dtype(one.p.dtype)]
            constants = {"MASKED": one.masked, "DTYPE": triton_type(one.p)}
            launch(reduce.grad_norm, one.blocks, one.p, one.table, len(one.rows), scalars, sums, **constants)
        return sums

    def clip_factors(self) -> dict[torch.dtype, Tensor]:
        """Each group's factor, in both types of arithmetic; found on the device, unless processes find it together."""
        bounds = [gs.group["max_grad_norm"] or 0.0 for gs in self.step.groups]
        kinds = (torch.float32, torch.float64)
        if any(bounds) and not self.shared:
            wide, narrow = (self.memory.room(f"clip {kind}", len(bounds), kind) for kind in kinds[::-1])
            there = self.memory.upload("bounds", np.array(bounds))
            sums = self._squares()
            launch(reduce.clip, 1, wide, sums, self.in_sums, there, len(bounds), wide, narrow)
            return {torch.float32: narrow, torch.float64: wide}
        norm = 0.0
        if any(bounds):
            rows = sums_of(places_of(self.rows), self._squares().cpu().numpy()[:, None])
            norm = math.sqrt(cpu.total_of(self.opt, self.params, rows, 1, self.shared)[0])
        factors = [clip.factor(bound, norm) for bound in bounds]
        return {kind: self.memory.upload(f"factors {kind}", rounded(factors, kind)) for kind in kinds}

    # ---- the update ----------------------------------------------------------------------------

    def run(self) -> None:
        factors = self.clip_factors()
        asked = self.opt.defaults["statistics"]
        sums = self.memory.room("sums", statistics.WIDTH * self.in_sums if asked else 1)
        for one in self.launches:
            gaps = [row for row in one.rows if row.copy is not row.p]
            for row in gaps:
                row.copy.copy_(row.p)
            self._launch(one, factors, sums)
            for row in gaps:
                row.p.copy_(row.copy)
        cpu.increment_version(self.params)
        for counter, value in self.counters:
            counter.fill_(value)
        if asked:  # processes add theirs up at once, as one of them alone may ask for the result
            read = self._statistics(sums)
            self.opt._statistics = read(self.opt).read() if self.shared else read
        self.opt._triton = self.memory

    def _launch(self, one: Launch, factors: dict, sums: Tensor) -> None:
        kind = schema.compute_dtype(one.p.dtype)
        rule = rules.RULES[one.kernel]
        constants = {"update": rule.update, "SLOTS": rule.slots, "AVERAGES": one.averages, "NARROW": one.narrow}
        constants |= {"MASKED": one.masked, "STATISTICS": self.opt.defaults["statistics"], "DTYPE": triton_type(one.p)}
        tensors = one.table, len(one.rows), self.scalars[kind], factors[kind], sums, self.in_sums
        launch(step.step, one.blocks, one.p, *tensors, **constants)

    def _statistics(self, sums: Tensor) -> Callable[[Any], statistics.Statistics]:
        """What opt.statistics() calls, with the optimizer, once somebody asks. It holds no optimizer itself."""
        own, params, shared = self.rows, self.params, self.shared

        def read(opt) -> statistics.Statistics:
            now, places = sums.clone(), places_of(own)  # the next step writes over both

            def fetch() -> Mapping[str, float]:
                rows = sums_of(places, now.cpu().numpy().reshape(statistics.WIDTH, -1).T)
                return statistics.values(cpu.total_of(opt, params, rows, statistics.WIDTH, shared))

            return statistics.Statistics(fetch)

        return read


def places_of(rows: list[Row]) -> list[tuple[int, int]]:
    """(first block, blocks) of each parameter among the sums."""
    return [(row.values[t.IN_SUMS], row.blocks) for row in rows]


def sums_of(places: list[tuple[int, int]], sums: np.ndarray) -> list[tuple[float, ...]]:
    """The sums of each parameter, those of its blocks added up in order."""
    parts = [sums[first:][:blocks] for first, blocks in places]
    return [tuple(part.cumsum(0)[-1]) if len(part) else (0.0,) * sums.shape[1] for part in parts]


def run(opt, step: plan.Step, prepared: dict[Tensor, plan.Prepared]) -> None:
    """Stages 1 to 12 over every parameter that has a gradient; `prepared` holds those that `unseen` named."""
    if plan.stepped(step):
        Pass(opt, step, prepared).run()
    elif opt.defaults["statistics"]:
        opt._statistics = statistics.result([0.0] * statistics.WIDTH)
