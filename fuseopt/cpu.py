"""The compiled module: how it is loaded, the table of live tensors that it steps, and what it is told."""

import math
from operator import itemgetter
from types import ModuleType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import distributed, plan, schema, torch_abi, torch_layout
from .checks import in_layout_of
from .stages import statistics

increment_version = torch._C._increment_version  # torch.autograd.graph's without its Python, for at_once


def _load() -> tuple[Any, str | None]:
    """The compiled module, or None and why it is missing. torch comes first: they share its OpenMP pool."""
    try:
        from . import _C
    except ImportError as error:
        return None, f"the compiled module fuseopt._C is missing ({error}); install a C++ compiler, then fuseopt again"
    connect(_C, *torch_abi.find(), torch_layout.find())
    return _C, None


def connect(module: ModuleType, functions: list[int], handle_offset: int, layout: list[int]) -> None:
    """Tell the compiled module how to read tensors: by layout, by torch's C functions, or through Python."""
    module.set_torch(torch.Tensor, torch.nn.Parameter, torch_abi.describe, functions, handle_offset)
    module.set_layout(torch.Tensor, torch.nn.Parameter, handle_offset, layout, torch_abi.more_functions())


native, why_not = _load()


def native_error() -> str | None:
    """Why the compiled module is not there; None if it is."""
    return why_not


_stage_scalars = itemgetter(*schema.STAGE_SCALARS)
HYPER = 5  # where what `_scalars` gives lies in the tuple that `spec` gives


def _scalars(gs: plan.GroupStep) -> tuple[tuple, tuple]:
    return gs.hyper, _stage_scalars(gs.stage)


def spec(gs: plan.GroupStep, params: list[Tensor], slots: tuple, counters: tuple, emas: tuple) -> tuple:
    """A group as csrc/tensor_table.cpp reads it."""
    return (
        params if isinstance(params, list) else list(params),
        schema.RULES.index(gs.kernel),
        slots,
        counters,
        emas,
        *_scalars(gs),
        gs.group["max_grad_norm"] or 0.0,
    )


def gather(opt, step: plan.Step, replaced: dict, new: dict | None = None) -> tuple:
    """(table, problems): the optimizer's table filled from its live tensors, as csrc/tensor_table.h says.

    new: state that is not yet among the optimizer's.

    The step has it to itself until `put_back`: the interpreter's lock is open while it runs, and another thread
    may step the same optimizer.
    """
    table = opt.__dict__.pop("_table", None)
    if not isinstance(table, native.TensorTable):  # none yet, or a GPU's, where the parameters were before
        table = native.TensorTable()
    step.specs = step.specs or specs(step)
    state = {**opt.state, **new} if new else opt.state
    return table, table.gather(step.specs, state, replaced, step.inv_grad_scale)


def new_states(opt, step: plan.Step, problems: list[tuple[int, int, bool]]) -> dict[Tensor, dict[str, Tensor]]:
    """State for the parameters that `gather` could not take, if they lack nothing else and the pass fills it; or {}."""
    if not all(new for _, _, new in problems) or any(gs.due != gs.emas for gs in step.groups):
        return {}
    plan.check_devices(opt)
    groups = step.groups
    return plan.new_states(opt, [(groups[k], groups[k].group["params"][i]) for k, i, _ in problems])


def specs(step: plan.Step) -> list[tuple]:
    """All groups, for table.gather."""
    return [whole(gs) for gs in step.groups]


def whole(gs: plan.GroupStep) -> tuple:
    """A group with all of its parameters."""
    return spec(gs, gs.group["params"], gs.slots, gs.counters, gs.averages())


def put_back(opt, table) -> None:
    """Let go of what the step read, and keep the table's memory for the next step."""
    table.release()
    opt._table = table


def run_in_turn(opt, step: plan.Step, prepared: dict[Tensor, plan.Prepared], norm: float, whole) -> list:
    """The rows of table.run, one parameter after the other: the copy of one with gaps must be made when those that
    share its memory and come before it have been stepped. whole: the table of them all."""
    if norm < 0:
        norm = math.sqrt(sum(row[0] for row in whole.squares()))
    rows, table = [], native.TensorTable()
    for gs, p in plan.stepped(step):
        here = distributed.local(p)
        made, copy = prepared.get(p), in_layout_of(here, here)
        replaced = {} if made is None else {p: (made.grad, made.fresh, copy)}
        one = spec(gs, [p], gs.slots, gs.counters, gs.averages())
        if table.gather([one], opt.state, replaced, step.inv_grad_scale):
            raise RuntimeError("fuseopt cannot read a parameter that its checks accept; please report this")
        rows += table.run(norm, opt.defaults["statistics"])
        table.mark_written(increment_version)
        if copy is not here:
            here.copy_(copy)
    table.release()
    return rows


def total_of(opt, params: list[Tensor], rows: list, width: int, sharded: bool) -> list[float]:
    """Sums of the columns, over all processes that share the parameters; rows[k] is of params[k]."""
    if sharded or opt.defaults["sharded"]:
        rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, width)
        return distributed.total(opt, params, rows, width).tolist()
    return _sums(rows, width)


def _sums(rows: list, width: int) -> list[float]:
    return [sum(column) for column in zip((0.0,) * width, *rows, strict=True)]


def norm(opt, table, step: plan.Step) -> float:
    """The gradient's norm where processes must find it together; otherwise -1, and the table finds it by itself."""
    shared = table.sharded or opt.defaults["sharded"]
    if shared and any(group["max_grad_norm"] for group in opt.param_groups):
        return math.sqrt(total_of(opt, table.params(), table.squares(), 1, table.sharded)[0])
    return -1.0


def arguments(opt, table, step: plan.Step, norm: float) -> tuple:
    """Those of table.run."""
    return norm, opt.defaults["statistics"]


def before(opt, table, prepared: dict[Tensor, plan.Prepared]) -> None:
    """What table.run takes for granted."""


def notes(opt, step: plan.Step, returned: list | None = None) -> list:
    """What to remember of a step that was run, as iterators for interrupts.at_once.

    returned: where what table.run returns will lie, if nothing follows in which processes could add up their sums.
    """
    if returned is None or not opt.defaults["statistics"]:
        return []
    made = statistics.Statistics(lambda: statistics.values(_sums(returned[0], statistics.WIDTH)))
    return [map(setattr, (opt,), ("_statistics",), (made,))]


def finish(opt, table, step: plan.Step, rows: list | None) -> None:
    """What is left to do after table.run, which returned `rows`; None: `notes` has seen to them."""
    if rows is not None and opt.defaults["statistics"]:
        opt._statistics = statistics.result(total_of(opt, table.params(), rows, statistics.WIDTH, table.sharded))
    put_back(opt, table)


# ---- a step like the last ----------------------------------------------------------------------------


class Kept:
    """A step that is made into the next one by forming anew what was edited, or depends on the number of the step.

    Tensors are read anew at each step all the same; here only what the options come to is kept.
    """

    def __init__(self, opt, step: plan.Step):
        self.step, self.valid = step, opt._valid
        self.copies = step.read  # while it ran a signal's handler or another thread may have edited a group
        self.passing = {k for k, gs in enumerate(step.groups) if not _lasts(gs, step.t)}


# An entry of these types is another object once it has another value. The lists are the parameters, read at each step,
# their names, read never, and the averages, which opt._validate_options looks at.
LASTING = {float, int, bool, NoneType, str, tuple, list, np.float64}


def _lasts(gs: plan.GroupStep, t: int) -> bool:
    """Whether the scalars of step t are those of all later ones."""
    group, betas = gs.group, gs.group.get("betas", ())
    if type(betas) is not tuple or not LASTING.issuperset(map(type, (*betas, *group.values()))):
        return False
    return not gs.emas or all(one["warmup"] is None and one["every"] == 1 and t > one["start"] for one in group["ema"])


def _has_more(opt) -> bool:
    """Whether more is to be seen to, or more of the step to be known, than its groups say."""
    amp = getattr(opt, "found_inf", None) is not None or getattr(opt, "grad_scale", None) is not None
    return bool(amp or opt._dynamic or opt._tracked or any(opt._placeholders.values()))


def keep(opt, step: plan.Step, table) -> None:
    """Remember a step that was nothing but a pass: the next may be like it."""
    opt._kept = None
    if not (table.sharded or opt.defaults["sharded"] or _has_more(opt)):
        step.holds = True
        opt._kept = Kept(opt, step)


def again(opt) -> plan.Step | None:
    """The next step made of the last one; None if all of it must be looked at."""
    kept = opt._kept
    if kept is None or kept.valid is not opt._valid or _has_more(opt):
        return None
    step, t = kept.step, opt._steps() + 1
    edited = dict(native.changed(plan.sources(opt), kept.copies, "steps"))
    for k in edited.keys() | kept.passing if kept.passing else edited:
        if k >= len(opt.param_groups) or len(kept.copies) != len(opt.param_groups) + 1:
            return None
        now = dict(opt.param_groups[k])
        if not _renew(opt, kept, k, edited.get(k), t):
            return None
        kept.copies[k] = now  # last: another thread may step the same optimizer
    if kept.passing and plan.without_prune_mask(opt, step):
        return None
    step.t = t
    return step


def _renew(opt, kept: Kept, k: int, edited: list[str] | None, t: int) -> bool:
    """Form the scalars of group k anew; False where they say that step t is more than a pass.

    edited: which entries alone are others than they were.
    """
    step, group, gs = kept.step, opt.param_groups[k], kept.step.groups[k]
    if edited and k not in kept.passing and plan.RATES.issuperset(edited) and gs.group is group:
        plan.set_rates(opt, gs)
        step.specs[k] = (*step.specs[k][:HYPER], *_scalars(gs), *step.specs[k][HYPER + 2 :])
    else:
        step.groups[k] = gs = plan.group_step(opt, group, t, 1.0)
        step.specs[k] = whole(gs)
    if not _lasts(gs, t):
        kept.passing.add(k)
    return gs.sparsity is None
