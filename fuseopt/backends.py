"""The backends: one function table, and the choice between them."""

import math
import warnings
from collections.abc import Callable, Iterable
from itertools import repeat
from types import ModuleType

import torch
from torch import Tensor

from . import buffers, distributed, masking, patterns, plan, reference, schema, select, torch_abi, torch_layout
from .checks import in_layout_of, share_memory
from .interrupts import at_once, held
from .stages import ema, mask, statistics

NAMES = (None, "cpu", "torch")
_warned = False
_increment_version = torch._C._increment_version  # torch.autograd.graph's without its Python, for at_once


def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or None and why it is missing. torch comes first: they share its OpenMP pool."""
    try:
        from . import _C
    except ImportError as error:
        return None, f"the compiled module fuseopt._C is missing ({error}); install a C++ compiler, then fuseopt again"
    connect(_C, *torch_abi.find(), torch_layout.find())
    return _C, None


def connect(native: ModuleType, functions: list[int], handle_offset: int, layout: list[int]) -> None:
    """Tell the compiled module how to read tensors: by layout, by torch's C functions, or through Python."""
    native.set_torch(torch.Tensor, torch.nn.Parameter, torch_abi.describe, functions, handle_offset)
    native.set_layout(torch.Tensor, torch.nn.Parameter, handle_offset, layout, torch_abi.more_functions())


_native, _why_not = _load()


def native_error() -> str | None:
    """Why the compiled module is not there; None if it is."""
    return _why_not


def check_name(name: str | None) -> None:
    """Raise ValueError for an unknown backend, RuntimeError for "cpu" where it was not compiled; warn once
    where the choice must fall on the slow reference."""
    global _warned
    if name not in NAMES:
        raise ValueError(f"Invalid backend: {name!r}; use None, 'cpu' or 'torch'")
    if name == "cpu" and _native is None:
        raise RuntimeError(f"backend 'cpu' is not available: {_why_not}")
    if name is None and _native is None and not _warned:
        _warned = True
        warnings.warn(f"fuseopt runs through its slow torch reference: {_why_not}", RuntimeWarning, stacklevel=5)


def choose(opt) -> str:
    """The name of the backend that runs this optimizer."""
    name = opt.defaults.get("backend")
    if name is not None:
        return name
    return "torch" if _native is None or _device(opt) != "cpu" else "cpu"


def why(opt) -> str:
    """The reason of that choice."""
    if opt.defaults.get("backend") is not None:
        return "as asked"
    if _native is None:
        return _why_not or ""
    if _device(opt) != "cpu":
        return f"there is no kernel for {_device(opt)} yet"
    return f"parameters are on the CPU; {_native.instruction_set()}, {_native.max_threads()} threads"


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
            _increment_version([p for _, p in selection.members])
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


def _stepped(step: plan.Step) -> list[tuple[plan.GroupStep, Tensor]]:
    return [(gs, p) for gs in step.groups for p in gs.group["params"] if getattr(p, "grad", None) is not None]


# ---- torch ---------------------------------------------------------------------------------------


@torch.no_grad()
def _torch_update(opt, step: plan.Step) -> dict[Tensor, plan.Prepared]:
    prepared = _prepare(opt, step, _stepped(step))
    plan.add_prune_masks(opt, plan.without_prune_mask(opt, step))
    reference.run(opt, step, prepared)
    return prepared


# ---- cpu -----------------------------------------------------------------------------------------


def _spec(gs: plan.GroupStep, params: list[Tensor], slots: tuple, counters: tuple, emas: tuple) -> tuple:
    """A group as csrc/tensor_table.cpp reads it."""
    return (
        params if isinstance(params, list) else list(params),
        schema.RULES.index(gs.kernel),
        slots,
        counters,
        emas,
        gs.hyper,
        tuple(gs.stage[name] for name in schema.STAGE_SCALARS),
        gs.group["max_grad_norm"] or 0.0,
    )


def _gather(opt, step: plan.Step, replaced: dict) -> tuple:
    """(table, problems): the optimizer's table filled from its live tensors, as csrc/tensor_table.h says.

    The step has it to itself until `_put_back`: the interpreter's lock is open while it runs, and another thread
    may step the same optimizer.
    """
    table = opt.__dict__.pop("_table", None)
    if table is None:
        table = _native.TensorTable()
    specs = [_spec(gs, gs.group["params"], gs.slots, gs.counters, gs.averages()) for gs in step.groups]
    return table, table.gather(specs, opt.state, replaced, step.inv_grad_scale)


def _put_back(opt, table) -> None:
    """Let go of what the step read, and keep the table's memory for the next step."""
    table.release()
    opt._table = table


def _fills_placeholders(opt, step: plan.Step) -> bool:
    """Whether the step gives some entry of the state its first value."""
    keys = {key for gs in step.groups for key in gs.slots + gs.due if opt._placeholders.get(key)}
    return bool(keys) and any(plan.fills_placeholder(opt, gs, p) for gs, p in _stepped(step))


def _cpu_steady_step(opt, step: plan.Step, of_buffers: list[Iterable]) -> bool:
    """Run the step if the compiled pass is all of it, in one call so that no interrupt falls between its writes;
    False, and nothing done, if something is to be made, copied, selected or summed up around it."""
    if opt.defaults["statistics"] or any(gs.sparsity is not None for gs in step.groups):
        return False
    if _fills_placeholders(opt, step) or plan.without_prune_mask(opt, step) or masking.todo(opt, step):
        return False
    table, problems = _gather(opt, step, {})
    if problems:
        _put_back(opt, table)
        return False
    count = map(dict.__setitem__, opt.param_groups, repeat("steps"), repeat(step.t))
    run = map(table.run, (_norm(opt, table),), (False,))
    at_once(run, map(table.mark_written, (_increment_version,)), *of_buffers, count)
    _put_back(opt, table)
    return True


@torch.no_grad()
def _cpu_update(opt, step: plan.Step) -> dict[Tensor, plan.Prepared]:
    table, problems = _gather(opt, step, {})
    wanting = [(step.groups[k], step.groups[k].group["params"][i]) for k, i in problems]
    if _fills_placeholders(opt, step):
        unread = {id(p) for _, p in wanting}
        wanting = [(gs, p) for gs, p in _stepped(step) if id(p) in unread or plan.fills_placeholder(opt, gs, p)]
    prepared = _prepare(opt, step, wanting)
    # Parameters with gaps are stepped in a copy without.
    filled = {p: in_layout_of(distributed.local(p), distributed.local(p)) for p in prepared}
    if plan.add_prune_masks(opt, plan.without_prune_mask(opt, step)) or prepared:
        replaced = {p: (made.grad, made.fresh, filled[p]) for p, made in prepared.items()}
        _put_back(opt, table)
        table, problems = _gather(opt, step, replaced)
        if problems:
            raise RuntimeError("fuseopt cannot read a parameter that its checks accept; please report this")
    gaps = {p: copy for p, copy in filled.items() if copy is not distributed.local(p)}
    norm = _norm(opt, table)
    if gaps and share_memory([distributed.local(p) for _, p in _stepped(step)]):
        if norm < 0:
            norm = math.sqrt(sum(row[0] for row in table.squares()))
        sums = _run_in_turn(opt, step, prepared, norm)
    else:
        sums = table.run(norm, opt.defaults["statistics"])
        table.mark_written(_increment_version)
        for p, copy in gaps.items():
            distributed.local(p).copy_(copy)
    if opt.defaults["statistics"]:
        opt._statistics = statistics.result(_total(opt, table, sums, statistics.WIDTH))
    _put_back(opt, table)
    return prepared


def _run_in_turn(opt, step: plan.Step, prepared: dict[Tensor, plan.Prepared], norm: float) -> list:
    """The rows of table.run, one parameter after the other: the copy of one with gaps must be made when those that
    share its memory and come before it have been stepped."""
    rows, table = [], _native.TensorTable()
    for gs, p in _stepped(step):
        here = distributed.local(p)
        made, copy = prepared.get(p), in_layout_of(here, here)
        replaced = {} if made is None else {p: (made.grad, made.fresh, copy)}
        spec = _spec(gs, [p], gs.slots, gs.counters, gs.averages())
        if table.gather([spec], opt.state, replaced, step.inv_grad_scale):
            raise RuntimeError("fuseopt cannot read a parameter that its checks accept; please report this")
        rows += table.run(norm, opt.defaults["statistics"])
        table.mark_written(_increment_version)
        if copy is not here:
            here.copy_(copy)
    table.release()
    return rows


def _total(opt, table, rows: list, width: int) -> list[float]:
    """Sums of the columns, over all processes that share the parameters."""
    if table.sharded or opt.defaults["sharded"]:
        return distributed.total(opt, table.params(), rows, width)
    return [sum(column) for column in zip((0.0,) * width, *rows, strict=True)]


def _norm(opt, table) -> float:
    """The gradient's norm where processes must find it together; otherwise -1, and the table finds it by itself."""
    shared = table.sharded or opt.defaults["sharded"]
    if shared and any(group["max_grad_norm"] for group in opt.param_groups):
        return math.sqrt(_total(opt, table, table.squares(), 1)[0])
    return -1.0


class _CpuRanker:
    """select.Ranker by compiled loops over a table of the members.

    They take ties in the order of memory. Where that is not row-major and only some of a member's ties go, torch
    prunes that member.
    """

    def __init__(self, opt, members: select.Members):
        specs, grads = [], {}
        for gs, p in members:  # a parameter may have no gradient, or no state yet
            mask.into_memory_order(opt.state[p], p)
            has = opt.state[p].__contains__  # see plan.settle_state
            emas = tuple((key, 0.0, key in gs.narrow, True) for key in gs.emas if has(key))
            specs.append(_spec(gs, [p], tuple(filter(has, gs.slots)), (), emas))
            grads[p] = (p, False, None)
        self.opt, self.members, self.table = opt, members, _native.TensorTable()
        if self.table.gather(specs, opt.state, grads, 1.0):
            raise RuntimeError("fuseopt cannot read a parameter that its checks accept; please report this")

    def histogram(self, prefix: int, shift: int, width: int) -> Tensor:
        counts = torch.zeros(1 << width, dtype=torch.int64)
        self.table.histogram(prefix, shift, width, counts.data_ptr())
        return counts

    def ties(self, kth: int) -> Tensor:
        counts = torch.zeros(len(self.members), dtype=torch.int64)
        self.table.ties(kth, counts.data_ptr())
        return counts

    def prune(self, kth: int, quotas: Tensor) -> None:
        shared = quotas.numel() < len(self.members)
        if not all(distributed.local(p).is_contiguous() for _, p in self.members):
            ties = self.ties(kth)
            quotas = select.share(quotas, ties) if shared else quotas
            shared = False
            for k in ((quotas > 0) & (quotas < ties)).nonzero().flatten().tolist():  # one at most, as a rule
                select.TorchRanker(self.opt, self.members[k : k + 1]).prune(kth, quotas[k : k + 1])
                quotas[k] = 0
        self.table.prune(kth, quotas.contiguous().data_ptr(), shared)

    def prune_n_m(self, n: int, m: int) -> None:
        here = distributed.local(self.members[0][1])
        self.table.prune_n_m(n, m, here.shape[1], here.stride(1))


def _cpu_ranker(opt, members: select.Members) -> select.Ranker:
    """Parameters whose memory has gaps are ranked by torch."""
    here = [distributed.local(p) for _, p in members]
    return (_CpuRanker if all(in_layout_of(p, p) is p for p in here) else patterns.TorchRanker)(opt, members)


TABLE: dict[str, tuple[Callable, Callable]] = {
    "cpu": (_cpu_update, _cpu_ranker),
    "torch": (_torch_update, patterns.TorchRanker),
}
