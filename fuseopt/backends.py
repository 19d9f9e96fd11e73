"""The backends: one function table, and the choice between them."""

import math
import warnings
from collections.abc import Callable, Iterable
from itertools import repeat

import torch
from torch import Tensor

from . import buffers, cpu, distributed, masking, patterns, plan, reference, select
from .checks import in_layout_of, share_memory
from .interrupts import at_once, held
from .stages import ema, statistics

NAMES = (None, "cpu", "torch")
_warned = False


def check_name(name: str | None) -> None:
    """Raise ValueError for an unknown backend, RuntimeError for "cpu" where it was not compiled; warn once
    where the choice must fall on the slow reference."""
    global _warned
    if name not in NAMES:
        raise ValueError(f"Invalid backend: {name!r}; use None, 'cpu' or 'torch'")
    if name == "cpu" and cpu.native is None:
        raise RuntimeError(f"backend 'cpu' is not available: {cpu.why_not}")
    if name is None and cpu.native is None and not _warned:
        _warned = True
        warnings.warn(f"fuseopt runs through its slow torch reference: {cpu.why_not}", RuntimeWarning, stacklevel=5)


def choose(opt) -> str:
    """The name of the backend that runs this optimizer."""
    name = opt.defaults.get("backend")
    if name is not None:
        return name
    return "torch" if cpu.native is None or _device(opt) != "cpu" else "cpu"


def why(opt) -> str:
    """The reason of that choice."""
    if opt.defaults.get("backend") is not None:
        return "as asked"
    if cpu.native is None:
        return cpu.why_not or ""
    if _device(opt) != "cpu":
        return f"there is no kernel for {_device(opt)} yet"
    return f"parameters are on the CPU; {cpu.native.instruction_set()}, {cpu.native.max_threads()} threads"


def _device(opt) -> str:
    """The type of the device that the parameters lie on; checks.py sees to it that it is one."""
    for group in opt.param_groups:
        for p in group["params"]:
            return p.device.type
    return "cpu"


def run(opt, step: plan.Step) -> None:
    """Run a step, whole or not at all, on the backend that `choose` picks, and count it in the groups."""
    name, of_buffers = choose(opt), buffers.updates(opt, step)
    if name == "cpu" and _cpu_steady_step(opt, step, of_buffers):
        return
    update, ranker = TABLE[name]
    # On the CPU counters and counts lie, whatever torch's default device; masks' functions may use that.
    with held(), masking.recomputed(opt, step), torch.device("cpu"):
        prepared = update(opt, step)
        _copy_into_new_averages(opt, prepared)
        at_once(*of_buffers)
        for selection in select.selections(opt, step):
            patterns.prune(opt, selection, lambda members: ranker(opt, members))
            cpu.increment_version([p for _, p in selection.members])
        for group in opt.param_groups:
            group["steps"] = step.t


def _prepare(opt, step: plan.Step, wanting: list[tuple[plan.GroupStep, Tensor]]) -> dict[Tensor, plan.Prepared]:
    """Every check, and then what these parameters lack."""
    selections = select.selections(opt, step)
    idle = [(gs, p) for selection in selections for gs, p in selection.members if p.grad is None]
    if wanting or selections:
        plan.check_all(opt, wanting + idle)
    for selection in selections:
        patterns.check(opt, selection)
    prepared = plan.prepare(opt, step, wanting)
    for gs, p in idle:
        plan.settle_state(opt, gs, p)
    patterns.let_go(opt, step)
    return prepared


@torch.no_grad()
def _copy_into_new_averages(opt, prepared: dict[Tensor, plan.Prepared]) -> None:
    """The first update of an average copies the parameter."""
    for p, made in prepared.items():
        for key in made.filled:
            if key in ema.NAMES:
                opt.state[p][key].copy_(p)
            opt._placeholders[key].discard(p)


# ---- torch ---------------------------------------------------------------------------------------


@torch.no_grad()
def _torch_update(opt, step: plan.Step) -> dict[Tensor, plan.Prepared]:
    prepared = _prepare(opt, step, plan.stepped(step))
    plan.add_prune_masks(opt, plan.without_prune_mask(opt, step))
    reference.run(opt, step, prepared)
    return prepared


# ---- cpu -----------------------------------------------------------------------------------------


def _fills_placeholders(opt, step: plan.Step) -> bool:
    """Whether the step gives some entry of the state its first value."""
    if not any(opt._placeholders.values()):
        return False
    keys = {key for gs in step.groups for key in gs.slots + gs.due if opt._placeholders.get(key)}
    return bool(keys) and any(plan.fills_placeholder(opt, gs, p) for gs, p in plan.stepped(step))


def _cpu_steady_step(opt, step: plan.Step, of_buffers: list[Iterable]) -> bool:
    """Run the step if the compiled pass is all of it, in one call so that no interrupt falls between its writes;
    False, and nothing done, if something is to be made, copied, selected or summed up around it."""
    if opt.defaults["statistics"] or any(gs.sparsity is not None for gs in step.groups):
        return False
    if _fills_placeholders(opt, step) or plan.without_prune_mask(opt, step) or masking.todo(opt, step):
        return False
    table, problems = cpu.gather(opt, step, {})
    if problems:
        cpu.put_back(opt, table)
        return False
    count = map(dict.__setitem__, opt.param_groups, repeat("steps"), repeat(step.t))
    run = map(table.run, (cpu.norm(opt, table),), (False,))
    at_once(run, map(table.mark_written, (cpu.increment_version,)), *of_buffers, count)
    cpu.put_back(opt, table)
    return True


@torch.no_grad()
def _cpu_update(opt, step: plan.Step) -> dict[Tensor, plan.Prepared]:
    table, problems = cpu.gather(opt, step, {})
    wanting = [(step.groups[k], step.groups[k].group["params"][i]) for k, i in problems]
    if _fills_placeholders(opt, step):
        unread = {id(p) for _, p in wanting}
        wanting = [(gs, p) for gs, p in plan.stepped(step) if id(p) in unread or plan.fills_placeholder(opt, gs, p)]
    prepared = _prepare(opt, step, wanting)
    # Parameters with gaps are stepped in a copy without.
    filled = {p: in_layout_of(distributed.local(p), distributed.local(p)) for p in prepared}
    if plan.add_prune_masks(opt, plan.without_prune_mask(opt, step)) or prepared:
        replaced = {p: (made.grad, made.fresh, filled[p]) for p, made in prepared.items()}
        cpu.put_back(opt, table)
        table, problems = cpu.gather(opt, step, replaced)
        if problems:
            raise RuntimeError("fuseopt cannot read a parameter that its checks accept; please report this")
    gaps = {p: copy for p, copy in filled.items() if copy is not distributed.local(p)}
    norm = cpu.norm(opt, table)
    if gaps and share_memory([distributed.local(p) for _, p in plan.stepped(step)]):
        if norm < 0:
            norm = math.sqrt(sum(row[0] for row in table.squares()))
        sums = cpu.run_in_turn(opt, step, prepared, norm)
    else:
        sums = table.run(norm, opt.defaults["statistics"])
        table.mark_written(cpu.increment_version)
        for p, copy in gaps.items():
            distributed.local(p).copy_(copy)
    if opt.defaults["statistics"]:
        opt._statistics = statistics.result(cpu.total(opt, table, sums, statistics.WIDTH))
    cpu.put_back(opt, table)
    return prepared


TABLE: dict[str, tuple[Callable, Callable]] = {
    "cpu": (_cpu_update, cpu.ranker),
    "torch": (_torch_update, patterns.TorchRanker),
}
