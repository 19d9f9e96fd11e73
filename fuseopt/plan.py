"""What a step will do: every scalar, formed in double, and missing state, before the first write."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import schema
from .checks import check, check_devices, in_layout_of
from .distributed import local, placed_alike
from .stages import decay, ema, mask, prune


@dataclass
class GroupStep:
    """One parameter group at one step."""

    group: dict
    kernel: str
    slots: tuple[str, ...]
    counters: tuple[str, ...]
    emas: tuple[str, ...]
    hyper: tuple[float, ...]
    stage: dict[str, float]  # schema.STAGE_SCALARS; clip is set once the norm is known
    ema_weights: tuple[float, ...]
    sparsity: float | None  # prune to it after the update; None at steps that do not select
    prunes: bool  # a mask of pruned entries is needed from this step on


class Step:
    """The step number `t` (from 1) of an optimizer and its groups' scalars."""

    def __init__(self, opt, t: int, inv_grad_scale: float):
        self.t = t
        self.inv_grad_scale = inv_grad_scale
        self.groups = [group_step(opt, group, t, inv_grad_scale) for group in opt.param_groups]


def group_step(opt, group: dict, t: int, inv_grad_scale: float) -> GroupStep:
    """Every scalar of a group at step t."""
    hyper = opt.hyper(group)
    options = group["prune"]
    sparsity = prune.sparsity_at(options, t)
    threshold = prune.threshold_at(options, t)
    stage = {
        "inv_grad_scale": inv_grad_scale,
        "direction": -1.0 if group["maximize"] else 1.0,
        "clip": 1.0,
        **decay.scalars(group, hyper[0]),
        "prune_below": threshold,
        "keep_moments": float(options is not None and options["moments"] == "keep"),
    }
    return GroupStep(
        group,
        opt.kernel(group),
        opt.slots(group),
        opt.counters(group),
        ema.names(group),
        hyper,
        stage,
        tuple([ema.weight(one, t) for one in group["ema"]]),
        sparsity,
        sparsity is not None or threshold > 0,
    )


@torch.no_grad()
def complete_state(opt, group: dict, p: Tensor, averages: bool = True) -> bool:
    """Make what p's state lacks and mend its layout; True if the moments are new.

    Averages start at NaN, for "no value yet"; the first update copies the parameter into them.
    """
    state = opt.state[p]
    for key in opt.counters(group):
        if key not in state:  # torch: 0-dim, on the CPU, fp32 unless fp64 is the default type
            double = torch.get_default_dtype() == torch.float64
            start = 1.0 if key == "mu_product" else 0.0
            state[key] = torch.tensor(start, dtype=torch.float64 if double else torch.float32, device="cpu")
    fresh = False
    for key in opt.slots(group):
        if state.get(key) is None:
            state[key] = torch.full_like(p, opt.initial(opt.defaults), memory_format=torch.preserve_format)
            fresh = True
    names = ema.names(group) if averages else ()
    for key in names:
        if key not in state:
            state[key] = torch.full_like(p, torch.nan, dtype=schema.compute_dtype(p.dtype))
    for key in (*opt.slots(group), *names):
        state[key] = in_layout_of(p, state[key])
    mask.into_memory_order(state, p)
    return fresh


@torch.no_grad()
def make_state(opt, prune_masks: bool = False) -> None:
    """Make the whole state of every parameter that is trained, and change nothing else.

    Until a parameter's first step what was made holds no value: opt._placeholders tells which entries these are.
    """
    step = Step(opt, 1, 1.0)
    wanting = [(gs, p) for gs in step.groups for p in gs.group["params"] if p.requires_grad or p.grad is not None]
    check_devices(opt)
    for gs, p in wanting:
        check(opt, gs.slots, gs.counters, gs.emas, p, None)
    for gs, p in wanting:
        made = {key for key in gs.slots + gs.emas if opt.state[p].get(key) is None}
        complete_state(opt, gs.group, p)
        opt._placeholders[p] = opt._placeholders.get(p, set()) | made
    if prune_masks:
        add_prune_masks(opt, without_prune_mask(opt, step, soon=True))


@dataclass
class Prepared:
    """What a parameter needed before its step could run."""

    grad: Tensor  # the gradient, in the parameter's memory layout; here and below, as far as it lies here
    fresh: bool  # its moments are new
    new_emas: list[str]


def check_all(opt, wanting: list[tuple[GroupStep, Tensor]]) -> None:
    """Raise ValueError or TypeError, with nothing changed, if one of these parameters cannot be stepped."""
    check_devices(opt)
    for gs, p in wanting:
        check(opt, gs.slots, gs.counters, gs.emas, p, getattr(p, "grad", None))


def prepare(opt, step: Step, wanting: list[tuple[GroupStep, Tensor]]) -> dict[Tensor, Prepared]:
    """Make what these parameters, which `check_all` has passed, lack."""
    prepared = {}
    for gs, p in wanting:
        if p in prepared:  # it is listed twice
            continue
        empty = opt._placeholders.get(p, ())
        new_emas = [key for key in gs.emas if key not in opt.state[p] or key in empty]
        fresh = complete_state(opt, gs.group, p) or any(key in empty for key in gs.slots)
        grad = p.grad if placed_alike(p, p.grad) else p.grad.redistribute(placements=p.placements)
        prepared[p] = Prepared(in_layout_of(local(p), local(grad)), fresh, new_emas)
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
        opt.state[p]["prune_mask"] = mask.empty_bits(local(p).numel())
        mask.into_memory_order(opt.state[p], p)
    return bool(missing)


def frozen(state: dict, p: Tensor) -> Tensor | None:
    """Boolean tensor, True where a "freeze" mask holds p; None without one."""
    return ~mask.unfold(state, p) if state.get("mask_freeze") else None
