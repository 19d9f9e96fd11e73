"""What a step will do: checks, missing state, and every scalar, formed in double before the first write."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import schema
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


# ---- which parameter -----------------------------------------------------------------------------


def name_of(opt, p: Tensor) -> str:
    """How messages call a parameter: its own name, or its place."""
    for k, group in enumerate(opt.param_groups):
        for i, q in enumerate(group["params"]):
            if q is p:
                names = group.get("param_names")
                return repr(names[i]) if names else f"parameter {i} of group {k}"
    return "a parameter"


def find(opt, param: Tensor | str) -> tuple[dict, Tensor, str]:
    """(group, parameter, name) of a parameter given itself or by name. Raises ValueError if it has none."""
    for group in opt.param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for p, name in zip(group["params"], names, strict=True):
            if p is param or (isinstance(param, str) and name == param):
                return group, p, name_of(opt, p)
    if isinstance(param, str):
        raise ValueError(f"no parameter is named {param!r}; build the optimizer from model.named_parameters()")
    raise ValueError("this tensor is not a parameter of the optimizer; add it with add_param_group first")


# ---- checks and missing state --------------------------------------------------------------------


def check(opt, gs: GroupStep, p: Tensor, g: Tensor | None) -> None:
    """Raise TypeError or ValueError if p cannot be stepped with gradient g (None: only with its state)."""
    name = name_of(opt, p)
    if p.dtype not in schema.DTYPES:
        kinds = ", ".join(str(d).removeprefix("torch.") for d in schema.DTYPES)
        raise TypeError(f"{name} has dtype {p.dtype}; fuseopt steps {kinds}: convert it or use torch.optim for it")
    for x in (p, g):
        if x is not None and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(f"{name} is {type(x).__name__}, which has no storage of its own; step the tensors it is made of")
    if p.layout != torch.strided or not dense(p):
        raise ValueError(
            f"{name} with strides {tuple(p.stride()) if p.layout == torch.strided else p.layout} does not fill its "
            "memory; pass a contiguous tensor, not a slice or an expanded view"
        )
    devices = {q.device for group in opt.param_groups for q in group["params"]}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"parameters lie on {found}; give each device an optimizer of its own")
    if opt.defaults["backend"] == "cpu" and p.device.type != "cpu":
        raise ValueError(f"{name} is on {p.device} and backend='cpu' was asked for; move it, or leave backend out")
    if g is not None:
        check_gradient(name, p, g)
    for key in gs.slots + gs.emas + gs.counters:
        check_state(name, p, key, opt.state.get(p, {}).get(key), key in gs.counters, key in gs.emas)
    mask.check_state(name, p.numel(), opt.state.get(p, {}))


def check_gradient(name: str, p: Tensor, g: Tensor) -> None:
    """Raise ValueError or TypeError unless g is a dense gradient of p's shape, dtype and device."""
    if g.layout != torch.strided:
        raise ValueError(f"the gradient of {name} is {g.layout}; fuseopt takes dense ones (sparse=False in the layer)")
    if g.shape != p.shape:
        raise ValueError(f"the gradient of {name} has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}")
    if g.dtype != p.dtype:
        raise TypeError(f"the gradient of {name} has dtype {g.dtype}, the parameter {p.dtype}; convert one of them")
    if g.device != p.device:
        raise ValueError(f"the gradient of {name} is on {g.device}, the parameter on {p.device}; move one of them")


def check_state(name: str, p: Tensor, key: str, value, is_counter: bool, is_ema: bool) -> None:
    """Raise ValueError or TypeError unless a state entry, where there is one, fits the parameter."""
    if value is None:
        return
    remedy = "delete it from the optimizer's state to start it afresh"
    if not isinstance(value, Tensor):
        raise TypeError(f"state {key!r} of {name} is {type(value).__name__}, not a tensor; {remedy}")
    if is_counter:
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"state {key!r} of {name} must be one fp32 or fp64 number; {remedy}")
        return
    if value.shape != p.shape:
        raise ValueError(f"state {key!r} of {name} has shape {tuple(value.shape)}, not {tuple(p.shape)}; {remedy}")
    expected = schema.compute_dtype(p.dtype) if is_ema else p.dtype
    if value.dtype != expected:
        raise TypeError(f"state {key!r} of {name} has dtype {value.dtype}, not {expected}; convert it, or {remedy}")
    if value.device != p.device:
        raise ValueError(f"state {key!r} of {name} is on {value.device}, not {p.device}; move it, or {remedy}")


def dense(p: Tensor) -> bool:
    """Whether p fills its memory without gaps or overlap, in some order of its dimensions."""
    expected = 1
    for stride, size in sorted((p.stride(d), p.shape[d]) for d in range(p.dim()) if p.shape[d] > 1):
        if stride != expected:
            return False
        expected *= size
    return True


@torch.no_grad()
def in_layout_of(p: Tensor, x: Tensor) -> Tensor:
    """x itself if its elements lie in memory as p's do, otherwise a copy that does."""
    same = all(a == b or n <= 1 for a, b, n in zip(x.stride(), p.stride(), p.shape, strict=True))
    return x if same else torch.empty_like(p, dtype=x.dtype).copy_(x)


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
    return fresh


@torch.no_grad()
def make_state(opt) -> None:
    """Make the whole state of every parameter that has a gradient, and change nothing else."""
    step = Step(opt, 1, 1.0)
    wanting = [(gs, p) for gs in step.groups for p in gs.group["params"] if p.grad is not None]
    for gs, p in wanting:
        check(opt, gs, p, p.grad)
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
    for gs, p in wanting:
        check(opt, gs, p, p.grad)
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


# ---- averages ------------------------------------------------------------------------------------


def averages(opt, k: int) -> list[tuple[Tensor, Tensor]]:
    """(parameter, average) of every parameter that has average k. Raises ValueError if none has."""
    pairs = [
        (p, opt.state[p][f"ema_{k}"])
        for group in opt.param_groups
        for p in group["params"]
        if p in opt.state and f"ema_{k}" in opt.state[p]
    ]
    if not pairs:
        kept = max(len(group["ema"]) for group in opt.param_groups)
        why = "take a step first" if isinstance(k, int) and 0 <= k < kept else "pass ema=fuseopt.EMA(decay)"
        raise ValueError(f"there is no average {k}: {why}")
    return pairs


def match_averages(opt, model: torch.nn.Module, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter of model, average) for copy_ema_to. Raises ValueError where they do not match."""
    pairs = averages(opt, k)
    own = {id(p) for p in model.parameters()}
    if all(id(p) in own for p, _ in pairs):
        yield from pairs
        return
    targets = dict(model.named_parameters())
    matched = []
    for p, average in pairs:
        name = name_of(opt, p).strip("'")
        if name not in targets:
            raise ValueError(f"the model has no parameter {name}; build the optimizer from model.named_parameters()")
        if targets[name].shape != average.shape:
            raise ValueError(f"{name!r} has shape {tuple(targets[name].shape)}, its average {tuple(average.shape)}")
        matched.append((targets[name], average))
    yield from matched
