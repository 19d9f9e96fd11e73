"""What a step is taken of: the cases (rule, dtype, stages, shapes) and their data.

A plain case is the bare rule. A full case is mask + clip + decay + AdamW + prune + EMA in the steady state: 80% of
the entries are pruned and the mask stands still, as it does at all steps between two selections. An EMA case is
AdamW on bf16 parameters with an average in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from shapes import QUICK, SHAPES, Shapes, entries
from torch import Tensor

import fuseopt
from fuseopt import rules

LR, EMA_DECAY = 1e-3, 0.99
SPARSITY, MASKED = 0.8, 0.1  # shares of the entries that are pruned and that the mask drops

# Options beside the class's defaults. SGD's lr is so large that a step changes weights in bf16, too.
MORE: dict[str, dict] = {
    "adamw": {"weight_decay": 0.1},
    "lion": {"weight_decay": 0.1},
    "sgd": {"lr": 0.5, "momentum": 0.9},
}
RULES: dict[str, tuple[type, dict]] = {  # every class of the registry: its options; "sgd" has momentum
    cls.__name__.lower(): (cls, {"lr": LR} | MORE.get(cls.__name__.lower(), {})) for cls in rules.ALL
} | {"sgd-plain": (fuseopt.SGD, {"lr": 0.5})}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _cases() -> Iterator[tuple[str, tuple[str, str, str]]]:
    for rule in RULES:
        for dtype in DTYPES:
            yield rule if dtype == "fp32" else f"{rule}-{dtype}", (rule, dtype, "plain")
    yield "full", ("adamw", "fp32", "full")
    yield "ema-bf16", ("adamw", "bf16", "ema")


CASES = dict(_cases())  # name: (rule, dtype, stages)


@dataclass
class Case:
    """One table: a rule, a dtype and shapes, with or without the stages around the rule.

    sizes: shapes in place of those that `shape` names.
    """

    name: str
    shape: str
    quick: bool = False
    sizes: Shapes | None = None
    rule: str = field(init=False)
    dtype: torch.dtype = field(init=False)
    stages: str = field(init=False)  # "plain", "full" or "ema"
    device = "cpu"

    def __post_init__(self):
        self.rule, dtype, self.stages = CASES[self.name]
        self.dtype = DTYPES[dtype]

    @property
    def full(self) -> bool:
        return self.stages == "full"

    @property
    def averaged(self) -> bool:
        return self.stages != "plain"

    @property
    def shapes(self) -> Shapes:
        if self.sizes is not None:
            return self.sizes
        return QUICK.get(self.shape, SHAPES[self.shape][1]) if self.quick else SHAPES[self.shape][1]

    @property
    def elements(self) -> int:
        return entries(self.shapes)

    @property
    def options(self) -> dict:
        """Arguments of the rule's class, which torch's of the same name takes, too."""
        return RULES[self.rule][1]

    @property
    def cls(self) -> type:
        return RULES[self.rule][0]

    @property
    def torch_class(self) -> type | None:
        """torch's class of the same name; None where there is none."""
        return getattr(torch.optim, self.cls.__name__, None)


class Data:
    """Start, gradient and masks of a case, as flat vectors; every variant takes its own copy.

    Gradients are bounded away from 0, so that every entry must move. The pruned entries start at 0 and all
    others lie further from it than the steps before the selection go, so what is pruned is known beforehand.
    """

    def __init__(self, case: Case):
        n, there = case.elements, {"device": case.device}
        there["generator"] = torch.Generator(case.device).manual_seed(0)

        def signed(low: float, high: float) -> Tensor:
            sign = torch.randint(0, 2, (n,), dtype=torch.int8, **there).mul_(2).sub_(1)
            return torch.rand(n, **there).mul_(high - low).add_(low).mul_(sign).to(case.dtype)

        self.shapes = case.shapes
        self.start, self.gradient = signed(0.02, 0.06), signed(0.005, 0.015)
        self.pruned = torch.zeros(n, dtype=torch.bool, device=case.device)
        self.keep = ~self.pruned
        if case.full:
            order = torch.randperm(n, **there)
            prunable = torch.cat([torch.full((entries([s]),), len(s) >= 2) for s in self.shapes]).to(case.device)
            can = prunable[order]  # vectors are not pruned
            self.pruned[order[can][: round(SPARSITY * int(can.sum()))]] = True
            self.keep[order[~self.pruned[order]][: round(MASKED * n)]] = False
            self.start[self.pruned] = 0
        self.effective = self.keep & ~self.pruned  # entries whose gradient counts
        self.max_grad_norm = 0.5 * float(self.gradient[self.effective].double().norm())  # clips

    def split(self, flat: Tensor) -> Iterator[Tensor]:
        """Views of a flat vector, one a parameter."""
        for part, shape in zip(flat.split([entries([s]) for s in self.shapes]), self.shapes, strict=True):
            yield part.view(shape)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Fresh parameters at the start, with gradients of their own."""
        params = [torch.nn.Parameter(t.clone()) for t in self.split(self.start)]
        for p in params:
            p.grad = torch.empty_like(p)
        return params
