"""The ways to take a case's step: fuseopt, torch's own optimizers; recipes.py and peers.py have the others."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from case import EMA_DECAY, SPARSITY, Case, Data
from torch import Tensor

import fuseopt


@dataclass
class Variant:
    """One way to take a case's step."""

    name: str
    family: str  # "fuseopt", "torch", "float masks", "boolean masks", "recipe", "peer"
    params: list[Tensor]
    opt: torch.optim.Optimizer
    step: Callable[[], object]
    bytes: Callable[[], float | None]  # read + written by a step; call it after the first one; None: not counted
    passes: str  # how they are counted
    averages: Callable[[], list[Tensor]] = list
    held: Callable[[], list[Tensor]] = list  # further tensors that it keeps between steps
    freezes: bool = False  # masked entries keep their bits; otherwise only their gradient is dropped
    writes_gradient: bool = False
    change: float | None = None  # its state is another one: only parameters are compared, this loosely (check.py)

    @property
    def exact(self) -> bool:
        return self.change is None

    def set_gradient(self, data: Data, flat: Tensor | None = None) -> None:
        """Give the parameters a gradient: the case's own, or another flat vector."""
        for p, g in zip(self.params, data.split(data.gradient if flat is None else flat), strict=True):
            p.grad.copy_(g)


class Untimed(Exception):
    """Why a variant does not run here, in one line."""


# Tensors read or written a step by torch's optimizers, from their sources: fused touches p twice (read and write),
# g once and each moment twice; the others once more for every operation. A plain "foreach" or "default" that
# is missing here is not counted.
STREAMS = {
    ("adamw", "fused"): (7, "p 2, g 1, m 2, v 2"),
    ("adamw", "foreach"): (20, "mul p 2, lerp m 3, mul v 2, addcmul v 3, sqrt 2, div 2, add 2, addcdiv p 4"),
    ("adam", "fused"): (7, "p 2, g 1, m 2, v 2"),
    ("adam", "foreach"): (18, "lerp m 3, mul v 2, addcmul v 3, sqrt 2, div 2, add 2, addcdiv p 4"),
    ("sgd", "fused"): (5, "p 2, g 1, buf 2"),
    ("sgd", "foreach"): (8, "mul buf 2, add g 3, add p 3"),
    ("sgd-plain", "fused"): (3, "p 2, g 1"),
    ("sgd-plain", "foreach"): (3, "add p 3"),
    ("nadam", "foreach"): (22, "lerp m 3, mul v 2, addcmul v 3, sqrt 2, div 2, add 2, addcdiv p 4 + 4"),
    ("adagrad", "fused"): (5, "p 2, g 1, sum 2"),
    ("adagrad", "foreach"): (13, "addcmul sum 3, sqrt 2, add 2, mul g 2, addcdiv p 4"),
}
for _rule in ("adamw", "adam", "sgd", "sgd-plain", "nadam"):
    STREAMS[_rule, "default"] = STREAMS[_rule, "foreach"]  # the same operations, a tensor at a time
STREAMS["adagrad", "default"] = (11, "addcmul sum 3, sqrt 2, add 2, addcdiv p 4")
FLAGS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "default": {}}


def torch_optimizer(case: Case, params: list, flavour: str) -> torch.optim.Optimizer:
    """torch's optimizer of the case's rule."""
    return case.torch_class(params, **case.options, **FLAGS[flavour])


def fused_pass(case: Case, data: Data, mode: str | None = None, backend: str | None = None) -> Variant:
    """fuseopt, on a backend if one is named; in a full case with masks of this mode."""
    params, stages = data.parameters(), {}
    if case.averaged:
        stages = {"ema": fuseopt.EMA(EMA_DECAY)}
    if case.full:
        stages |= {"max_grad_norm": data.max_grad_norm, "prune": fuseopt.Prune(SPARSITY)}
    opt = case.cls(params, **case.options, **stages, backend=backend)
    if case.full:
        for p, keep in zip(params, data.split(data.keep), strict=True):
            opt.mask(p, keep, mode=mode)

    def averages() -> list[Tensor]:
        return [opt.state[p]["ema_0"] for p in params] if case.averaged else []

    def moved() -> float:
        return opt.explain().bytes_per_step

    name = ", ".join(filter(None, ("fuseopt", backend, mode and f'mask mode "{mode}"')))
    count, freezes = "as opt.explain() counts them", mode == "freeze"
    return Variant(name, "fuseopt", params, opt, opt.step, moved, count, averages, freezes=freezes)


def plain_torch(case: Case, data: Data, flavour: str) -> Variant:
    """torch's own optimizer in a plain case."""
    params = data.parameters()
    opt = torch_optimizer(case, params, flavour)
    streams, passes = STREAMS[case.rule, flavour]
    total = case.elements * case.dtype.itemsize * streams
    name = "torch default" if flavour == "default" else f"torch {flavour}=True"
    return Variant(name, "torch", params, opt, opt.step, lambda: total, passes)


LARGE = 2**26  # elements; of larger models only the leanest recipes, as all together would not fit in memory


def makers(case: Case, data: Data) -> list[Callable[[], Variant]]:
    """Functions that make a case's variants, without peers; the first is what the ratios are relative to."""
    import recipes  # it imports this module

    if case.stages == "plain":
        flavours = [f for f in FLAGS if (case.rule, f) in STREAMS]
        return [lambda: fused_pass(case, data), *(lambda f=f: plain_torch(case, data, f) for f in flavours)]
    if case.stages == "ema":
        return [lambda: fused_pass(case, data), *(lambda f=f: recipes.averaged(case, data, f) for f in FLAGS)]
    lean = [
        lambda: fused_pass(case, data, "grad"),  # computes what the recipes do
        lambda: fused_pass(case, data, "freeze"),
        lambda: recipes.full(case, data, "float", "fused", freezes=True),
        lambda: recipes.full(case, data, "boolean", "fused", freezes=True),
    ]
    if case.elements > LARGE:
        return lean
    return lean + [
        lambda: recipes.full(case, data, "float", "fused"),
        lambda: recipes.full(case, data, "float", "fused", swa=True),
        lambda: recipes.full(case, data, "float", "foreach"),
        lambda: recipes.full(case, data, "float", "default"),
        lambda: recipes.full(case, data, "boolean", "fused"),
        lambda: recipes.full(case, data, "boolean", "fused", swa=True),
    ]
