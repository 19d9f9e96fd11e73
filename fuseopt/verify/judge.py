"""What may differ, and by how much: the copy's result as an interval, and the decisions that follow from it.

Note: intervals. The recipe runs in float64, so the live optimizer differs from it by its own roundings.
How much a rounding early in the step matters at its end depends on the element: a gradient that cancels
against the decay, or a second moment near zero, makes it matter more. So the allowance is not guessed but
measured: the recipe is run again with each input (weight, gradient, each moment) off by ROUNDINGS units
of roundoff, and the changes of the result are added up. Along the trajectory an input may also be off by
what its own allowance was after the step before, which then is propagated the same way. The interval of
the result is rounded to the type it is stored in: for a bf16 weight it is nearly always a single value,
and then the bits must be equal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import recipe

ROUNDINGS = 8
CHUNK = 1 << 17  # elements at a time, so that the float64 copies stay small


@dataclass
class Interval:
    """The copy's result for one stream of a parameter: flat tensors of the type it is stored in."""

    value: Tensor
    low: Tensor
    high: Tensor
    exact: Tensor  # the value before rounding, in float64

    @classmethod
    def around(cls, exact: Tensor, slack: Tensor, dtype: torch.dtype) -> "Interval":
        low, high = (exact - slack).to(dtype), (exact + slack).to(dtype)
        value = exact.to(dtype)
        return cls(value, torch.where(low.isnan(), value, low), torch.where(high.isnan(), value, high), exact)

    def at(self, where: Tensor) -> "Interval":
        """That of the entries where `where` is True."""
        return Interval(self.value[where], self.low[where], self.high[where], self.exact[where])

    def slack(self) -> Tensor:
        """The distance from the value to the farther end; 0 where both are infinite."""
        value = self.value.double()
        return torch.maximum(self.high.double() - value, value - self.low.double()).nan_to_num(0.0)

    def put(self, where: Tensor, what: Tensor | float) -> None:
        """Exactly `what`, where `where` is True."""
        if not where.any():  # as mostly; three passes cost more than a look
            return
        for name in ("value", "low", "high"):
            setattr(
                self,
                name,
                torch.where(where, torch.as_tensor(what, dtype=self.value.dtype), getattr(self, name)),
            )

    def hold(self, where: Tensor, other: "Interval") -> None:
        """The other interval, where `where` is True."""
        if not where.any():
            return
        for name in ("value", "low", "high", "exact"):
            setattr(self, name, torch.where(where, getattr(other, name), getattr(self, name)))

    def allows(self, live: Tensor) -> Tensor:
        """Whether each live value lies in the interval; a NaN allows a NaN."""
        return (
            ((live >= self.low) & (live <= self.high))
            | (live == self.value)
            | (live.isnan() & self.value.isnan())
        )

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest magnitude in the interval."""
        low, high = self.low.abs(), self.high.abs()
        straddles = (self.low < 0) & (self.high > 0)
        return torch.where(straddles, 0.0, torch.minimum(low, high)), torch.maximum(low, high)


def ulp(x: Tensor) -> Tensor:
    """The distance between neighbours of x in its type, as float64."""
    info = torch.finfo(x.dtype)
    x = x.double().abs().nan_to_num(0.0, posinf=0.0).clamp(min=info.smallest_normal)
    return torch.exp2(torch.frexp(x).exponent.double() - 1) * info.eps


def roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def variants(
    inputs: dict[str, Tensor], slack: dict[str, Tensor], u: float, two_sided: bool
) -> dict[str, Tensor]:
    """Each input stacked: first as it is, then once for every input that is off, with that one off."""
    signs = (1.0, -1.0) if two_sided else (1.0,)
    stacked = {name: [x] for name, x in inputs.items()}
    for off, exact in inputs.items():
        amount = ROUNDINGS * u * exact.abs() + (slack[off].double() if off in slack else 0.0)
        outward = torch.where(exact < 0, -amount, amount)
        for sign in signs:
            for name, x in inputs.items():
                stacked[name].append(x + sign * outward if name == off else x)
    return {name: torch.stack(rows) for name, rows in stacked.items()}


def spread(rows: Tensor, old: Tensor, u: float, sides: int) -> tuple[Tensor, Tensor]:
    """(result, allowance) from the results of `variants`; old: the input of the same stream."""
    exact, others = rows[0], rows[1:]
    changes = (others - exact).abs().reshape(-1, sides, exact.numel()).amax(1).sum(0)
    return exact, changes + ROUNDINGS * u * torch.maximum(exact.abs(), old.abs())


def update(kind, options: dict, entry, g: Tensor, u: float) -> tuple[dict[str, tuple[Tensor, Tensor]], dict]:
    """({stream: (result, allowance)}, counters) of the recipe's rule on a shadow's entry; streams: p and moments.

    g: the gradient after unscale, mask and clip; float64, flat. Every rule works element by element, so
    the variants are stacked and all go through one torch.optim step.
    """
    jumps = kind is recipe.Lion or (options.get("l1") and not recipe.is_decoupled(kind, options))
    two_sided = bool(jumps)  # sign() jumps to either side; where nothing jumps, one side tells enough
    pieces, counters = [], {}
    for start in range(0, max(g.numel(), 1), CHUNK):
        cut = slice(start, start + CHUNK)
        inputs = {"p": entry.p[cut].double(), "grad": g[cut]}
        inputs |= {name: moment[cut].double() for name, moment in entry.moments.items()}
        slack = {name: s[cut] for name, s in entry.slack.items() if name in inputs}
        v = variants(inputs, slack, u, two_sided)
        moments = {name: v[name] for name in entry.moments}
        p, made, counters = recipe.rule(kind, options, v["p"], v["grad"], moments, entry.counters)
        results = {"p": p} | made
        pieces.append({k: spread(x, inputs.get(k, x[0]), u, 1 + two_sided) for k, x in results.items()})
    return {
        k: tuple(torch.cat([piece[k][i] for piece in pieces]) for i in (0, 1)) for k in pieces[0]
    }, counters


# ---- pruning: decisions, so they are judged on the live weights and not compared with the copy's own -----


def threshold_mismatches(new: Interval, threshold: float, u_dtype: torch.dtype, before, after, frozen) -> int:
    """Entries that a threshold should have pruned and did not, or the reverse. Undecided ones pass.

    new: the weights before zeroing. before, after, frozen: flat boolean masks.
    """
    least, greatest = new.magnitudes()
    edge = float(torch.tensor(threshold, dtype=u_dtype))
    must = before | ((greatest.double() < edge) & ~frozen)
    may = before | ((least.double() < edge) & ~frozen)
    return int(((must & ~after) | (after & ~may)).sum())


@dataclass
class Candidate:
    """What the selection saw of one parameter; flat."""

    least: Tensor  # bounds of |p| before zeroing, as the fp32 values that are ranked
    greatest: Tensor
    exact: Tensor  # the recipe's own |p|, in float64
    old: Tensor  # |p| before the step
    before: Tensor  # pruned before, pruned after, frozen
    after: Tensor
    frozen: Tensor


def selection_mismatches(candidates: list[Candidate], sparsity: float, ties: bool) -> tuple[int, int]:
    """(entries wrongly chosen, how far the count is off) of a selection over these parameters together.

    A choice is wrong if an entry that was kept is smaller, or equal and earlier. "Smaller" must hold
    whatever the roundings were. ties: also judge entries that are equal in float64 before and after.
    """
    c = {name: torch.cat([getattr(one, name) for one in candidates]) for name in Candidate.__annotations__}
    chosen, kept = c["after"] & ~c["before"], ~c["after"] & ~c["frozen"]
    wrong = chosen & c["frozen"]
    order = torch.arange(chosen.numel(), device=chosen.device)
    if bool(kept.any()):
        cut = c["greatest"][kept].min()
        at_cut = kept & (c["greatest"] == cut) & (c["least"] == cut)
        first = order[at_cut].min() if bool(at_cut.any()) else chosen.numel()
        certain = c["least"] == c["greatest"]
        wrong |= chosen & ((c["least"] > cut) | (certain & (c["least"] == cut) & (order > first)))
        if ties and bool(chosen.any()):
            wrong |= chosen & _after_a_kept_equal(c, chosen, kept, order)
    n = chosen.numel()
    targets = [round(sparsity * n * (1 + off)) for off in (-1e-12, 1e-12)]
    free = int((c["before"]).sum())
    off_by = min(abs(int(c["after"].sum()) - max(target, free)) for target in targets)
    return int(wrong.sum() + (c["before"] & ~c["after"]).sum()), off_by


def _after_a_kept_equal(c: dict[str, Tensor], chosen: Tensor, kept: Tensor, order: Tensor) -> Tensor:
    """Entries equal to the greatest chosen one and later than a kept entry that is equal too.

    Equal means the same |p| before the step and after it, in float64: then the inputs were the same.
    """
    at = torch.where(chosen, c["exact"], -1.0).argmax()
    same = (c["exact"] == c["exact"][at]) & (c["old"] == c["old"][at])
    first = order[same & kept].min() if bool((same & kept).any()) else order.numel()
    return same & (order > first)
