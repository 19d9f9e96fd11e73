"""Restricting updates: `opt.mask`, and masks that are recomputed in the course of training.

Recomputing comes before the first write of a step. What it replaces in the state is put back if anything after it
raises, so that such a step changes nothing.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import Tensor

from . import cuda_memory, plan, ranking
from .base import StagedOptimizer
from .checks import find, name_of, unknown_name
from .distributed import aligned, is_dtensor, local, whole
from .masks import Ranking, new_rows, nonzero
from .schema import compute_dtype
from .stages import mask

Members = list[tuple[plan.GroupStep, Tensor]]


@dataclass(eq=False)
class Dynamic:
    """A mask recomputed by `fn` at the steps t with (t - 1) % every == 0; with every=None at the next step, once."""

    fn: Callable[..., Any] | Ranking
    every: int | None
    freezes: dict[Tensor, bool]  # by parameter: whether the mode is "freeze"

    @property
    def sums(self) -> bool:
        """Whether it adds up scores at every step."""
        return isinstance(self.fn, Ranking) and self.fn.sums

    @property
    def ranks_all(self) -> bool:
        return isinstance(self.fn, Ranking) and self.fn.ranks_all

    def is_due(self, t: int, state: dict[str, Any]) -> bool:
        """Whether the mask in a parameter's state must be recomputed at step t."""
        scheduled = self.every is None or (t - 1) % self.every == 0
        return scheduled or "mask_keep" not in state or state.get("mask_t") == 0


class MaskMethods(StagedOptimizer):
    """What FusedOptimizer says of masks."""

    def mask(
        self,
        param: Tensor | str,
        keep: Tensor | Callable[[Tensor], Tensor] | None = None,
        mode: Literal["freeze", "grad"] = "freeze",
        *,
        fn: Callable[..., Any] | Ranking | None = None,
        every: int | None = None,
    ) -> None:
        """Restrict the updates of parameters to the entries where a mask is True.

        Args:
            param: the parameter; or its name, or a shell pattern such as `"*.bias"` over the names, where the
                optimizer was given named parameters. `"*"` means all in any case.
            keep: boolean tensor that broadcasts to the parameter (to the whole of it, where processes
                share it), or a function of the parameter that returns one and is called at once, as
                fuseopt.masks.nonzero. Kept unexpanded, at 1 bit an entry. It replaces the parameter's
                earlier mask; all True removes it.
            mode: "freeze" keeps the other entries and their moments bit for bit; "grad" only zeroes
                their gradient, so that decay and momentum still move them.
            fn: instead of keep, recomputes the mask before the update of some steps: one of
                fuseopt.masks, or a function fn(param, grad, state) that returns a boolean tensor like keep;
                grad is unscaled, state is the optimizer's of this parameter.
            every: at the steps t (from 1) with (t - 1) % every == 0; None (default) at the next step
                alone. Until then a mask that is there holds; where there is none, it is computed at the
                next step. A parameter without a gradient at such a step keeps its mask.

        Ctrl-C and other signals wait until fn has returned and the step is whole.

        Checkpoints hold masks and scores but not fn: set it again, before loading or after, and the run goes on
        as if it had not stopped (without `every` there is nothing to set again). copy.deepcopy and pickle
        lose it too.

        Raises TypeError or ValueError for a mask that does not fit, with nothing changed; RuntimeError for a function
        as keep inside swap_ema(), which would look at the average.
        """
        found = matching(self, param)
        for _, name in found:
            mask.check_mode(mode, name)
        if fn is not None:
            if keep is not None:
                raise TypeError(f"mask of {', '.join(name for _, name in found)}: give either keep or fn, not both")
            check_dynamic(fn, every)
            cuda_memory.settle(self)
            plan.make_state(self)  # torch.distributed.checkpoint takes any state for a whole one
            start(self, fn, every, [p for p, _ in found], mode == "freeze")
            return
        if every is not None:
            raise TypeError(f"Invalid every: {every!r}; it goes with fn, and keep was given")
        if self._swapped and callable(keep):
            raise RuntimeError(
                "mask() by a function inside swap_ema() would look at the average; leave the block first"
            )
        masks = [(p, evaluated(keep, p, name)) for p, name in found]
        plan.make_state(self)
        stop(self, [p for p, _ in found])
        for p, values in masks:
            mask.replace(self.state[p], p, None if all_true(values) else values, mode == "freeze")

    def keep_mask(self, param: Tensor | str) -> Tensor | None:
        """Boolean tensor of the parameter's shape, False where the mask in force holds it; None without a mask.

        param: the parameter, or its name. Raises ValueError for one that the optimizer does not have.
        """
        _, p, _ = find(self, param)
        keep = mask.unfold(self.state.get(p, {}), local(p))
        return None if keep is None else whole(p, keep, set(range(p.dim())))


def matching(opt: Any, param: Tensor | str) -> list[tuple[Tensor, str]]:
    """(parameter, how messages call it) of all that `param` means. Raises ValueError if there are none.

    With sharded=True there may be: the parameter may lie on another process.
    """
    if not isinstance(param, str):
        _, p, name = find(opt, param)
        return [(p, name)]
    every = list(dict.fromkeys(p for group in opt.param_groups for p in group["params"]))
    names = {p: n for g in opt.param_groups for p, n in zip(g["params"], g.get("param_names") or (), strict=False)}
    found = [p for p in every if names.get(p) == param]
    found = found or [p for p in every if param == "*" or (p in names and fnmatchcase(names[p], param))]
    if not found and not opt.defaults["sharded"]:
        raise ValueError(unknown_name(opt, param, " or fits it as a pattern"))
    return [(p, name_of(opt, p)) for p in found]


@torch.no_grad()
def evaluated(keep: Any, p: Tensor, name: str) -> Tensor:
    """The mask that opt.mask was given, checked."""
    if isinstance(keep, Ranking) or (isinstance(keep, type) and issubclass(keep, Ranking)):
        kind = keep if isinstance(keep, type) else type(keep)
        raise TypeError(f"mask of {name}: keep is {kind.__name__}; pass fn=fuseopt.masks.{kind.__name__}(0.1)")
    if callable(keep):
        keep = keep(p)
    mask.check_keep(p.shape, keep, name)
    return keep


def all_true(keep: Tensor) -> bool:
    every = keep.all()
    return bool(every.full_tensor() if is_dtensor(every) else every)


def check_dynamic(fn: Callable[..., Any] | Ranking, every: int | None) -> None:
    """Raise TypeError or ValueError for arguments that cannot recompute a mask."""
    if isinstance(fn, type) and issubclass(fn, Ranking):
        raise TypeError(f"Invalid fn: the class {fn.__name__}; give one of it, as fuseopt.masks.{fn.__name__}(0.1)")
    if fn is nonzero or fn is new_rows:
        raise TypeError(f"Invalid fn: fuseopt.masks.{fn.__name__}; it is a function of the parameter alone, for keep=")
    if not callable(fn) and not isinstance(fn, Ranking):
        raise TypeError(f"Invalid fn: {fn!r}; give a function fn(param, grad, state) or one of fuseopt.masks")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"Invalid every: {every!r}; give a whole number of steps, at least 1, or None")


# ---- which masks are dynamic ----------------------------------------------------------------------


def start(opt: Any, fn: Callable[..., Any] | Ranking, every: int | None, params: list[Tensor], freeze: bool) -> None:
    """Have the masks of these parameters recomputed from the next step on."""
    earlier = {p: one.fn for one in opt._dynamic for p in one.freezes}
    going_on = {p for p in params if earlier.get(p, fn) == fn}  # set again: its scores, which may be loaded, count
    stop(opt, params, going_on)
    one = next((one for one in opt._dynamic if one.fn is fn and one.every == every), None)
    if one is None:
        one = Dynamic(fn, every, {})
        opt._dynamic.append(one)
    for p in params:
        one.freezes[p] = freeze
        state = opt.state[p]
        mask.into_memory_order(state, p)
        if one.sums and "mask_score" not in state:  # here already, as torch.distributed.checkpoint loads into it
            state["mask_score"] = torch.zeros_like(p, dtype=compute_dtype(p.dtype))
        if "mask_keep" in state:
            state.setdefault("mask_t", opt._steps())
        else:
            mask.replace(state, p, torch.tensor(True), freeze)
            state["mask_t"] = 0
        mask.widen(state, p)


def stop(opt: Any, params: list[Tensor], going_on: Collection[Tensor] = ()) -> None:
    """The masks of these parameters are not recomputed any more; scores are dropped, save of those going on."""
    for one in opt._dynamic:
        for p in params:
            one.freezes.pop(p, None)
    for p in params:
        if p not in going_on:
            opt.state[p].pop("mask_score", None)
            opt.state[p].pop("mask_t", None)
    # With `sharded` one that is empty here may have parameters elsewhere, and ranks with them.
    opt._dynamic[:] = [one for one in opt._dynamic if one.freezes or opt.defaults["sharded"]]


def score_bytes(opt: Any, p: Tensor) -> int:
    """What a step reads and writes to add up the scores of a parameter on this process."""
    each = [
        one.fn.reads * p.element_size() + 2 * compute_dtype(p.dtype).itemsize
        for one in opt._dynamic
        if one.sums and p in one.freezes
    ]
    return local(p).numel() * sum(each)


# ---- in a step --------------------------------------------------------------------------------------


def todo(opt: Any, step: plan.Step) -> list[tuple[Dynamic, Members, Members]]:
    """(mask, its parameters that have a gradient, those of them for which it is due), where there is work."""
    if not opt._dynamic:
        return []
    found = []
    groups = {p: gs for gs in step.groups for p in gs.group["params"] if p.grad is not None}
    for one in opt._dynamic:
        members = [(gs, p) for p, gs in groups.items() if p in one.freezes]
        due = [(gs, p) for gs, p in members if one.is_due(step.t, opt.state.get(p, {}))]
        if due or (members and one.sums) or (one.ranks_all and opt.defaults["sharded"]):
            found.append((one, members, due))
    return found


@contextmanager
def recomputed(opt: Any, step: plan.Step) -> Iterator[None]:
    """Within the block the masks are those of this step; if it raises, those from before it again."""
    work = todo(opt, step)
    touched = [p for _, members, _ in work for _, p in members]
    before = {p: dict(opt.state[p]) if p in opt.state else None for p in touched}
    try:
        plan.check_all(opt, [member for _, members, _ in work for member in members])
        with torch.no_grad():
            for one, members, due in work:
                _recompute(opt, step, one, members, due)
        yield
    except BaseException:
        for p, entries in before.items():
            own = opt.state.pop(p, {}) if entries is None else opt.state[p]
            own.clear()
            own.update(entries or {})
        raise
    for one, _, due in work:
        if one.every is None:
            for _, p in due:
                del one.freezes[p]
                opt.state[p].pop("mask_score", None)
    opt._dynamic[:] = [one for one in opt._dynamic if one.freezes or opt.defaults["sharded"]]


def _recompute(opt: Any, step: plan.Step, one: Dynamic, members: Members, due: Members) -> None:
    """Add up the scores of a mask's members, and write the masks of those that are due."""
    if isinstance(one.fn, Ranking):
        scores = _scores(opt, step, one, members if one.sums else due)
        kept = _ranked(opt, one.fn, [p for _, p in due], [scores[p] for _, p in due])
        kept = [whole(p, values, set(range(p.dim()))) for (_, p), values in zip(due, kept, strict=True)]
    else:
        kept = [one.fn(p, _unscaled(gs, p), opt.state[p]) for gs, p in due]
    for (_, p), values in zip(due, kept, strict=True):
        mask.check_keep(p.shape, values, name_of(opt, p))
        mask.replace(opt.state[p], p, values, one.freezes[p])
        mask.widen(opt.state[p], p)
        opt.state[p]["mask_t"] = step.t


def _unscaled(gs: plan.GroupStep, p: Tensor) -> Tensor:
    """The gradient as it would be without a loss scale: in the type of the arithmetic, as fp16 could not hold it."""
    scale, g = gs.stage["inv_grad_scale"], cast(Tensor, p.grad)
    return g if scale == 1 else g.to(compute_dtype(p.dtype)) * scale


def _scores(opt: Any, step: plan.Step, one: Dynamic, members: Members) -> dict[Tensor, Tensor]:
    """The score of each of these parameters on this process, and in the state where scores are added up."""
    place = {p: k for k, p in enumerate(p for group in opt.param_groups for p in group["params"])}
    scores = {}
    for gs, p in members:
        kind, here, state = compute_dtype(p.dtype), local(p).detach(), opt.state[p]
        g, factor = local(aligned(p, cast(Tensor, p.grad))).to(kind), gs.stage["inv_grad_scale"] * gs.stage["direction"]
        g = g if factor == 1 else g * factor
        score = cast(Ranking, one.fn).score(p, here.to(kind), g, step.t, place[p])
        if one.sums:
            score = score + local(state["mask_score"]) if "mask_score" in state else score
            state["mask_score"] = whole(p, score.contiguous(), set(range(p.dim())))  # a new one: see `recomputed`
        scores[p] = score
    return scores


def _ranked(opt: Any, fn: Ranking, params: list[Tensor], scores: list[Tensor]) -> list[Tensor]:
    if fn.ranks_all:
        return ranking.largest(params, scores, fn.share, opt.defaults["sharded"])
    return [ranking.largest([p], [score], fn.share, False)[0] for p, score in zip(params, scores, strict=True)]
