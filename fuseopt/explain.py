"""`opt.explain()`: what one step does, and the bytes it moves."""

from typing import Any

from torch import Tensor

from . import backends, masking
from .distributed import local
from .stages import ema, mask, prune


class Explanation:
    """The steady step of an optimizer as it is configured now.

    backend: name of the backend that runs it; why: the reason it was chosen.
    rows: one dict a parameter group and dtype: group, tensors, elements, dtype, and bytes a step by
        stream (param, grad, moments, ema, masks, norm).
    bytes_per_step: their sum, read plus written, over all parameters that are trained. Of parameters that
        processes share, elements and bytes are those of this process.
    """

    def __init__(self, opt: Any) -> None:
        self.backend, self.why = backends.choose(opt), backends.why(opt)
        self.rows = [row for k, group in enumerate(opt.param_groups) for row in _rows(opt, k, group)]
        self.bytes_per_step: int = sum(row["bytes"] for row in self.rows)

    def __str__(self) -> str:
        head = f"{'group':>5} {'dtype':>9} {'tensors':>8} {'elements':>12}" + "".join(f"{s:>9}" for s in STREAMS)
        lines = [f"backend: {self.backend} ({self.why})", head + f" {'bytes/element':>14}"]
        for row in self.rows:
            per = "".join(f"{row[s] / max(row['elements'], 1):>9.4g}" for s in STREAMS)
            lines.append(
                f"{row['group']:>5} {row['dtype']:>9} {row['tensors']:>8} {row['elements']:>12,}{per}"
                f" {row['bytes'] / max(row['elements'], 1):>14.4g}"
            )
        lines.append(f"bytes a step: {self.bytes_per_step:,}")
        return "\n".join(lines)

    __repr__ = __str__


STREAMS = ("param", "grad", "moments", "ema", "masks", "norm")


def _rows(opt: Any, k: int, group: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each dtype among the trained parameters of a group."""
    norm = any(g["max_grad_norm"] for g in opt.param_groups)
    rows: dict[str, dict[str, Any]] = {}
    for p in group["params"]:
        if not p.requires_grad and p.grad is None:
            continue
        dtype = str(p.dtype).removeprefix("torch.")
        empty = {"group": k, "dtype": dtype, "tensors": 0, "elements": 0} | dict.fromkeys(STREAMS, 0)
        row = rows.setdefault(dtype, empty)
        n, size, state = local(p).numel(), p.element_size(), opt.state.get(p, {})
        row["tensors"] += 1
        row["elements"] += n
        row["masks"] += masking.score_bytes(opt, p)
        if mask.all_frozen(state):  # not visited
            continue
        row["param"] += 2 * n * size
        row["grad"] += n * size
        row["moments"] += 2 * n * size * len(opt.slots(group))
        row["ema"] += sum(_average_bytes(options, group, p) for options in group["ema"])
        row["masks"] += _mask_bytes(state, group, p)
        row["norm"] += n * size if norm else 0
    for row in rows.values():
        row["bytes"] = sum(row[s] for s in STREAMS)
    return list(rows.values())


def _average_bytes(options: dict[str, Any], group: dict[str, Any], p: Tensor) -> int:
    """Bytes read and written for an average, a step on the mean over `every`; a threshold works on it in each."""
    each = 2 * local(p).numel() * ema.dtype_of(options, p).itemsize
    prunes = (group["prune"] or {}).get("threshold") is not None and prune.prunable(p)
    return each if prunes else round(each / options["every"])


def _mask_bytes(state: dict[str, Any], group: dict[str, Any], p: Tensor) -> int:
    """Bits read (and, with a threshold, written) for the user's mask and the pruned entries, in bytes."""
    bits = state.get("mask_period", 0)
    options = group["prune"]
    if options is not None and prune.prunable(p):
        bits += local(p).numel() * (2 if options["threshold"] is not None else 1)
    return -(-bits // 8)
