"""The plain torch reference of a step: the arithmetic's documentation, the oracle, the backend of last resort.

Everything is computed in fp32 for 16-bit and fp32 parameters and in fp64 for fp64 ones, so a run of it on
a double copy of a model is the float64 oracle.
"""

import math

import torch
from torch import Tensor

from . import plan
from .distributed import local, local_state, total
from .schema import compute_dtype
from .stages import clip, decay, ema, mask, prune, statistics


def gradient(p: Tensor, grad: Tensor, keep: Tensor | None, gs: plan.GroupStep) -> Tensor:
    """Stages 1 to 3: the gradient unscaled, turned for maximize, and zero where masked."""
    g = clip.unscale(grad.to(compute_dtype(p.dtype)), gs.stage["inv_grad_scale"])
    g = g * gs.stage["direction"]
    return g if keep is None else torch.where(keep, g, 0.0)


def step_parameter(opt, gs: plan.GroupStep, p: Tensor, g: Tensor, clip_factor: float, fresh: bool) -> None:
    """Stages 4 to 11 on one parameter and its state, in order. g: from `gradient`."""
    state, s = local_state(opt.state[p]), gs.stage
    p = local(p)
    kind = compute_dtype(p.dtype)
    frozen = plan.frozen(state, p)
    pruned = mask.pruned(state, p)

    w = p.to(kind)
    slot = {key: state[key].to(kind) for key in gs.slots}
    counter = {key: float(state[key]) for key in gs.counters} | {"first": fresh}

    g = clip.clip(g, clip_factor)
    g = decay.coupled(g, w, s["l2"], s["l1"])
    w = decay.decoupled(w, s["decay"])
    w = opt.update(w, g, slot, counter, gs.hyper)
    w = decay.soft_threshold(w, s["soft_threshold"])

    new = {"p": w.to(p.dtype), **{key: slot[key].to(p.dtype) for key in gs.slots}}
    if pruned is not None:
        below = new["p"].to(kind).abs() < s["prune_below"]
        pruned = pruned | (below if frozen is None else below & ~frozen)
        mask.set_pruned(state, p, pruned)
        new["p"] = prune.apply(new["p"], pruned)
        if not s["keep_moments"]:
            new.update({key: prune.apply(new[key], pruned) for key in gs.slots})
    if frozen is not None:
        new["p"] = torch.where(frozen, p, new["p"])
        new.update({key: torch.where(frozen, state[key], new[key]) for key in gs.slots})

    p.copy_(new["p"])
    for key in gs.slots:
        state[key].copy_(new[key])
    for key in gs.counters:
        state[key].fill_(counter[key])
    for key, weight, _, passed in gs.averages():
        if passed and (weight >= 0 or not ema.is_empty(state[key])):
            state[key].copy_(ema.update(state[key], p.to(kind), weight, pruned, frozen))


def run(opt, step: plan.Step, prepared: dict[Tensor, plan.Prepared]) -> None:
    """Stages 1 to 12 over every parameter in `prepared`, which holds them all."""
    todo = []
    for gs in step.groups:
        for p in gs.group["params"]:
            if p in prepared:
                keep, pruned = mask.unfold(opt.state[p], local(p)), mask.pruned(opt.state[p], local(p))
                g = gradient(p, prepared[p].grad, keep, gs)
                todo.append((gs, p, g, g if pruned is None else torch.where(pruned, 0.0, g)))
    params = [p for _, p, _, _ in todo]
    norm = 0.0
    if any(gs.group["max_grad_norm"] for gs in step.groups):
        norm = math.sqrt(_total(opt, params, [(clip.square(free),) for _, _, _, free in todo], 1)[0])
    rows = []
    for gs, p, g, free in todo:
        before = local(p).clone()
        step_parameter(opt, gs, p, g, clip.factor(gs.group["max_grad_norm"], norm), prepared[p].fresh)
        rows.append(statistics.row(free, before, local(p)) if opt.defaults["statistics"] else ())
    if opt.defaults["statistics"]:
        opt._statistics = statistics.result(_total(opt, params, rows, statistics.WIDTH))


def _total(opt, params: list[Tensor], rows: list, width: int) -> list[float]:
    return total(opt, params, torch.tensor(rows, dtype=torch.float64).reshape(-1, width), width).tolist()
