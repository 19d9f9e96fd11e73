"""The backends: one function table, and the choice between them."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from . import (
    buffers,
    cpu,
    cpu_ranker,
    cuda,
    cuda_memory,
    cuda_ranker,
    distributed,
    masking,
    patterns,
    plan,
    reference,
    select,
    triton_driver,
)
from .checks import in_layout_of, share_memory
from .interrupts import at_once, held
from .stages import ema

NAMES = (None, "cpu", "cuda", "triton", "torch")
REASONS = {"cpu": lambda: cpu.why_not, "cuda": lambda: cuda.unavailable(), "triton": lambda: triton_driver.why_not()}
_warned = False


def check_name(name: str | None) -> None:
    """Raise ValueError for an unknown backend, RuntimeError for one that is not available here; warn once
    where the choice must fall on the slow reference."""
    global _warned
    if name not in NAMES:
        raise ValueError(f"Invalid backend: {name!r}; use one of {', '.join(map(repr, NAMES))}")
    if name in REASONS and (reason := REASONS[name]()):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if name is None and cpu.native is None and not _warned:
        _warned = True
        warnings.warn(f"fuseopt runs through its slow torch reference: {cpu.why_not}", RuntimeWarning, stacklevel=5)


def choose(opt) -> str:
    """The name of the backend that runs this optimizer."""
    name = opt.defaults.get("backend")
    if name is not None:
        return name
    device = device_of(opt)
    if device.type == "cpu":
        return "torch" if cpu.native is None else "cpu"
    if device.type == "cuda" and cuda.unfit(device) is None:
        return "cuda"
    return "torch" if triton_driver.why_not(device.type) else "triton"


def why(opt) -> str:
    """The reason of that choice."""
    if opt.defaults.get("backend") is not None:
        return "as asked"
    device = device_of(opt)
    if device.type != "cpu":
        unfit = cuda.unfit(device) if device.type == "cuda" else f"there is no compiled kernel for {device.type}"
        reasons = unfit, unfit and triton_driver.why_not(device.type)
        return "; ".join(filter(None, reasons)) or f"parameters are on {device}"
    if cpu.native is None:
        return cpu.why_not or ""
    threads = cpu.native.max_threads()
    return f"parameters are on the CPU; {cpu.native.instruction_set()}, {threads} thread{'s' * (threads != 1)}"


def device_of(opt) -> torch.device:
    """The device that the parameters lie on; checks.py sees to it that it is one."""
    for group in opt.param_groups:
        for p in group["params"]:
            return p.device
    return torch.device("cpu")


def begin(opt) -> plan.Step | None:
    """The optimizer's next step; None if found_inf says that it is skipped. Raises for a grad_scale of 0."""
    if step := cpu.again(opt):
        return step
    name = choose(opt) if any(group["params"] for group in opt.param_groups) else "torch"  # nothing to step
    on_gpu, captured = name == "cuda", name != "cpu" and cuda.capturing()
    if captured and not on_gpu:
        raise RuntimeError(f"step() is being captured into a CUDA graph, which backend {name!r} cannot be; use 'cuda'")
    if not on_gpu:
        cuda_memory.leave(opt)
    else:
        cuda.check_device(opt)
        cuda_memory.memory_of(opt, cuda.native)
        if captured:
            cuda.check_capture(opt)
        if not cuda.must_know(opt):
            return plan.Step(opt, opt._steps() + 1, 1.0, name, cuda.amp(opt), captured)
        cuda_memory.settle(opt)
    found_inf, scale = getattr(opt, "found_inf", None), getattr(opt, "grad_scale", None)
    if found_inf is not None and float(found_inf) != 0:
        return None
    scale = 1.0 if scale is None else float(scale)
    if scale == 0:
        raise ValueError("grad_scale is 0, by which no gradient can be divided; set the scale of the loss, or none")
    return plan.Step(opt, opt._steps() + 1, 1.0 / scale, name)


def run(opt, step: plan.Step) -> None:
    """Run a step, whole or not at all, on the backend that `choose` picks, and count it in the groups."""
    if step.holds:
        if _pass(cpu, opt, step):
            return
        opt._kept = None  # something is to be made, or to be said
        step = begin(opt)
    of_buffers = buffers.updates(opt, step)
    engine = ENGINES.get(step.backend)
    if engine and _only_passes(engine, opt, step) and _pass(engine, opt, step, of_buffers):
        return
    if step.captured:
        raise RuntimeError(cuda.WARM_UP)
    update, ranker, row_ranker = TABLE[step.backend]
    with held(), masking.recomputed(opt, step), _on_cpu():
        prepared = update(opt, step)
        _give_first_values(opt, step, prepared)
        at_once(*of_buffers)
        for selection in select.selections(opt, step):
            patterns.prune(opt, selection, partial(row_ranker if selection.pattern == "rows" else ranker, opt))
            cpu.increment_version([p for _, p in selection.members])
        for group in opt.param_groups:
            group["steps"] = step.t


def _on_cpu() -> AbstractContextManager:
    """Counters and counts lie on the CPU, whatever torch's default device; masks' functions may use that one.

    Where it is the CPU nothing is set: under a device as context each look at a tensor takes a microsecond more.
    """
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


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
def _give_first_values(opt, step: plan.Step, prepared: dict[Tensor, plan.Prepared]) -> None:
    """The first update of an average copies the parameter; the CPU's pass does not visit what is frozen."""
    if step.backend == "cuda":
        return cuda.give_first_values(opt, step, prepared)
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


# ---- the compiled passes: cpu.py, cuda.py ------------------------------------------------------------


def _fills_placeholders(opt, step: plan.Step) -> bool:
    """Whether the step gives some entry of the state its first value."""
    if not any(opt._placeholders.values()):
        return False
    keys = {key for gs in step.groups for key in gs.slots + gs.due if opt._placeholders.get(key)}
    return bool(keys) and any(plan.fills_placeholder(opt, gs, p) for gs, p in plan.stepped(step))


def _only_passes(engine, opt, step: plan.Step) -> bool:
    """Whether nothing is to be made, selected or summed up around the compiled pass, so far as Python can tell."""
    on_gpu = engine is cuda
    statistics = opt.defaults["statistics"] and opt.defaults["sharded"] and not on_gpu  # processes add them up
    if statistics or any(gs.sparsity is not None for gs in step.groups):
        return False
    if cuda.has_new_moments(opt, step) if on_gpu else _fills_placeholders(opt, step):
        return False
    return not plan.without_prune_mask(opt, step) and not masking.todo(opt, step)


def _pass(engine, opt, step: plan.Step, of_buffers: Iterable[Iterable] = ()) -> bool:
    """Run a step that is the compiled pass alone, in one call so that no interrupt falls between its writes; False,
    and nothing done, if the pass cannot take the tensors as they are."""
    table, problems = engine.gather(opt, step, {})
    new = cpu.new_states(opt, step, problems) if problems and engine is cpu else {}
    if new:
        cpu.put_back(opt, table)
        table, problems = cpu.gather(opt, step, dict.fromkeys(new, (None, True, None)), new)
        # An average begins as the weights are after the step, which may go over the same memory again.
        problems = problems or (any(gs.emas for gs in step.groups) and table.shares_memory())
    together = engine is cpu and opt.defaults["statistics"] and table.sharded
    if problems or together or (engine is cuda and not opt._memory.has_room(opt, table)):
        engine.put_back(opt, table)
        return False
    count = map(dict.__setitem__, opt.param_groups, repeat("steps"), repeat(step.t))
    arguments = engine.arguments(opt, table, step, engine.norm(opt, table, step))
    written = map(table.mark_written, (cpu.increment_version,))
    made = [map(dict.update, (opt.state,), (new,))] if new else []
    returned: list = []
    ran = map(returned.append, map(table.run, *zip(arguments)))
    at_once(ran, written, *of_buffers, *made, count, *engine.notes(opt, step, returned))
    engine.finish(opt, table, step, None)
    if engine is cpu and not step.holds:
        cpu.keep(opt, step, table)
    return True


@torch.no_grad()
def _compiled_update(engine, opt, step: plan.Step) -> dict[Tensor, plan.Prepared]:
    table, problems = engine.gather(opt, step, {})
    wanting = [(step.groups[k], step.groups[k].group["params"][i]) for k, i, _ in problems]
    if _fills_placeholders(opt, step):
        unread = {id(p) for _, p in wanting}
        wanting = [(gs, p) for gs, p in plan.stepped(step) if id(p) in unread or plan.fills_placeholder(opt, gs, p)]
    prepared = _prepare(opt, step, wanting)
    # Parameters with gaps are stepped in a copy without.
    filled = {p: in_layout_of(distributed.local(p), distributed.local(p)) for p in prepared}
    if plan.add_prune_masks(opt, plan.without_prune_mask(opt, step)) or prepared:
        replaced = {p: (made.grad, made.fresh, filled[p]) for p, made in prepared.items()}
        engine.put_back(opt, table)
        table, problems = engine.gather(opt, step, replaced)
        if problems:
            raise RuntimeError("fuseopt cannot read a parameter that its checks accept; please report this")
    gaps = {p: copy for p, copy in filled.items() if copy is not distributed.local(p)}
    norm = engine.norm(opt, table, step)
    engine.before(opt, table, prepared)
    if gaps and share_memory([distributed.local(p) for _, p in plan.stepped(step)]):
        sums = engine.run_in_turn(opt, step, prepared, norm, table)
    else:
        sums = table.run(*engine.arguments(opt, table, step, norm))
        table.mark_written(cpu.increment_version)
        for p, copy in gaps.items():
            distributed.local(p).copy_(copy)
    at_once(*engine.notes(opt, step))
    engine.finish(opt, table, step, sums)
    return prepared


# ---- triton: triton_backend.py, imported when it is used, as triton takes a second ----------------------


@torch.no_grad()
def _triton_update(opt, step: plan.Step) -> dict[Tensor, plan.Prepared]:
    triton_driver.check_device(opt)
    from . import triton_backend, triton_table

    plain = torch._C.DisableTorchFunction  # `run` sets a default device, at a microsecond for each look at a tensor
    with plain():
        unseen = triton_table.unseen(opt, step)
    todo = {id(p) for _, p in unseen + plan.without_prune_mask(opt, step)}
    filling = _fills_placeholders(opt, step)
    stepped = plan.stepped(step)
    wanting = [(gs, p) for gs, p in stepped if id(p) in todo or (filling and plan.fills_placeholder(opt, gs, p))]
    prepared = _prepare(opt, step, wanting)
    plan.add_prune_masks(opt, plan.without_prune_mask(opt, step))
    with plain():
        triton_backend.run(opt, step, prepared)
    return prepared


def _triton_ranker(opt, members: select.Members) -> select.Ranker:
    from . import triton_ranker

    return triton_ranker.ranker(opt, members)


ENGINES = {"cpu": cpu, "cuda": cuda}
# The update, the ranker of entries, the ranker of rows.
TABLE: dict[str, tuple[Callable, Callable, Callable]] = {
    "cpu": (partial(_compiled_update, cpu), cpu_ranker.ranker, cpu_ranker.RowRanker),
    "cuda": (partial(_compiled_update, cuda), cuda_ranker.ranker, patterns.RowRanker),
    "triton": (_triton_update, _triton_ranker, patterns.RowRanker),
    "torch": (_torch_update, patterns.TorchRanker, patterns.RowRanker),
}
