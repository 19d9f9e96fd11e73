"""Reading the live optimizer: its parameters, state and masks, and what one step was given."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cuda_memory import settle
from ..stages.mask import unfold
from . import recipe
from .judge import Interval


def flat(x: Tensor) -> Tensor:
    """x as a vector, row by row, whatever its memory format."""
    return x.detach().reshape(-1)


def computes_in(opt, kind: type, p: Tensor, options: dict) -> torch.dtype:
    """The type of the live optimizer's arithmetic: torch rounds every operation to the stored type.

    All but the fused Adam, that is. torch's fused SGD and Adagrad round 16-bit types in between too (and
    up to 2.13 its fused SGD does not update whole vectors of them at all: pytorch/pytorch issue 191763).
    """
    fused_adam = options.get("fused") and kind in (torch.optim.AdamW, torch.optim.Adam)
    widened = hasattr(opt, "prune_mask") or fused_adam
    return p.dtype if p.dtype == torch.float64 or not widened else torch.float32


def live_streams(opt, kind: type, p: Tensor) -> dict[str, dict[str, Tensor]]:
    """The live state of p as {"moments": ..., "emas": ..., "counters": ...}; moments and averages flat."""
    if hasattr(opt, "_placeholders"):
        settle(opt)  # they are known to the GPU alone
    made = {k for k, of in getattr(opt, "_placeholders", {}).items() if p in of}  # but without a value yet
    state = {k: v for k, v in opt.state.get(p, {}).items() if isinstance(v, Tensor) and k not in made}
    return {
        "moments": {k: flat(state[k]) for k in recipe.MOMENTS[kind] if k in state},
        "emas": {k: flat(v) for k, v in state.items() if k.startswith("ema_")},
        "counters": {k: state[k] for k in recipe.COUNTERS if k in state},
    }


def live_pruned(opt, p: Tensor) -> Tensor | None:
    """The flat mask of pruned entries; None where there is none."""
    pruned = opt.prune_mask(p) if hasattr(opt, "prune_mask") else None
    return None if pruned is None else flat(pruned).to(p.device)


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Where the bits differ, signs of zero and kinds of NaN included."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.contiguous().view(bits) != b.contiguous().view(bits)


@dataclass
class StepFacts:
    """What the live optimizer was given for one step, and what is common to every copy of it."""

    opt: Any
    kind: type
    t: int
    options: list[dict]  # one a parameter group, as they were before the step
    grads: dict[Tensor, Tensor]
    grad_scale: float
    total_norm: Tensor | None = None
    weights: list[dict[str, float]] = field(default_factory=list)  # one of `weigh` a parameter

    def weigh(self, p: Tensor, old: Tensor, copy: Interval, selected: Tensor) -> None:
        """Gather what opt.statistics() must say of a parameter: of the weights before a selection.

        selected: entries that this step's selection zeroed; what they were only the copy knows.
        """
        if p not in self.grads or not self.opt.defaults.get("statistics"):
            return
        x = torch.where(selected, copy.value, flat(p)).double()
        change, slack = x - old.double(), torch.where(selected, copy.slack(), 0.0)
        unsure = (copy.low <= 0) & (copy.high >= 0) & (copy.low != copy.high)
        sums = {
            "param": x.square(),
            "param_slack": 2 * x.abs() * slack + slack.square(),
            "update": change.square(),
            "update_slack": 2 * change.abs() * slack + slack.square(),
            "zeros": x == 0,
            "unsure": unsure,
        }
        self.weights.append({name: float(terms.sum()) for name, terms in sums.items()})

    def groups(self) -> Iterator[tuple[dict, list[tuple[str, Tensor]]]]:
        """(options, [(name, parameter)]) of each group."""
        for k, (group, options) in enumerate(zip(self.opt.param_groups, self.options, strict=True)):
            names = group.get("param_names") or [
                f"group {k}, parameter {i}" for i in range(len(group["params"]))
            ]
            yield options, list(zip(names, group["params"], strict=True))

    def keep(self, p: Tensor) -> Tensor | None:
        """The user's mask, flat; None where there is none."""
        keep = unfold(self.opt.state.get(p, {}), p)
        return None if keep is None else flat(keep)

    def frozen(self, p: Tensor) -> Tensor:
        """Flat mask of the entries that a "freeze" mask holds."""
        if not self.opt.state.get(p, {}).get("mask_freeze"):
            return torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
        return ~self.keep(p)

    def still_pruned(self, options: dict, p: Tensor, pruned: Tensor | None) -> Tensor:
        """What of `pruned`, flat, this step does not free before it updates."""
        if pruned is None:
            return torch.zeros_like(self.frozen(p))
        freed = recipe.lets_go(options.get("prune"), self.t) and recipe.is_prunable(p)
        return pruned & self.frozen(p) if freed else pruned

    def gradient(self, p: Tensor) -> Tensor:
        """The gradient unscaled and masked; float64, flat."""
        return recipe.unscale_and_mask(flat(self.grads[p]), self.grad_scale, self.keep(p))

    def free_gradients(self, pruned: dict[Tensor, Tensor | None]) -> list[Tensor]:
        """The gradients of entries that the step may change; pruned: the masks before it."""
        options = {p: options for options, named in self.groups() for _, p in named}
        out = []
        for p in self.grads:
            g = self.gradient(p)
            g[self.still_pruned(options[p], p, pruned.get(p))] = 0
            out.append(g)
        return out
