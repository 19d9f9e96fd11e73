"""What is timed: the cases (rule, dtype, shapes), their data, and the ways to take the same step.

A plain case is the bare rule. A full case is mask + clip + decay + AdamW + prune + EMA in the steady state:
80% of the entries are pruned and the mask stands still, as it does at all steps between two selections.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fuseopt

LR, WEIGHT_DECAY, MOMENTUM, EMA_DECAY = 1e-3, 0.1, 0.9, 0.99
SPARSITY, MASKED = 0.8, 0.1  # shares of the entries that are pruned and that the mask drops

# ---- cases -----------------------------------------------------------------------------------------


def _transformer(width: int, layers: int, tokens: int, positions: int) -> list[tuple[int, int]]:
    """The matrices of a decoder: two embeddings, then four a layer."""
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [(tokens, width), (positions, width), *layer * layers]


SHAPES = {  # 2**24 parameters in one tensor and (all but 256) in 50; then many tensors of 64
    "one": [(4096, 4096)],
    "fifty": _transformer(320, 12, 6092, 256),
    "10": [(8, 8)] * 10,
    "200": [(8, 8)] * 200,
    "1000": [(8, 8)] * 1000,
}
QUICK_SHAPES = {"one": [(512, 512)], "fifty": _transformer(40, 12, 760, 32)}
CASES = {
    "adamw": ("adamw", torch.float32, False),
    "sgd": ("sgd", torch.float32, False),
    "adamw-bf16": ("adamw", torch.bfloat16, False),
    "full": ("adamw", torch.float32, True),
}


@dataclass
class Case:
    """One table: a rule, a dtype and shapes, with or without the stages around the rule."""

    name: str
    shape: str
    quick: bool = False
    rule: str = field(init=False)
    dtype: torch.dtype = field(init=False)
    full: bool = field(init=False)
    device = "cpu"

    def __post_init__(self):
        self.rule, self.dtype, self.full = CASES[self.name]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return {**SHAPES, **(QUICK_SHAPES if self.quick else {})}[self.shape]

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))


class Data:
    """Start, gradient and masks of a case, as flat vectors; every variant takes its own copy.

    Gradients are bounded away from 0, so that every entry must move. The pruned entries start at 0 and all
    others lie further from it than the steps before the selection go, so what is pruned is known beforehand.
    """

    def __init__(self, case: Case):
        n, there = case.elements, {"device": case.device}
        there["generator"] = torch.Generator(case.device).manual_seed(0)

        def signed(low: float, high: float) -> Tensor:
            sign = torch.randint(0, 2, (n,), **there).mul_(2).sub_(1)
            return torch.rand(n, **there).mul_(high - low).add_(low).mul_(sign).to(case.dtype)

        self.shapes = case.shapes
        self.start, self.gradient = signed(0.02, 0.06), signed(0.005, 0.015)
        self.pruned = torch.zeros(n, dtype=torch.bool, device=case.device)
        self.keep = ~self.pruned
        if case.full:
            order, pruned = torch.randperm(n, **there), round(SPARSITY * n)
            self.pruned[order[:pruned]] = True
            self.keep[order[pruned : pruned + round(MASKED * n)]] = False
            self.start[self.pruned] = 0
        self.effective = self.keep & ~self.pruned  # entries whose gradient counts
        self.max_grad_norm = 0.5 * float(self.gradient[self.effective].double().norm())  # clips

    def split(self, flat: Tensor) -> Iterator[Tensor]:
        """Views of a flat vector, one a parameter."""
        for part, shape in zip(flat.split([math.prod(s) for s in self.shapes]), self.shapes, strict=True):
            yield part.view(shape)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Fresh parameters at the start, with gradients of their own."""
        params = [torch.nn.Parameter(t.clone()) for t in self.split(self.start)]
        for p in params:
            p.grad = torch.empty_like(p)
        return params


# ---- variants --------------------------------------------------------------------------------------


@dataclass
class Variant:
    """One way to take a case's step."""

    name: str
    family: str  # "fuseopt", "torch", "float masks", "boolean masks"
    params: list[Tensor]
    opt: torch.optim.Optimizer
    step: Callable[[], object]
    bytes: Callable[[], float]  # read + written by a step; call it after the first one
    passes: str  # how they are counted
    averages: Callable[[], list[Tensor]] = list
    freezes: bool = False  # masked entries keep their bits; otherwise only their gradient is dropped
    writes_gradient: bool = False

    def set_gradient(self, data: Data, flat: Tensor | None = None) -> None:
        """Give the parameters a gradient: the case's own, or another flat vector."""
        for p, g in zip(self.params, data.split(data.gradient if flat is None else flat), strict=True):
            p.grad.copy_(g)


# Tensors read or written a step by torch's optimizers, from their sources: fused touches p twice (read and
# write), g once and each moment twice; the others once more for every operation.
STREAMS = {
    ("adamw", "fused"): (7, "p 2, g 1, m 2, v 2"),
    ("adamw", "foreach"): (20, "mul p 2, lerp m 3, mul v 2, addcmul v 3, sqrt 2, div 2, add 2, addcdiv p 4"),
    ("sgd", "fused"): (5, "p 2, g 1, buf 2"),
    ("sgd", "foreach"): (8, "mul buf 2, add g 3, add p 3"),
}
for _rule in ("adamw", "sgd"):
    STREAMS[_rule, "default"] = STREAMS[_rule, "foreach"]  # the same operations, a tensor at a time
FLAGS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "default": {}}


def _arguments(case: Case) -> dict:
    if case.rule == "sgd":
        return {"lr": LR, "momentum": MOMENTUM}
    return {"lr": LR, "weight_decay": WEIGHT_DECAY}


def _torch_optimizer(case: Case, params: list, flavour: str) -> torch.optim.Optimizer:
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[case.rule]
    return kind(params, **_arguments(case), **FLAGS[flavour])


def fused_pass(case: Case, data: Data, mode: str | None = None, backend: str | None = None) -> Variant:
    """fuseopt, on a backend if one is named; in a full case with masks of this mode."""
    params, stages = data.parameters(), {}
    if case.full:
        ema, prune = fuseopt.EMA(EMA_DECAY), fuseopt.Prune(SPARSITY)
        stages = {"max_grad_norm": data.max_grad_norm, "ema": ema, "prune": prune}
    opt = {"adamw": fuseopt.AdamW, "sgd": fuseopt.SGD}[case.rule](
        params, **_arguments(case), **stages, backend=backend
    )
    if case.full:
        for p, keep in zip(params, data.split(data.keep), strict=True):
            opt.mask(p, keep, mode=mode)

    def averages() -> list[Tensor]:
        return [opt.state[p]["ema_0"] for p in params] if case.full else []

    name = ", ".join(filter(None, ("fuseopt", backend, mode and f'mask mode "{mode}"')))
    count = "as opt.explain() counts them"

    def moved() -> float:
        return opt.explain().bytes_per_step

    return Variant(name, "fuseopt", params, opt, opt.step, moved, count, averages, freezes=mode == "freeze")


def plain_torch(case: Case, data: Data, flavour: str) -> Variant:
    """torch's own optimizer in a plain case."""
    params = data.parameters()
    opt = _torch_optimizer(case, params, flavour)
    streams, passes = STREAMS[case.rule, flavour]
    total = case.elements * case.dtype.itemsize * streams
    name = "torch default" if flavour == "default" else f"torch {flavour}=True"
    return Variant(name, "torch", params, opt, opt.step, lambda: total, passes)


class LerpAverage:
    """An EMA as it is written by hand: the first update copies, then one torch._foreach_lerp_."""

    def __init__(self, params: list[Tensor]):
        self.params, self.tensors = params, []

    def update(self) -> None:
        if self.tensors:
            torch._foreach_lerp_(self.tensors, self.params, 1 - EMA_DECAY)
        else:
            self.tensors = [p.detach().clone() for p in self.params]

    def averages(self) -> list[Tensor]:
        return self.tensors


class SwaAverage:
    """An EMA by torch.optim.swa_utils.AveragedModel."""

    def __init__(self, params: list[Tensor]):
        self.model = torch.nn.ParameterList(params)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def update(self) -> None:
        self.averaged.update_parameters(self.model)

    def averages(self) -> list[Tensor]:
        return [p.detach() for p in self.averaged.parameters()]


class Restore:
    """Holds masked entries still: a copy before the step, put back after it. 24 bytes an element, 21 with booleans."""

    def __init__(self, params: list[Tensor], held: list[Tensor]):
        self.params, self.held = params, held
        self.saved = [torch.empty_like(p) for p in params]

    def save(self) -> None:
        torch._foreach_copy_(self.saved, self.params)

    def put_back(self) -> None:
        if self.held[0].is_floating_point():
            torch._foreach_lerp_(self.params, self.saved, self.held)  # exact at weights 0 and 1
            return
        for p, saved, held in zip(self.params, self.saved, self.held, strict=True):
            torch.where(held, saved, p, out=p)


def recipe(
    case: Case, data: Data, masks: str, flavour: str, swa: bool = False, freezes: bool = False
) -> Variant:
    """A full case as separate torch passes: mask the gradients, clip, step, restore if frozen, prune, average."""
    params = data.parameters()
    opt = _torch_optimizer(case, params, flavour)
    average = (SwaAverage if swa else LerpAverage)(params)
    keep, alive = (data.effective, ~data.pruned) if masks == "float" else (~data.effective, data.pruned)
    keep, alive = ([t.clone() for t in data.split(flat)] for flat in (keep, alive))
    if masks == "float":
        keep, alive = ([t.to(case.dtype) for t in tensors] for tensors in (keep, alive))
    held = [t.to(case.dtype if masks == "float" else torch.bool) for t in data.split(~data.keep)]
    restore = Restore(params, held) if freezes else None

    def apply(tensors: list[Tensor], chosen: list[Tensor]) -> None:
        if masks == "float":
            torch._foreach_mul_(tensors, chosen)
        else:
            for t, drop in zip(tensors, chosen, strict=True):
                t.masked_fill_(drop, 0)

    @torch.no_grad()
    def step() -> None:
        apply([p.grad for p in params], keep)
        clip_grad_norm_(params, data.max_grad_norm, foreach=True)
        if restore:
            restore.save()
        opt.step()
        if restore:
            restore.put_back()
        apply(params, alive)
        average.update()

    streams, passes = STREAMS[case.rule, flavour]
    mask = 12 if masks == "float" else 9  # bytes an element: a tensor read and written, its mask read
    back = (mask + 12) * freezes  # a copy, then p, its copy and the mask read and p written
    total = case.elements * (mask + 4 + 8 + 4 * streams + back + mask + 12)
    passes = f"bytes: mask {mask}, norm 4, scale 8, step {4 * streams}, restore {back}, prune {mask}, EMA 12"
    optimizer = "AdamW" if flavour == "default" else f"AdamW({flavour}=True)"
    name = f"{masks} masks, {optimizer}, {'AveragedModel' if swa else 'lerp EMA'}"
    family = f"{masks} masks"
    if freezes:
        name, family = f"{name}, restored", f"{family}, restored"
    return Variant(
        name, family, params, opt, step, lambda: total, passes, average.averages, freezes, writes_gradient=True
    )


def makers(case: Case, data: Data) -> list[Callable[[], Variant]]:
    """Functions that make a case's variants; the first is what the ratios are relative to."""
    if not case.full:
        flavours = [lambda f=f: plain_torch(case, data, f) for f in FLAGS]
        return [lambda: fused_pass(case, data), *flavours]
    return [
        lambda: fused_pass(case, data, "grad"),  # computes what the recipes do
        lambda: fused_pass(case, data, "freeze"),
        lambda: recipe(case, data, "float", "fused", freezes=True),
        lambda: recipe(case, data, "boolean", "fused", freezes=True),
        lambda: recipe(case, data, "float", "fused"),
        lambda: recipe(case, data, "float", "fused", swa=True),
        lambda: recipe(case, data, "float", "foreach"),
        lambda: recipe(case, data, "float", "default"),
        lambda: recipe(case, data, "boolean", "fused"),
        lambda: recipe(case, data, "boolean", "fused", swa=True),
    ]
