"""What a step launches, in order, and on which parameters."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any

from .traffic import Member, clips, to_prune


def launches(opt: Any, backend: str, members: list[Member], one_by_one: bool) -> list[dict[str, Any]]:
    """A row for each kind of launch of a steady step, then one for each thing that only some steps do.

    one_by_one: some parameters share memory, and so each is launched alone.
    """
    by_backend = {"cpu": _on_cpu, "cuda": _on_cuda, "triton": _on_triton, "torch": _by_torch}
    return [*by_backend[backend](opt, members, one_by_one), *_recomputed(opt, members), *_selected(opt, members)]


def _row(what: str, count: int | None, members: Iterable[Member], when: str = "every step") -> dict[str, Any]:
    members = list(members)
    return {
        "what": what,
        "launches": count,
        "when": when,
        "rules": list(dict.fromkeys(m.rule for m in members)),
        "dtypes": list(dict.fromkeys(m.dtype for m in members)),
        "groups": list(dict.fromkeys(m.group for m in members)),
        "tensors": len(members),
        "elements": sum(m.elements for m in members),
        "names": [m.given for m in members if m.given],
    }


def _visited(opt: Any, members: list[Member]) -> list[Member]:
    """Those that a pass with the tensors on the host, or their masks looked up there, does not leave out."""
    return [m for m in members if m.elements and (opt.defaults["statistics"] or not m.all_frozen)]


def _on_cpu(opt: Any, members: list[Member], one_by_one: bool) -> list[dict[str, Any]]:
    """One loop over everything; it chooses rule and type for each block."""
    visited = _visited(opt, members)
    free = [m for m in visited if not m.all_frozen]
    norm = [_row("norm", 1, free)] * (clips(opt) and bool(free))
    return norm + [_row("update", len(visited) if one_by_one else 1, visited)] * bool(visited)


def _by_torch(opt: Any, members: list[Member], one_by_one: bool) -> list[dict[str, Any]]:
    norm = [_row("norm", len(members), members)] * (clips(opt) and bool(members))
    return norm + [_row("update", len(members), members)] * bool(members)


# What a launch of the CUDA module has room for: csrc/cuda/rows.h and kernels.h. tests/test_explain.py counts launches.
ROW_WORDS, HEAD_WORDS, MASK_WORDS = 4000, 5, 4
PREPARED_ROWS, PREPARED_GROUPS = 680, 16


def _on_cuda(opt: Any, members: list[Member], one_by_one: bool) -> list[dict[str, Any]]:
    """A launch for each rule and dtype, more where there are many tensors; before it the norm, and the scalars."""
    full = [m for m in members if m.elements]
    of_dtype = _parted(full, lambda m: m.dtype)
    norm = [_row("norm", _filled(some, 0, 0), some) for some in of_dtype if clips(opt)]
    update = []
    for some in _parted(full, lambda m: (m.rule, m.dtype)):
        slots, averages = max(len(opt.slots(m.options)) for m in some), max(len(m.options["ema"]) for m in some)
        update.append(_row("update", len(some) if one_by_one else _filled(some, slots, averages), some))
    scalars = len(members) if one_by_one else _prepared(members)
    return norm + [_row("scalars", scalars, members)] * bool(members) + update


def _filled(members: list[Member], slots: int, averages: int) -> int:
    """Launches for so many tensors of so many addresses each."""
    masked = any(m.masked for m in members)
    width = HEAD_WORDS + slots + averages + (MASK_WORDS if masked else 0)
    return -(-len(members) // (ROW_WORDS // width))


def _prepared(members: list[Member]) -> int:
    """Launches that form the scalars of so many tensors and groups."""
    count = tensors = groups = 0
    last = None
    for m in members:
        if count == 0 or tensors == PREPARED_ROWS or (m.group != last and groups == PREPARED_GROUPS):
            count, tensors, groups, last = count + 1, 0, 0, None
        tensors, groups, last = tensors + 1, groups + (m.group != last), m.group
    return count


def _on_triton(opt: Any, members: list[Member], one_by_one: bool) -> list[dict[str, Any]]:
    """A launch for each kernel that is compiled: of a rule, a dtype, some averages, with masks or without."""
    visited = _visited(opt, members)
    some = [[m] for m in visited] if one_by_one else _parted(visited, _triton_kernel)
    norm = [_row("norm", 1, one) for one in some if clips(opt)]
    return norm + [_row("clip", 1, members)] * bool(norm) + [_row("update", 1, one) for one in some]


def _triton_kernel(m: Member) -> Hashable:
    narrow = tuple(options["dtype"] == "parameter" for options in m.options["ema"])
    return m.rule, m.dtype, narrow, m.masked


def _parted(members: list[Member], key: Callable[[Member], Hashable]) -> list[list[Member]]:
    parts: dict[Hashable, list[Member]] = {}
    for m in members:
        parts.setdefault(key(m), []).append(m)
    return list(parts.values())


def _recomputed(opt: Any, members: list[Member]) -> list[dict[str, Any]]:
    """Masks that fn recomputes, by torch operations."""
    found = []
    for one in opt._dynamic:
        some = [m for m in members if m.p in one.freezes]
        when = "next step" if one.every is None else f"every {one.every} steps"
        found += [_row("mask", None, some, "every step" if one.sums else when)] * bool(some)
    return found


def _selected(opt: Any, members: list[Member]) -> list[dict[str, Any]]:
    """Pruning that is not over: the parameters whose weights some steps rank and zero."""
    found, t = [], opt._steps() + 1
    for some in _parted([m for m in members if to_prune(opt, m)], lambda m: tuple(m.options["prune"].items())):
        options = some[0].options["prune"]
        begin, end, each = options["begin"], options["end"] or options["begin"], options["every"]
        when = f"at step {end}" if max(t, begin) + each > end else f"at {begin} to {end} by {each}"
        found.append(_row("prune", None, some, when))
    return found
