"""What a step will do: every scalar, formed in double, and missing state, before the first write."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import schema
from .checks import check, check_devices, in_layout_of, name_of
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
        tuple(ema.weight(one, t) for one in group["ema"]),
        sparsity,
        sparsity is not None or threshold > 0,
    )


@torch.no_grad()
def complete_state(opt, group: dict, p: Tensor, averages: bool = True) -> bool:
    """Make what p's state lacks and mend its layout; True if the moments are new.

    Averages start at zero; the caller copies the parameter into them after the first update.
    """
    state = opt.state[p]
    for key in opt.counters(group):
        if key not in state:  # torch: 0-dim, on the CPU, fp32 unless fp64 is the default type
            double = torch.get_default_dtype() == torch.float64
            start = 1.0 if key == "mu_product" else 0.0
            state[key] = torch.tensor(start, dtype=torch.float64 if double else torch.float32)
    fresh = False
    for key in opt.slots(group):
        if state.get(key) is None:
            state[key] = torch.full_like(p, opt.initial(group), memory_format=torch.preserve_format)
            fresh = True
    names = ema.names(group) if averages else ()
    for key in names:
        if key not in state:
            state[key] = torch.zeros_like(p, dtype=schema.compute_dtype(p.dtype))
    for key in (*opt.slots(group), *names):
        state[key] = in_layout_of(p, state[key])
    mask.into_memory_order(state, p)
    return fresh


@torch.no_grad()
def make_state(opt) -> None:
    """Make the whole state of every parameter that has a gradient, and change nothing else."""
    step = Step(opt, 1, 1.0)
    wanting = [(gs, p) for gs in step.groups for p in gs.group["params"] if p.grad is not None]
    check_devices(opt)
    for gs, p in wanting:
        check(opt, gs.slots, gs.counters, gs.emas, p, getattr(p, "grad", None))
    for gs, p in wanting:
        new = [key for key in gs.emas if key not in opt.state[p]]
        complete_state(opt, gs.group, p)
        for key in new:
            opt.state[p][key].copy_(p)


@dataclass
class Prepared:
    """What a parameter needed before its step could run."""

    grad: Tensor  # the gradient, in the parameter's memory layout
    fresh: bool  # its moments are new
    new_emas: list[str]


def prepare(opt, step: Step, wanting: list[tuple[GroupStep, Tensor]]) -> dict[Tensor, Prepared]:
    """Check the parameters that cannot run as they are, then make what they lack.

    Raises before anything is changed.
    """
    if not wanting and all(gs.sparsity is None for gs in step.groups):
        return {}
    check_devices(opt)
    for gs, p in wanting:
        check(opt, gs.slots, gs.counters, gs.emas, p, getattr(p, "grad", None))
    for selection in selections(step):
        check_enough_to_prune(opt, selection)
    prepared = {}
    for gs, p in wanting:
        new_emas = [key for key in gs.emas if key not in opt.state[p]]
        fresh = complete_state(opt, gs.group, p)
        prepared[p] = Prepared(in_layout_of(p, p.grad), fresh, new_emas)
    return prepared


def prunable(gs: GroupStep) -> list[Tensor]:
    """The parameters of a group that pruning applies to, in order."""
    return [p for p in gs.group["params"] if prune.prunable(p)]


def add_prune_masks(opt, step: Step) -> bool:
    """Give every prunable parameter its bits; True if any was new."""
    added = False
    for gs in step.groups:
        if gs.prunes:
            for p in prunable(gs):
                if "prune_mask" not in opt.state[p]:
                    if gs.counters and gs.counters[0] not in opt.state[p]:
                        complete_state(opt, gs.group, p, averages=False)
                    opt.state[p]["prune_mask"] = mask.empty_bits(p.numel())
                    mask.into_memory_order(opt.state[p], p)
                    added = True
    return added


def frozen(opt, p: Tensor) -> Tensor | None:
    """Boolean tensor, True where a "freeze" mask holds p; None without one."""
    state = opt.state.get(p, {})
    return ~mask.unfold(state, p) if state.get("mask_freeze") else None


def selections(step: Step) -> list[list[tuple[GroupStep, Tensor]]]:
    """What is ranked together at this step: all parameters whose groups prune alike, or each tensor alone."""
    together: list[tuple[dict, list]] = []
    for gs in step.groups:
        if gs.sparsity is None:
            continue
        members = [(gs, p) for p in prunable(gs)]
        options = gs.group["prune"]
        alike = next((found for seen, found in together if seen == options), None)
        if options["scope"] == "tensor":
            together += [(options, [member]) for member in members]
        elif alike is None:
            together.append((options, members))
        else:
            alike += members
    return [members for _, members in together if members]


def target(selection: list[tuple[GroupStep, Tensor]]) -> int:
    """How many entries of a selection are pruned after this step."""
    return round(selection[0][0].sparsity * sum(p.numel() for _, p in selection))


def _held(opt, p: Tensor) -> int:
    """How many entries are frozen and not pruned already."""
    held, pruned = frozen(opt, p), opt.prune_mask(p)
    if held is None:
        return 0
    return int(held.sum() if pruned is None else (held & ~pruned).sum())


def check_enough_to_prune(opt, selection: list[tuple[GroupStep, Tensor]]) -> None:
    """Raise ValueError if the sparsity asks for more entries than are not frozen."""
    n = sum(p.numel() for _, p in selection)
    free = n - sum(_held(opt, p) for _, p in selection)
    if target(selection) > free:
        where = "the prunable parameters" if len(selection) > 1 else name_of(opt, selection[0][1])
        raise ValueError(
            f"sparsity {selection[0][0].sparsity:g} of {where} asks to prune {target(selection)} of {n} entries, but "
            f"masks freeze all but {free}; lower the sparsity, or put frozen parameters in a group with prune=None"
        )
