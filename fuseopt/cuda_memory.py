"""What the CUDA backend keeps on the GPU beside an optimizer's state, and what Python knows of it."""

import operator
from collections.abc import Mapping
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from . import cpu, distributed
from .stages import ema, statistics


class Memory:
    """What a step reads and writes on the GPU beside the state, in the order of csrc/cuda/args.h.

    steps: how many steps counted, as `control` has it; None where only the GPU knows.
    least: as many counted at least.
    """

    def __init__(self, device: torch.device, native: ModuleType):
        self.device, self.native = device, native
        self.control = self._zeros(native.CONTROL)
        self.scalars = self.squares = self.sums = self.fresh = self._zeros(0)
        self.steps, self.least = 0, 0
        self.total: Tensor | None = None  # the squares of all processes, of the last step
        self.outgrown: list[Tensor] = []  # which a graph, or launches on another stream, may still use
        self.captured = False
        self.noted: set[Tensor] = set()  # parameters whose `fresh` was set; whether it still is, is not known
        self.addresses: tuple[int, ...] = ()

    def _zeros(self, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(n, dtype=dtype, device=self.device)

    def has_room(self, opt, table) -> bool:
        """Whether a step of this table needs no allocation."""
        return (
            bool(self.addresses)
            and self.scalars.numel() >= self.native.SCALARS * len(table)
            and self.squares.numel() >= table.block_count
            and (self.sums.numel() >= statistics.WIDTH * table.block_count or not opt.defaults["statistics"])
            and self.fresh.numel() >= sum(len(group["params"]) for group in opt.param_groups)
        )

    def make_room(self, opt, table) -> None:
        """Allocate what a step of this table needs; nothing shrinks, or steps in turn would allocate for ever."""
        if self.has_room(opt, table):
            return
        self.outgrown += [self.scalars, self.squares, self.sums, self.fresh]
        scalars = max(self.native.SCALARS * len(table), self.scalars.numel())
        blocks = max(1, table.block_count, self.squares.numel())
        self.scalars, self.squares = self._zeros(scalars), self._zeros(blocks)
        sums, self.sums = self.sums, self._zeros(statistics.WIDTH * blocks if opt.defaults["statistics"] else 0)
        self.sums[: sums.numel()] = sums  # a step that is skipped leaves them
        fresh, self.fresh = self.fresh, self._zeros(max(len(params_of(opt)), self.fresh.numel()), torch.float32)
        self.fresh[: fresh.numel()] = fresh
        every = (self.control, self.scalars, self.squares, self.sums, self.fresh)
        self.addresses = tuple(x.data_ptr() if x.numel() else 0 for x in every)

    def count_from(self, steps: int) -> None:
        """Have the GPU count on from this number."""
        if self.steps is not None and self.steps != steps:
            self.control[0] = float(steps)
            self.steps = self.least = steps


def memory_of(opt, native: ModuleType) -> Memory:
    """An optimizer's memory on the device of its parameters, made anew where they moved."""
    device = next(p.device for group in opt.param_groups for p in group["params"])
    found = opt.__dict__.get("_memory")
    if found is None or found.device != device:
        settle(opt)
        found = opt._memory = Memory(device, native)
    return found


def settle(opt) -> None:
    """Find out what only the GPU knew: how many steps counted, and what of the state has a value. Waits for it."""
    memory = opt.__dict__.get("_memory")
    if memory is None:
        return
    if memory.steps is None or memory.captured:  # replays count without Python
        memory.steps = memory.least = int(memory.control[0])
        for group in opt.param_groups:
            group["steps"] = memory.steps
    if memory.noted:
        fresh = dict(zip(params_of(opt), memory.fresh.tolist(), strict=False))
        used = {p for p in memory.noted if not fresh.get(p)}
        memory.noted -= used
        for key, members in opt._placeholders.items():
            members -= used if key not in ema.NAMES else set()
    for key, members in opt._placeholders.items():
        if key in ema.NAMES:
            members -= {p for p in members if not ema.is_empty(distributed.local(opt.state[p][key]))}


def leave(opt) -> None:
    """Another backend steps: let go of the memory, unless a graph may use it."""
    memory = opt.__dict__.get("_memory")
    if memory is not None and not memory.captured:
        settle(opt)
        opt._memory = None


def loaded(opt) -> None:
    """After a checkpoint was loaded: what is new is told by the placeholders again."""
    memory = opt.__dict__.get("_memory")
    if memory is not None:
        memory.fresh.zero_()
        memory.noted.clear()
        memory.steps = memory.least = opt._steps()
        memory.control[0] = float(memory.steps)


def params_of(opt) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


# ---- statistics ---------------------------------------------------------------------------------------


class Sums:
    """What opt.statistics() calls, with the optimizer, once somebody asks: the sums of the last step that counted.

    It stands for a run of steps on the same gradients; `before` is the one, or the sums, of those before them.
    """

    def __init__(self, opt, table, before):
        self.memory, self.blocks, self.params = opt._memory, table.blocks(), table.params()
        self.shared = table.sharded or opt.defaults["sharded"]
        self.first = self.memory.control[:2].clone()  # how many counted, with the first of these; was it skipped
        self.before = before
        if isinstance(before, Sums):
            before.before = None

    def fits(self, table) -> bool:
        """Whether the sums of a step on this table lie as these."""
        mine, other = self.params, table.params()
        return len(mine) == len(other) and all(map(operator.is_, mine, other)) and self.blocks == table.blocks()

    def __call__(self, opt) -> statistics.Statistics:
        """Those of now, which no later step changes: copies on the GPU, fetched when they are read."""
        steps, sums, before = self.memory.control[:1].clone(), self.memory.sums.clone(), self.before

        def fetch() -> Mapping[str, float]:
            if self._counts(float(steps)):
                return self._values(opt, sums)
            if isinstance(before, Sums) and before._counts(float(self.first[0])):
                return before._values(opt, sums)  # a step that is skipped leaves them
            if before is None or isinstance(before, Sums):
                raise RuntimeError("no statistics were gathered: the steps so far were skipped")
            return before

        return statistics.Statistics(fetch)

    def counts(self) -> bool:
        """Whether one of its steps counted. Waits for the GPU."""
        return self._counts(float(self.memory.control[0]))

    def _counts(self, steps: float) -> bool:
        """Whether one of its steps counted, as so many did in all."""
        before, skipped = self.first.tolist()
        return not skipped or steps > before

    def _values(self, opt, sums: Tensor) -> Mapping[str, float]:
        rows = rows_of(sums.reshape(-1, statistics.WIDTH), self.blocks)
        return statistics.values(cpu.total_of(opt, self.params, rows, statistics.WIDTH, self.shared))


def rows_of(sums: Tensor, blocks: list[int]) -> list[tuple[float, ...]]:
    """The sums of each tensor, those of its blocks added up in order. Waits for the GPU."""
    parts = np.split(sums[: sum(blocks)].cpu().numpy(), np.cumsum(blocks)[:-1]) if blocks else []
    return [tuple(part.cumsum(0)[-1]) if len(part) else (0.0,) * sums.shape[1] for part in parts]
