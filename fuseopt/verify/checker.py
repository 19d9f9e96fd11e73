"""The hooks: what is copied before a step, and compared after it."""

from typing import Any, cast

import torch
from torch import Tensor

from ..distributed import is_dtensor
from . import judge, recipe
from .entry import Entry
from .live import StepFacts, differ, flat, live_streams
from .report import Report, Tally
from .shadow import Shadow


def kind_of(opt: Any) -> type:
    """The class of the recipe that stands for an optimizer. Raises TypeError if there is none."""
    if type(opt).__name__ == "Lion" and hasattr(opt, "prune_mask"):
        return recipe.Lion
    for kind in recipe.MOMENTS:  # AdamW comes before Adam, its base
        if isinstance(opt, kind):
            return kind
    known = ", ".join(kind.__name__ for kind in recipe.MOMENTS)
    raise TypeError(
        f"verify knows no recipe for {type(opt).__name__}; it checks {known} of fuseopt and torch.optim"
    )


def attach(opt: torch.optim.Optimizer, every: int = 1) -> "Checker":
    """Check every step of `opt` from now on against torch.optim and separate passes, in float64.

    Args:
        opt: an optimizer of fuseopt, on any backend, or torch.optim's AdamW, Adam, SGD, NAdam or Adagrad.
        every: check each `every`-th step from the live state. The copy that follows the whole trajectory
            takes every step all the same.

    Nothing of `opt` is changed; its weights, its state and a few passes over them are the cost. Raises
    TypeError for an optimizer without a recipe, ValueError for every < 1 or parameters that processes share.
    """
    return Checker(opt, every)


class Checker:
    """Made by `attach`. report() at any time; detach() ends it."""

    def __init__(self, opt: torch.optim.Optimizer, every: int) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"Invalid every: {every!r}; give a whole number of steps, at least 1")
        if opt.defaults.get("sharded") or any(is_dtensor(p) for group in opt.param_groups for p in group["params"]):
            raise ValueError("verify cannot check parameters that processes share; attach it in a run of one process")
        self.opt: Any = opt  # one of fuseopt's has more than torch's
        self.every, self.kind = every, kind_of(opt)
        self._tally = Tally()
        self._notes: list[str] = []
        self._seen = self._steps = self._trajectory_steps = self._skipped = 0
        self._trajectory = Shadow("trajectory", self._tally)
        self._single: Shadow | None = None
        self._before: dict[str, Any] = {}
        self._t = self._live_t()
        self._hooks = [
            opt.register_step_pre_hook(self._pre),
            opt.register_step_post_hook(self._post),
            opt.register_load_state_dict_post_hook(self._loaded),
        ]

    def report(self) -> Report:
        """What was found so far."""
        notes = [f"{self._skipped} steps were skipped by found_inf"] if self._skipped else []
        return Report(self._tally, self._steps, self._trajectory_steps, self._notes + notes)

    def detach(self) -> None:
        """Stop checking; report() still tells what was found."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._single, self._trajectory = [], None, Shadow("trajectory", self._tally)

    # ---- the hooks ------------------------------------------------------------------------------

    @torch.no_grad()
    def _pre(self, opt: Any, args: Any, kwargs: Any) -> None:
        params = [p for group in opt.param_groups for p in group["params"]]
        entries = self._trajectory.entries
        for p in params:
            if p.is_complex() or p.layout != torch.strided:
                raise ValueError(
                    f"verify compares dense real parameters; one of shape {tuple(p.shape)} is {p.dtype}"
                )
            if p in entries and entries[p].written_to(p):
                self._note(
                    f"parameters were written to before step {self._t + 1}: their trajectory restarts there"
                )
                del entries[p]
            if p not in entries:
                entries[p] = Entry.of(opt, self.kind, p)
        self._single = None
        if self._seen % self.every == 0:
            self._single = Shadow("step", self._tally)
            self._single.entries = {p: Entry.of(opt, self.kind, p) for p in params}
        scale, found_inf = getattr(opt, "grad_scale", None), getattr(opt, "found_inf", None)
        self._before = {
            "options": [recipe.options_of(opt, group) for group in opt.param_groups],
            "grad_scale": 1.0 if scale is None else float(scale),
            "skipped": found_inf is not None and float(found_inf) != 0,
            # torch's fused step leaves unscaled gradients behind; otherwise they are read after the step,
            # when a closure has made them.
            "grads": self._gradients(clone=True)
            if scale is not None and not hasattr(opt, "prune_mask")
            else None,
        }

    @torch.no_grad()
    def _post(self, opt: Any, args: Any, kwargs: Any) -> None:
        single, self._single, before = self._single, None, self._before
        self._seen += 1
        if single is not None:
            self._steps += 1
        if before["skipped"]:
            self._skipped += 1
            self._check_skipped(single)
            return
        self._t += 1
        self._trajectory_steps += 1
        grads = self._gradients() if before["grads"] is None else before["grads"]
        facts = StepFacts(opt, self.kind, self._t, before["options"], grads, before["grad_scale"])
        masks = {p: entry.pruned for p, entry in self._trajectory.entries.items()}
        free = facts.free_gradients(masks)
        facts.total_norm = recipe.total_norm(free)
        if single is not None:
            single.step(facts)
            self._check_statistics(facts, free)
        self._trajectory.step(facts)
        self._check_t()

    def _loaded(self, opt: Any) -> None:
        self._note(f"a state was loaded after step {self._t}: the trajectory restarts there")
        self._trajectory.entries = {}
        self._t = self._live_t()

    # ---- what they need -------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def _live_t(self) -> int:
        return max((group.get("steps", 0) for group in self.opt.param_groups), default=0)

    def _check_t(self) -> None:
        """The step count of the schedules, against our own."""
        if any("steps" in group for group in self.opt.param_groups):
            off = sum(group["steps"] != self._t for group in self.opt.param_groups)
            self._tally.count("trajectory", "all groups", "counters", self._t, off)

    def _gradients(self, clone: bool = False) -> dict[Tensor, Tensor]:
        params = [p for group in self.opt.param_groups for p in group["params"] if p.grad is not None]
        dense = {p: p.grad.to_dense() if p.grad.is_sparse else p.grad for p in params}
        return {p: g.detach().clone() if clone else g.detach() for p, g in dense.items()}

    def _check_skipped(self, single: Shadow | None) -> None:
        """After a skipped step everything must be as it was."""
        self._check_t()
        for p, entry in single.entries.items() if single is not None else ():
            live = live_streams(self.opt, self.kind, p)
            now = {"p": flat(p)} | live["moments"] | live["emas"] | live["counters"]
            was = entry.streams() | entry.counters
            moved = sum(int(differ(now[key], x).sum()) if key in now else x.numel() for key, x in was.items())
            self._tally.count("step", "all parameters", "skipped", self._t, moved)

    def _check_statistics(self, facts: StepFacts, free: list[Tensor]) -> None:
        """opt.statistics() against sums of its own."""
        if not facts.weights:
            return
        total = {name: sum(one[name] for one in facts.weights) for name in facts.weights[0]}
        live = self.opt.statistics()
        wide = all(p.dtype == torch.float64 for p in facts.grads)
        u = judge.ROUNDINGS * judge.roundoff(torch.float64 if wide else torch.float32)
        norm = float(cast(Tensor, facts.total_norm))
        self._tally.number("all parameters", "grad_norm", facts.t, live["grad_norm"], norm, u * norm)
        for name in ("param", "update"):
            norm = total[name] ** 0.5
            bound = u * norm + (total[f"{name}_slack"] / norm if norm else 0.0)
            self._tally.number("all parameters", f"{name}_norm", facts.t, live[f"{name}_norm"], norm, bound)
        nonfinite = sum(int((~torch.isfinite(g)).sum()) for g in free)
        self._tally.count("step", "all parameters", "nonfinite", facts.t, abs(live["nonfinite"] - nonfinite))
        wrong = max(0, int(abs(live["zeros"] - total["zeros"]) - total["unsure"]))
        self._tally.count("step", "all parameters", "zeros", facts.t, wrong)
