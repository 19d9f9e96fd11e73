"""What a steady step works on, and the bytes that it reads and writes, from the options and the state alone."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import masking
from ..distributed import local
from ..stages import ema, mask, prune


@dataclass(frozen=True)
class Member:
    """A parameter that is stepped."""

    group: int
    index: int  # in the group
    options: dict[str, Any]  # the group
    rule: str
    p: Tensor
    here: Tensor  # the part of p on this process
    state: dict[str, Any]
    given: str | None  # its name

    @property
    def name(self) -> str:
        return self.given or f"parameter {self.index} of group {self.group}"

    @property
    def dtype(self) -> str:
        return str(self.p.dtype).removeprefix("torch.")

    @property
    def elements(self) -> int:
        return self.here.numel()

    @property
    def masked(self) -> bool:
        return "mask_keep" in self.state or "prune_mask" in self.state

    @property
    def all_frozen(self) -> bool:
        return mask.all_frozen(self.state)


def every(opt: Any) -> list[Member]:
    """All parameters of an optimizer."""
    return [
        Member(k, i, group, opt.kernel(group), p, local(p), opt.state.get(p, {}), name)
        for k, group in enumerate(opt.param_groups)
        for i, (p, name) in enumerate(
            zip(group["params"], group.get("param_names") or [None] * len(group["params"]), strict=True)
        )
    ]


def trained(members: list[Member]) -> list[Member]:
    """Those that a step now would change: with a gradient; where none has one, those that require one."""
    return [m for m in members if m.p.grad is not None] or [m for m in members if m.p.requires_grad]


def to_prune(opt: Any, m: Member) -> bool:
    """Whether steps to come rank the parameter's weights."""
    options = m.options["prune"]
    if options is None or options["threshold"] is not None or not prune.prunable(m.p):
        return False
    return int(opt._steps()) < (options["end"] or options["begin"])


def clips(opt: Any) -> bool:
    return any(group["max_grad_norm"] for group in opt.param_groups)


def rows(opt: Any, members: list[Member]) -> list[dict[str, Any]]:
    """A row for each group and dtype, with the bytes of each stream; `memory` is what of it lies in memory."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for m in members:
        moved = _moved(opt, m)
        first = {"group": m.group, "rule": m.rule, "dtype": m.dtype, "tensors": 0, "elements": 0, "names": []}
        row = found.setdefault((m.group, m.dtype), first | dict.fromkeys(moved, 0))
        row["tensors"] += 1
        row["elements"] += m.elements
        row["names"] += [m.given] if m.given else []
        for stream, count in moved.items():
            row[stream] += count
    for row in found.values():
        row["bytes"] = sum(row[stream] for stream in STREAMS)
    return list(found.values())


STREAMS = ("param", "grad", "moments", "ema", "masks", "norm")


def _moved(opt: Any, m: Member) -> dict[str, int]:
    """Bytes that a step reads and writes for a parameter, by stream."""
    n, size = m.elements, m.p.element_size()
    averages = dict.fromkeys(ema.names(m.options), 0)
    moved = dict.fromkeys((*STREAMS, "memory"), 0) | averages
    moved["masks"] = masking.score_bytes(opt, m.p)
    if m.all_frozen:  # visited only to be counted
        if opt.defaults["statistics"]:
            moved["param"] = moved["grad"] = n * size
        return moved
    slots = len(opt.slots(m.options))
    kept = [n * ema.dtype_of(options, m.p).itemsize for options in m.options["ema"]]
    shares = [_share(options, m) for options in m.options["ema"]]
    averages = {name: round(2 * b * share) for name, b, share in zip(averages, kept, shares, strict=True)}
    bits = _mask_bytes(m)
    return moved | averages | {
        "param": 2 * n * size,
        "grad": n * size,
        "moments": 2 * n * size * slots,
        "ema": sum(averages.values()),
        "masks": moved["masks"] + bits,
        "norm": n * size if clips(opt) else 0,
        "memory": n * size * (2 + slots) + sum(kept) + moved["masks"] + bits,
    }  # fmt: skip


def _share(options: dict[str, Any], m: Member) -> float:
    """The share of the steps that work on an average; those of a threshold all do."""
    prunes = (m.options["prune"] or {}).get("threshold") is not None and prune.prunable(m.p)
    return 1 if prunes else 1 / options["every"]


def _mask_bytes(m: Member) -> int:
    """Bits read (and, with a threshold, written) for the user's mask and the pruned entries, in bytes."""
    bits = m.state.get("mask_period", 0)
    options = m.options["prune"]
    if options is not None and prune.prunable(m.p):
        bits += m.elements * (2 if options["threshold"] is not None else 1)
    return -(-bits // 8)
