"""What the Triton kernels work on: live tensors as rows of addresses, and what lies on the device between steps."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import distributed, plan, schema
from .checks import in_layout_of
from .kernels import rules
from .kernels import table as t
from .stages import mask


class Memory:
    """Tensors on a device that outlive a step: uploads, made anew where their values change, and room for sums."""

    def __init__(self, device: torch.device):
        self.device = device
        self.uploads: dict[str, tuple[np.ndarray, Tensor]] = {}
        self.rooms: dict[str, Tensor] = {}
        self.frozen = WeakTensorKeyDictionary()  # by mask
        self.seen: dict[Tensor, tuple] = {}  # what `glimpse` and `_averages` said of a parameter, and its row

    def upload(self, name: str, values: np.ndarray) -> Tensor:
        """The values on the device, by one copy at most, which nothing waits for."""
        before = self.uploads.get(name)
        if before is None or before[0].dtype != values.dtype or not np.array_equal(before[0], values):
            there = torch.from_numpy(values.copy())
            if self.device.type != "cpu":
                there = there.pin_memory().to(self.device, non_blocking=True)
            self.uploads[name] = values, there
        return self.uploads[name][1]

    def room(self, name: str, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """n numbers to be written."""
        if name not in self.rooms or self.rooms[name].numel() < n:
            self.rooms[name] = torch.empty(n, dtype=dtype, device=self.device)
        return self.rooms[name][:n]

    def all_frozen(self, state: dict) -> bool:
        """mask.all_frozen, which waits for the device, asked once for each mask."""
        if not state.get("mask_freeze"):
            return False
        bits = state["mask_keep"]
        known = self.frozen.get(bits)
        if known is None or known[0] != bits._version:
            known = self.frozen[bits] = bits._version, mask.all_frozen(state)
        return known[1]


def _view(x: Tensor) -> tuple:
    bits = x.dtype == torch.uint8  # a mask that is written in place may freeze all
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x._version if bits else 0


def glimpse(opt, gs: plan.GroupStep, p: Tensor) -> tuple | None:
    """All that the checks of a parameter look at: if it is as it was when they passed, they need not be made again.

    None where that cannot be told, or where processes share the parameter.
    """
    if distributed.is_dtensor(p) or p.grad is None or type(p.grad) is not Tensor:
        return None
    try:
        state = [
            (key, _view(x) if isinstance(x, Tensor) else tuple(x) if isinstance(x, list) else x)
            for key, x in opt.state.get(p, {}).items()
        ]
        return _view(p), _view(p.grad), state, gs.kernel, gs.emas, gs.narrow
    except (RuntimeError, NotImplementedError):  # it has no plain memory
        return None


def unseen(opt, step: plan.Step) -> list[tuple[plan.GroupStep, Tensor]]:
    """The parameters with a gradient that must be checked and prepared before they are stepped."""
    memory = opt.__dict__.get("_triton")
    seen = {} if memory is None else memory.seen
    return [(gs, p) for gs, p in plan.stepped(step) if p not in seen or seen[p][0] != glimpse(opt, gs, p)]


def averages(gs: plan.GroupStep, state: dict) -> list[str]:
    """The averages that the pass works on, but for those that could only become sparser where nothing is pruned."""
    return [key for key, w, _, passed in gs.averages() if passed and (w != 0 or "prune_mask" in state)]


class Row:
    """A tensor of the table: `values` as kernels/table.py has them, and `key`, what a kernel is compiled for.

    copy: a copy without gaps of a parameter that has some, which is stepped in its place.
    """

    def __init__(self, memory: Memory, gs: plan.GroupStep, state: dict, p: Tensor, g: Tensor, emas: list[str]):
        self.gs, self.p, self.copy = gs, p, in_layout_of(p, p)
        self.all_frozen = p.numel() > 0 and memory.all_frozen(state)
        streams = {t.P.value: self.copy, t.G.value: g}
        streams |= {t.SLOT.value + k: state[key] for k, key in enumerate(gs.slots) if key in state}
        if not self.all_frozen:
            streams |= {t.EMA.value + k: state[key] for k, key in enumerate(gs.emas) if key in emas and key in state}
        values = self.values = [0] * t.COLUMNS
        for column, x in streams.items():
            values[column] = x.data_ptr()
        values[t.N], values[t.INNER], values[t.PERIOD] = p.numel(), 1, 1
        values[t.ALIGNED] = int(all(x.data_ptr() % 16 == 0 for x in streams.values()))
        if "mask_keep" in state:
            values[t.KEEP], values[t.FREEZE] = state["mask_keep"].data_ptr(), int(state["mask_freeze"])
            values[t.INNER], values[t.PERIOD] = state["mask_inner"], state["mask_period"]
        if "prune_mask" in state:
            values[t.PRUNED] = state["prune_mask"].data_ptr()
        narrow = sum(1 << k for k, key in enumerate(gs.emas) if key in gs.narrow)
        masked = "mask_keep" in state or "prune_mask" in state
        self.key = gs.kernel, p.dtype, len(gs.emas), narrow, masked
        self.blocks = -(-p.numel() // t.BLOCK.value)


def number(rows: list[Row], column: int) -> int:
    """Write to a column where each row's blocks begin among all; returns how many there are."""
    blocks = 0
    for row in rows:
        row.values[column] = blocks
        blocks += row.blocks
    return blocks


class Launch:
    """Rows that one launch takes, and their table on the device."""

    def __init__(self, rows: list[Row]):
        self.rows, self.p = rows, rows[0].p
        self.kernel, _, self.averages, self.narrow, self.masked = rows[0].key
        self.blocks = number(rows, t.FIRST)
        self.values = np.array([row.values for row in rows], dtype=np.int64).T.ravel()
        self.table: Tensor | None = None


def launches(memory: Memory, rows: list[Row], apart: bool = False) -> list[Launch]:
    """The rows that have elements, in as few launches as kernels allow; `apart`: one by one, in order."""
    batches: dict[tuple, list[Row]] = {}
    for k, row in enumerate(rows):
        if row.blocks:
            batches.setdefault((k if apart else 0, row.key), []).append(row)
    found = [Launch(batch) for batch in batches.values()]
    if found:
        parts = memory.upload("table", np.concatenate([one.values for one in found]))
        for one, part in zip(found, parts.split([len(one.values) for one in found]), strict=True):
            one.table = part
    return found


class Scalars:
    """Rows of scalars by the type of the arithmetic, formed in double, and what the counters will hold."""

    def __init__(self):
        self.rows: dict[torch.dtype, list[np.ndarray]] = {}
        self.found: dict[tuple, tuple[int, list[float]]] = {}
        self.counters: dict[int, tuple[Tensor, float]] = {}

    def place(self, gs: plan.GroupStep, state: dict, kind: torch.dtype, fresh: bool) -> int:
        """The row of a tensor's scalars: tensors of a group with equal counters share it.

        One that has the state of an earlier one counts on from what that will store.
        """
        tensors = [state[key] for key in gs.counters]
        held = [self.counters[id(x)][1] if id(x) in self.counters else x.item() for x in tensors]
        now = tuple((value, x.dtype == torch.float64) for value, x in zip(held, tensors, strict=True))
        now = now or ((float(fresh), True),)  # for rules without a step count
        if (id(gs), kind, now) not in self.found:
            counters = [rules.CounterValue(*pair) for pair in now]
            row = self._row(gs, rules.RULES[gs.kernel].prepare(gs.hyper, counters))
            rows = self.rows.setdefault(kind, [])
            self.found[id(gs), kind, now] = len(rows), [counter.value for counter in counters]
            rows.append(row)
        place, values = self.found[id(gs), kind, now]
        self.counters |= {id(x): (x, value) for x, value in zip(tensors, values, strict=False)}
        return place

    @staticmethod
    def _row(gs: plan.GroupStep, scalars: tuple) -> np.ndarray:
        row = np.zeros(t.WIDTH.value)
        row[: t.WEIGHTS] = [gs.stage[name] for name in schema.STAGE_SCALARS]
        row[t.WEIGHTS : t.WEIGHTS + len(gs.ema_weights)] = gs.ema_weights
        row[t.RULE : t.RULE + len(scalars)] = scalars
        return row

    def upload(self, memory: Memory) -> dict[torch.dtype, Tensor]:
        """The rows on the device, each number rounded once."""
        with np.errstate(over="ignore"):
            return {kind: memory.upload(f"scalars {kind}", rounded(rows, kind)) for kind, rows in self.rows.items()}


def rounded(values: list, kind: torch.dtype) -> np.ndarray:
    return np.array(values, dtype=np.float64).astype(np.float64 if kind == torch.float64 else np.float32)
