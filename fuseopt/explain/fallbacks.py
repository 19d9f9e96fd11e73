"""What does not go the direct way, and why, as far as options and tensors tell."""

from typing import Any

import torch

from .. import cpu, cuda
from ..checks import in_layout, share_memory
from ..distributed import is_dtensor, local, placed_alike
from .printing import shortened
from .traffic import Member, clips, to_prune

WIDTH = 60  # of a list of names


def with_gaps(members: list[Member]) -> list[Member]:
    """Those whose entries do not lie next to each other in memory, as of a slice of columns."""
    return [m for m in members if not in_layout(m.here, m.here)]


def overlap(members: list[Member]) -> bool:
    """Whether some share memory, as one that is listed twice."""
    return all(m.p.device.type != "meta" for m in members) and share_memory([m.here for m in members])


def in_turn(backend: str, members: list[Member]) -> bool:
    """Whether each parameter is launched alone, as some share memory. The CPU's pass sees to it within one, but for
    the copies of those with gaps."""
    return backend != "torch" and overlap(members) and (backend != "cpu" or bool(with_gaps(members)))


def notes(opt: Any, backend: str, every: list[Member], members: list[Member]) -> list[str]:
    """A sentence or two for each. members: those that are stepped, of `every`."""
    found = [*_left_out(opt, backend, every, members), *_spread(opt, members)]
    if members and members[0].p.device.type != "meta":
        found += _by_memory(opt, backend, members) + (_on_cpu(members) if backend == "cpu" else [])
    if backend == "torch":
        found.append(
            "Plain torch operations step: each reads and writes its operands, so several times these bytes move. The "
            "least time is that of one pass."
        )
    if backend == "cuda" and getattr(opt, "_memory", None) is not None and cuda.must_know(opt):
        found.append(
            "With a GradScaler each step waits for the GPU: pruning's schedule, masks to recompute or averaged buffers "
            "need to know in Python whether it counts."
        )
    return found


def _say(some: list[Member], text: str) -> list[str]:
    """[a note on some parameters], or nothing where there are none."""
    if not some:
        return []
    subject = "1 parameter" if len(some) == 1 else f"{len(some)} parameters"
    return [f"{subject} {text}: {shortened([m.name for m in some], WIDTH)}."]


def _left_out(opt: Any, backend: str, every: list[Member], members: list[Member]) -> list[str]:
    stepped = {id(m.p) for m in members}
    rest = [m for m in every if id(m.p) not in stepped]
    found = _say([m for m in rest if m.p.requires_grad], "without a gradient now, left out of a step")
    found += _say([m for m in rest if not m.p.requires_grad], "with requires_grad=False, left out of a step")
    if members and all(m.p.grad is None for m in members):
        found.append("No parameter has a gradient now: the numbers are of a step in which all have one.")
    if backend != "cuda":  # there the kernels alone know
        how = "visited for the statistics alone" if opt.defaults["statistics"] else "not visited"
        found += _say([m for m in members if m.all_frozen], f"wholly frozen by a mask, {how}")
    return found


def _spread(opt: Any, members: list[Member]) -> list[str]:
    shared = [m for m in members if is_dtensor(m.p)]
    if not shared and not opt.defaults["sharded"]:
        return []
    what = "Numbers are of this process's part"
    sums = " and ".join(["norm"] * clips(opt) + ["statistics"] * opt.defaults["statistics"])
    if sums:
        what += f"; in step() the processes add up the {sums} of the whole model, for which they wait"
    moved = [m for m in shared if m.p.grad is not None and not placed_alike(m.p, m.p.grad)]
    return [what + ".", *_say(moved, "with a gradient placed on the processes in another way, which is redistributed")]


def _by_memory(opt: Any, backend: str, members: list[Member]) -> list[str]:
    gaps = with_gaps(members) if backend != "torch" else []
    found = _say(gaps, "with gaps in memory, stepped through a dense copy at each step")
    other = [m for m in members if backend != "torch" and _has_other_gradient(m)]
    found += _say(other, "with a gradient in another order of memory, which is copied at each step")
    if backend != "torch" and overlap(members):
        how = "in a pass each" if in_turn(backend, members) else "by one thread"
        found.append(f"Parameters share memory, so all are stepped one after another, {how}.")
    ranked = [m for m in gaps if to_prune(opt, m)]
    return found + _say(ranked, "with gaps in memory, ranked for pruning by torch operations")


def _has_other_gradient(m: Member) -> bool:
    g = m.p.grad
    return g is not None and placed_alike(m.p, g) and g.layout == torch.strided and not in_layout(m.here, local(g))


def _on_cpu(members: list[Member]) -> list[str]:
    half = [m for m in members if m.p.dtype == torch.float16]
    found = _say(half, "in fp16, which the CPU's pass converts in several operations an element, where bf16 needs few")
    if cpu.native.pool_lost():
        found.append("This process was forked from one with threads, which it lost: one thread steps.")
    return found
