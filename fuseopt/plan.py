"""What a step will do: every scalar, formed in double, and missing state, before the first write."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check, check_devices, in_layout_of
from .distributed import aligned, local
from .stages import decay, ema, mask, prune


@dataclass
class GroupStep:
    """One parameter group at one step."""

    group: dict
    kernel: str
    slots: tuple[str, ...]
    counters: tuple[str, ...]
    emas: tuple[str, ...]  # all averages: what the state holds
    narrow: tuple[str, ...]  # those kept in the parameter's dtype
    due: tuple[str, ...]  # those that this step updates
    thinned: tuple[str, ...]  # and those in which a threshold may zero entries; none before averaging begins
    hyper: tuple[float, ...]
    stage: dict[str, float]  # schema.STAGE_SCALARS; clip is set once the norm is known
    ema_weights: tuple[float, ...]  # of `emas`; -1 where not due
    sparsity: float | None  # prune to it after the update; None at steps that do not select
    prunes: bool  # a mask of pruned entries is needed from this step on
    lr: Tensor | None  # where the kernels read it on the GPU
    on_gpu: bool  # the kernels form the scalars; see cuda.py

    def averages(self) -> tuple[tuple[str, float, bool, bool], ...]:
        """(key, weight, whether in the parameter's dtype, whether the pass works on it) of every average."""
        weights, passed = zip(self.emas, self.ema_weights, strict=True), self.due + self.thinned
        return tuple([(key, w, key in self.narrow, self.on_gpu or key in passed) for key, w in weights])

    def not_narrow(self) -> tuple[str, ...]:
        """The averages kept in the type of the arithmetic."""
        return tuple(key for key in self.emas if key not in self.narrow)


class Step:
    """The step number `t` (from 1) of an optimizer and its groups' scalars.

    backend: which runs it. amp: (found_inf, grad_scale) where its kernels read them on the GPU. captured: a graph
    captures this step. specs: the groups as the compiled module reads them, once it has. read: what the scalars come
    from, as it was before they were formed. holds: it is made of an earlier step; see cpu.again.
    """

    specs: list | None = None
    holds = False

    def __init__(self, opt, t: int, inv_grad_scale: float, backend: str = "cpu", amp=(None, None), captured=False):
        self.t = t
        self.inv_grad_scale = inv_grad_scale
        self.backend, self.amp, self.captured = backend, amp, captured
        on_gpu = backend == "cuda"
        self.read = [dict(one) for one in sources(opt)]
        self.groups = [group_step(opt, group, t, inv_grad_scale, on_gpu) for group in opt.param_groups]


def sources(opt) -> list[dict]:
    """What the scalars of a step come from."""
    return [*opt.param_groups, opt.defaults]


def group_step(opt, group: dict, t: int, inv_grad_scale: float, on_gpu: bool = False) -> GroupStep:
    """Every scalar of a group at step t. Where the kernels form them, by the steps that count there."""
    lr = device_lr(group) if on_gpu else None
    hyper = opt.hyper(group if lr is None else {**group, "lr": 0.0})
    options = group["prune"]
    sparsity = prune.sparsity_at(options, t) if options else None
    threshold = prune.threshold_at(options, t) if options else 0.0
    stage = {
        "inv_grad_scale": inv_grad_scale,
        "direction": -1.0 if group["maximize"] else 1.0,
        "clip": 1.0,
        **decay.scalars(group, hyper[0]),
        "prune_below": prune.threshold_at(options, options["begin"]) if on_gpu and options else threshold,
        "keep_moments": float(options is not None and options["moments"] == "keep"),
    }
    names, narrow, due, thinned, weights = averages_at(opt, group, t, threshold) if group["ema"] else ((),) * 5
    return GroupStep(
        group,
        opt.kernel(group),
        opt.slots(group),
        opt.counters(group),
        names,
        narrow,
        due,
        thinned,
        hyper,
        stage,
        weights,
        sparsity,
        sparsity is not None or threshold > 0,
        lr,
        on_gpu,
    )


RATES = {"lr", "weight_decay"}  # options of which nothing but hyper and the scalars of the decay is formed


def set_rates(opt, gs: GroupStep) -> None:
    """Form anew what depends on RATES, for a group that is otherwise as it was."""
    gs.hyper = opt.hyper(gs.group)
    gs.stage.update(decay.scalars(gs.group, gs.hyper[0]))


def averages_at(opt, group: dict, t: int, threshold: float) -> tuple[tuple, tuple, tuple, tuple, tuple]:
    """(emas, narrow, due, thinned, ema_weights) of a GroupStep."""
    pairs = list(zip(ema.NAMES, group["ema"], strict=False))
    return (
        ema.names(group),
        tuple([key for key, one in pairs if one["dtype"] == "parameter"]),
        tuple([key for key, one in pairs if ema.is_due(one, t)]),
        tuple([key for key, one in pairs if threshold and (ema.updates(one, t) or not opt._placeholders.get(key))]),
        tuple([ema.weight(one, t) for one in group["ema"]]),
    )


def device_lr(group: dict) -> Tensor | None:
    """The learning rate, if it is a tensor that lies where the parameters do."""
    lr, params = group["lr"], group["params"]
    if not isinstance(lr, Tensor) or lr.dtype not in (torch.float32, torch.float64):
        return None
    return lr if params and lr.device == local(params[0]).device else None


CPU = torch.device("cpu")


def new_counter(key: str, home: torch.device) -> Tensor:
    """As torch's: 0-dim, fp32 unless fp64 is the default type."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return (torch.ones if key == "mu_product" else torch.zeros)((), dtype=dtype, device=home)


def new_moment(opt, p: Tensor) -> Tensor:
    start = opt.initial(opt.defaults)
    return torch.full_like(p, start) if start else torch.zeros_like(p)  # quicker


def new_average(options: dict, p: Tensor) -> Tensor:
    return torch.full_like(p, torch.nan, dtype=ema.dtype_of(options, p))


def new_states(opt, wanting: list[tuple[GroupStep, Tensor]]) -> dict[Tensor, dict[str, Tensor]]:
    """The whole state of plain CPU parameters that have none, before their first pass; not yet the optimizer's."""
    made, counters, unread = {}, {}, opt.initial(opt.defaults) is None
    with torch._C.DisableTorchFunction():  # a default device costs a microsecond a call
        for gs, p in wanting:
            entries = made[p] = {}
            for key in gs.counters:
                if key not in counters:
                    counters[key] = new_counter(key, CPU)
                entries[key] = counters[key].clone()
            for key in gs.slots:
                entries[key] = torch.empty_like(p) if unread else new_moment(opt, p)
            for key, options in zip(gs.emas, gs.group["ema"]):
                entries[key] = new_average(options, p)
    return made


@torch.no_grad()
def complete_state(opt, group: dict, p: Tensor, averages: bool = True) -> bool:
    """Make what p's state lacks and mend its layout; True if the moments are new.

    Averages start at NaN and are noted in opt._placeholders; see "no value yet" in stages/ema.py.
    """
    state = opt.state[p]
    home = p.device if opt._on_gpu else CPU
    for key in opt.counters(group):
        if key not in state:
            state[key] = new_counter(key, home)
        elif state[key].device != home:
            state[key] = state[key].to(home)
    fresh = False
    for key in opt.slots(group):
        if state.get(key) is None:
            state[key] = new_moment(opt, p)
            fresh = True
    names = ema.names(group) if averages else ()
    for key, options in zip(names, group["ema"]) if averages else ():
        if key not in state:
            state[key] = new_average(options, p)
            opt._placeholders.setdefault(key, set()).add(p)
    for key in (*opt.slots(group), *names):
        state[key] = in_layout_of(p, state[key])
    mask.into_memory_order(state, p)
    return fresh


def settle_state(opt, gs: GroupStep, p: Tensor) -> None:
    """Bring what there is of p's state, which `check_all` has passed, into the form that pruning reads."""
    state = opt.state[p]
    for key in gs.slots + gs.emas:
        if state.get(key) is None:  # as torch's older checkpoints have it
            state.pop(key, None)
        else:
            state[key] = in_layout_of(p, state[key])
    mask.into_memory_order(state, p)


@torch.no_grad()
def make_state(opt, prune_masks: bool = False) -> None:
    """Make the whole state of every parameter that is trained, and change nothing else.

    Until a parameter's first step what was made holds no value: opt._placeholders tells which entries these are.
    """
    step = Step(opt, 1, 1.0)
    wanting = [(gs, p) for gs in step.groups for p in gs.group["params"] if p.requires_grad or p.grad is not None]
    check_devices(opt)
    for gs, p in wanting:
        check(opt, gs.slots + gs.narrow, gs.counters, gs.not_narrow(), p, None)
    for gs, p in wanting:
        for key in gs.slots:
            if opt.state[p].get(key) is None:
                opt._placeholders.setdefault(key, set()).add(p)
        complete_state(opt, gs.group, p)
    if prune_masks:
        add_prune_masks(opt, without_prune_mask(opt, step, soon=True))


def is_placeholder(opt, p: Tensor, key: str) -> bool:
    """Whether this entry of p's state was made and holds no value yet."""
    return p in opt._placeholders.get(key, ())


def fills_placeholder(opt, gs: GroupStep, p: Tensor) -> bool:
    """Whether the step gives an entry of p's state its first value."""
    return any(is_placeholder(opt, p, key) for key in gs.slots + gs.due)


def stepped(step: Step) -> list[tuple[GroupStep, Tensor]]:
    """The parameters that have a gradient, in order."""
    return [(gs, p) for gs in step.groups for p in gs.group["params"] if getattr(p, "grad", None) is not None]


@dataclass
class Prepared:
    """What a parameter needed before its step could run."""

    grad: Tensor  # the gradient, in the parameter's memory layout; here and below, as far as it lies here
    fresh: bool  # its moments are new
    filled: list[str]  # entries of its state that the step gives their first value


def check_all(opt, wanting: list[tuple[GroupStep, Tensor]]) -> None:
    """Raise ValueError or TypeError, with nothing changed, if one of these parameters cannot be stepped."""
    check_devices(opt)
    for gs, p in wanting:
        check(opt, gs.slots + gs.narrow, gs.counters, gs.not_narrow(), p, getattr(p, "grad", None))


def prepare(opt, step: Step, wanting: list[tuple[GroupStep, Tensor]]) -> dict[Tensor, Prepared]:
    """Make what these parameters, which `check_all` has passed, lack."""
    prepared = {}
    for gs, p in wanting:
        if p in prepared:  # it is listed twice
            continue
        fresh = complete_state(opt, gs.group, p) or any(is_placeholder(opt, p, key) for key in gs.slots)
        filled = [key for key in gs.slots + gs.due if is_placeholder(opt, p, key)]
        prepared[p] = Prepared(in_layout_of(local(p), local(aligned(p, p.grad))), fresh, filled)
    return prepared


def prunable(gs: GroupStep) -> list[Tensor]:
    """The parameters of a group that pruning applies to, in order, each once."""
    return list(dict.fromkeys(p for p in gs.group["params"] if prune.prunable(p)))


def without_prune_mask(opt, step: Step, soon: bool = False) -> list[tuple[GroupStep, Tensor]]:
    """The prunable parameters that have no bits though this step, or with `soon` some later one, needs them."""
    pairs = [(gs, p) for gs in step.groups if gs.prunes or (soon and gs.group["prune"]) for p in prunable(gs)]
    return [(gs, p) for gs, p in pairs if "prune_mask" not in opt.state.get(p, {})]


def add_prune_masks(opt, missing: list[tuple[GroupStep, Tensor]]) -> bool:
    """Give these parameters bits for what is pruned; True if there are any."""
    for gs, p in missing:
        if gs.counters and gs.counters[0] not in opt.state[p]:
            complete_state(opt, gs.group, p, averages=False)
        opt.state[p]["prune_mask"] = mask.empty_bits(local(p).numel(), p.device)
        mask.into_memory_order(opt.state[p], p)
    return bool(missing)


def frozen(state: dict, p: Tensor) -> Tensor | None:
    """Boolean tensor, True where a "freeze" mask holds p; None without one."""
    return ~mask.unfold(state, p) if state.get("mask_freeze") else None
