"""A copy of an optimizer's parameters and state that takes the same steps by the recipe."""

import torch
from torch import Tensor

from . import judge, patterns, recipe
from .entry import Entry
from .judge import Candidate, Interval
from .live import StepFacts, computes_in, differ, flat, live_pruned, live_streams
from .report import Tally


class Shadow:
    """Copies of parameters; `step` advances them and compares them with the live ones.

    single: the copies were taken just before this step and are thrown away after it.
    """

    def __init__(self, check: str, tally: Tally):
        self.check, self.tally = check, tally
        self.entries: dict[Tensor, Entry] = {}

    @property
    def single(self) -> bool:
        return self.check == "step"

    def step(self, facts: StepFacts) -> None:
        """Repeat the live optimizer's step on every copy, and compare."""
        together: list[tuple[dict, float, str, list[Candidate]]] = []
        for options, named in facts.groups():
            prune = options.get("prune")
            sparsity = recipe.sparsity_at(prune, facts.t)
            for name, p in named:
                if not p.numel():
                    continue
                candidate = self._parameter(facts, options, name, p, sparsity is not None)
                if sparsity is None or not recipe.is_prunable(p):
                    continue
                if recipe.n_of_m(prune):
                    found = patterns.n_m_mismatches(candidate, p.shape, *recipe.n_of_m(prune), ties=self.single)
                    self._count(name, facts.t, *found)
                    continue
                if prune["pattern"] == "rows":
                    candidate, broken = patterns.by_rows(candidate, p.shape)
                    self._count(name, facts.t, broken, 0)
                alike = [entry[3] for entry in together if entry[0] == prune and prune["scope"] == "global"]
                if alike:  # all groups that prune alike are ranked together
                    alike[0].append(candidate)
                else:
                    where = name if prune["scope"] == "tensor" else "all that prune alike"
                    together.append((prune, sparsity, where, [candidate]))
        for prune, sparsity, where, members in together:
            ties = self.single and prune["pattern"] != "rows"  # rows tie by sums, whose order is not ours to know
            self._count(where, facts.t, *judge.selection_mismatches(members, sparsity, ties))

    def _count(self, where: str, t: int, wrong: int, off_by: int) -> None:
        """Note entries (or rows) wrongly chosen, and how far their number is off."""
        self.tally.count(self.check, where, "prune_mask", t, wrong)
        self.tally.count(self.check, where, "prune_count", t, off_by)

    def _parameter(self, facts: StepFacts, options: dict, name: str, p: Tensor, selects: bool) -> Candidate:
        """One parameter's step, comparison and new copy. Returns what a selection sees of it."""
        entry, live = self.entries[p], live_streams(facts.opt, facts.kind, p)
        frozen, nothing = facts.frozen(p), torch.zeros_like(facts.frozen(p))
        before = facts.still_pruned(options, p, entry.pruned)
        after = live_pruned(facts.opt, p)
        after = nothing if after is None else after

        new, counters = self._results(facts, options, p, entry)
        for stream, interval in new.items():
            if stream in entry.streams():
                interval.hold(frozen, entry.interval(stream))
            else:  # a moment made in this step: frozen entries keep what torch starts moments from
                interval.put(frozen, options.get("initial_accumulator_value", 0.0))
        candidate = self._candidate(new["p"], flat(p), entry, before, after, frozen)
        if not selects:
            threshold = recipe.threshold_at(options.get("prune"), facts.t)
            threshold = threshold if p in facts.grads and recipe.is_prunable(p) else 0.0
            dtype = computes_in(facts.opt, facts.kind, p, options)
            wrong = judge.threshold_mismatches(new["p"], threshold, dtype, before, after, frozen)
            if hasattr(facts.opt, "prune_mask") and (options.get("prune") or bool(after.any())):
                self.tally.count(self.check, name, "prune_mask", facts.t, wrong)
        if self.single:
            self._exact(facts, name, p, live, before, after, frozen)
            facts.weigh(p, entry.p, new["p"], after & ~before & selects)
        gone = after & ~frozen
        for stream, interval in new.items():
            if stream == "p" or (options.get("prune") or {}).get("moments") != "keep":
                interval.put(gone, 0.0)
        self._compare(facts, options, name, p, live, new, counters, after)
        return candidate

    def _results(
        self, facts: StepFacts, options: dict, p: Tensor, entry: Entry
    ) -> tuple[dict[str, Interval], dict]:
        """({stream: interval}, counters) after stages 1 to 8; as they were, without a gradient."""
        if p not in facts.grads:
            return {stream: entry.interval(stream) for stream in ("p", *entry.moments)}, entry.counters
        g = facts.gradient(p) * recipe.clip_coefficient(options.get("max_grad_norm"), facts.total_norm)
        u = judge.roundoff(computes_in(facts.opt, facts.kind, p, options))
        exact, counters = judge.update(facts.kind, options, entry, g, u)
        return {stream: Interval.around(*pair, p.dtype) for stream, pair in exact.items()}, counters

    def _candidate(self, new: Interval, live: Tensor, entry: Entry, before, after, frozen) -> Candidate:
        """The magnitudes a selection saw: from the live state those of kept entries are known exactly."""
        least, greatest = new.magnitudes()
        if self.single:
            least, greatest = torch.where(after, least, live.abs()), torch.where(after, greatest, live.abs())
        return Candidate(
            least.float(), greatest.float(), new.exact.abs(), entry.p.abs().double(), before, after, frozen
        )

    def _exact(self, facts: StepFacts, name: str, p: Tensor, live: dict, before, after, frozen) -> None:
        """What must be so to the bit, beside the live state of just before the step."""
        entry = self.entries[p]
        now = {"p": flat(p)} | live["moments"] | live["emas"]
        was = {"p": entry.p} | entry.moments | entry.emas
        common = [stream for stream in now if stream in was]
        moved = sum(int((frozen & differ(now[k], was[k])).sum()) for k in common)
        self.tally.count(self.check, name, "frozen", facts.t, moved)
        if p not in facts.grads:
            new = after & ~before
            moved = sum(int((~new & differ(now[k], was[k])).sum()) for k in common)
            self.tally.count(self.check, name, "untouched", facts.t, moved)

    def _compare(self, facts, options, name, p, live, new, counters, after) -> None:
        """Compare every stream with the live one; make the results the new copy, but with the live pruning."""
        entry, check, tally, t = self.entries[p], self.check, self.tally, facts.t
        entry.good = tally.values(check, name, "p", t, flat(p), new["p"], entry.p)
        for key in new.keys() - {"p"}:
            if key in live["moments"]:
                old = entry.moments.get(key, new[key].value)
                tally.values(check, name, key, t, live["moments"][key], new[key], old)
            else:
                tally.count(check, name, key, t, p.numel())
        found = {key: float(value) for key, value in live["counters"].items()}
        wrong = sum(found.get(key) != float(value) for key, value in counters.items())
        tally.count(check, name, "counters", t, wrong)
        emas = self._averages(facts, options, name, p, live["emas"], new["p"], after)
        if bool(after.any()):
            zeroed = [flat(p), *live["emas"].values()]
            if options["prune"] and options["prune"]["moments"] == "zero":
                zeroed += live["moments"].values()
            gone = after & ~facts.frozen(p)
            left = sum(int((gone & differ(x, torch.zeros_like(x))).sum()) for x in zeroed)
            tally.count(check, name, "pruned", t, left)
        if not self.single:
            entry.renew(new, emas, counters, after)

    def _averages(
        self, facts, options, name, p, live: dict, new_p: Interval, after
    ) -> dict[str, Interval]:
        """Compare the averages. From the live state they follow the live weight, else the copy's own."""
        entry, out = self.entries[p], {}
        source = Interval(*[flat(p)] * 3, flat(p).double()) if self.single else new_p
        for k, average in enumerate(options.get("ema", ()) if p in facts.grads else ()):
            key, number = f"ema_{k}", recipe.ema_update(average, facts.t)
            if number is None:
                continue
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            kept = p.dtype if average["dtype"] == "parameter" else wide
            out[key] = entry.averaged(key, source, 1 - recipe.ema_decay(average, number), kept, wide)
            if key in entry.emas:
                out[key].hold(facts.frozen(p), entry.interval(key))
        for key in entry.emas.keys() - out.keys():
            out[key] = entry.interval(key)
        for key, interval in out.items():
            interval.put(after, 0.0)
            if key in live:
                old = entry.emas.get(key, interval.value)
                self.tally.values(self.check, name, key, facts.t, live[key], interval, old)
            else:
                self.tally.count(self.check, name, key, facts.t, p.numel())
        return out
