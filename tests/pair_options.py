"""The options of the table of pairs: how each is switched on, and what must hold of it after every step.

An invariant gets a `pairs.Run` after a step. Most hold the run to a twin: the same step without the option,
and the option's work done by hand around it.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import BF16, F32, assert_close, assert_same_bits, assert_same_state, bits, element_mask
from pairs import (
    CLIP,
    LIMITS,
    SCALE,
    THRESHOLD,
    Run,
    Setup,
    frozen,
    gradient,
    has_value,
    in_order,
    kept,
    pruned,
    selects,
)
from recipe import fma
from torch import Tensor

import fuseopt
from fuseopt import EMA, Prune
from fuseopt.stages import mask as masks

OPTIONS: dict[str, tuple[Callable, Callable]] = {}


def option(name: str):
    """Register a class with `on(setup)` and `holds(run)` under the name that the table gives the option."""

    def register(cls):
        OPTIONS[name] = cls
        return cls

    return register


# ---- masks --------------------------------------------------------------------------------------------


def free(p: Tensor) -> Tensor:
    """What no mask of these tests takes: half of every group of four along the columns, and every other row."""
    rows = torch.arange(p.shape[0])[:, None] % 2 == 1
    return rows | (torch.arange(p.shape[1]) % 2 == 0) if p.dim() == 2 else torch.zeros(p.shape, dtype=torch.bool)


def fixed_mask(mode: str) -> Callable:
    """An element mask on each parameter, but a column mask on the second and a row mask on the last.

    n:m pruning needs free entries in each group, and so has no row mask.
    """

    def set_mask(opt, k, p):
        n_m = any(group["prune"] and group["prune"].get("pattern", "") == "2:4" for group in opt.param_groups)
        keep = element_mask(p, k) | free(p)
        if k == 1:
            keep = torch.arange(p.shape[1]) % 2 == 0
        if k == 3 and not n_m:
            keep = torch.arange(p.shape[0])[:, None] % 3 != 0
        opt.mask(p, keep, mode=mode)

    return set_mask


@option("mask freeze")
class Freeze:
    @staticmethod
    def on(setup: Setup) -> None:
        setup.masks["mask freeze"] = fixed_mask("freeze")

    @staticmethod
    def holds(run: Run) -> None:
        """Frozen entries keep their bits: parameter, moments, averages."""
        seen = 0
        for k, old, p, new, q in run.each():
            held = frozen(new, q)
            seen += int(held.sum())
            assert_same_bits(q.detach()[held], p.detach()[held], f"step {run.t} parameter {k}")
            for key in run.slots():
                before = old[key][held] if key in old else torch.zeros_like(q)[held]
                assert_same_bits(new[key][held], before, f"step {run.t} parameter {k} {key}")
            for key in (key for key in new if key.startswith("ema_") and has_value(new, key)):
                before = old[key] if has_value(old, key) else q.detach().to(new[key].dtype)
                before = torch.where(pruned(new, q), 0.0, before)
                assert_same_bits(new[key][held], before[held], f"step {run.t} parameter {k} {key}")
        assert seen, "nothing is frozen"


@option("mask grad")
class GradMask:
    @staticmethod
    def on(setup: Setup) -> None:
        setup.masks["mask grad"] = fixed_mask("grad")

    @staticmethod
    def holds(run: Run) -> None:
        """As p.grad[~keep] = 0 before a step without a mask."""

        def drop_masks(opt, params):
            for k in places:
                for key in masks.STATE_KEYS:
                    del opt.state[params[k]][key]

        places, grads = run.setup.masked_by("mask grad"), list(run.grads)
        for k in places:
            grads[k] = torch.where(kept(run.opt.state[run.params[k]], run.params[k]), grads[k], 0.0)
        same(run, run.twin(grads, prepare=drop_masks))


@option("dynamic mask")
class Dynamic:
    """The larger half of the gradients is trained; chosen anew at steps 1, 3 and 5."""

    every = 2

    @staticmethod
    def keep(p: Tensor, grad: Tensor) -> Tensor:
        size = grad.double().abs()
        return (size > size.flatten().median()) | free(p)

    @classmethod
    def on(cls, setup: Setup) -> None:
        def set_mask(opt, k, p):
            opt.mask(p, fn=lambda p, grad, state: cls.keep(p, grad), every=cls.every)

        setup.masks["dynamic mask"] = set_mask

    @classmethod
    def holds(cls, run: Run) -> None:
        """The mask is that of the last due step's gradient, and what it freezes is frozen."""
        due = run.t - (run.t - 1) % cls.every
        for k in run.setup.masked_by("dynamic mask"):
            p, state = run.params[k], run.opt.state[run.params[k]]
            assert torch.equal(kept(state, p), cls.keep(p, gradient(p, k, due))), f"step {run.t} parameter {k}"
            assert state["mask_freeze"]
        Freeze.holds(run)


# ---- pruning ------------------------------------------------------------------------------------------


def ranked(weights: list[Tensor], may: list[Tensor], count: int) -> list[Tensor]:
    """The `count` smallest of the entries that may be chosen, by (|w| as fp32, parameter, row-major index)."""
    size = torch.cat([w.detach().float().abs().flatten() for w in weights])
    order = torch.sort(torch.where(torch.cat([m.flatten() for m in may]), size, math.inf), stable=True).indices
    chosen = torch.zeros(len(size), dtype=torch.bool)
    chosen[order[:count]] = True
    return [c.reshape(w.shape) for c, w in zip(chosen.split([w.numel() for w in weights]), weights, strict=True)]


def share(prune: dict, t: int) -> float:
    """The sparsity at step t of the cubic schedule."""
    end = prune["begin"] if prune["end"] is None else prune["end"]
    x = 1.0 if end == prune["begin"] else (t - prune["begin"]) / (end - prune["begin"])
    return prune["sparsity"] * (1 - (1 - x) ** 3)


def chosen_elements(prune, t, weights, gone, held) -> list[Tensor]:
    count = round(share(prune, t) * sum(w.numel() for w in weights)) - sum(int(g.sum()) for g in gone)
    new = ranked(weights, [~g & ~h for g, h in zip(gone, held, strict=True)], max(0, count))
    return [g | c for g, c in zip(gone, new, strict=True)]


def chosen_rows(prune, t, weights, gone, held) -> list[Tensor]:
    done = [g.all(1) for g in gone]
    count = round(share(prune, t) * sum(len(w) for w in weights)) - sum(int(d.sum()) for d in done)
    norms = [w.detach().double().square().sum(1) for w in weights]
    place = {(a, row): (float(norms[a][row]), a, row) for a, w in enumerate(weights) for row in range(len(w))}
    may = [at for at in place if not done[at[0]][at[1]] and not held[at[0]][at[1]].any()]
    out = [g.clone() for g in gone]
    for a, row in sorted(may, key=place.__getitem__)[: max(0, count)]:
        out[a][row] = True
    return out


def chosen_n_m(prune, t, weights, gone, held) -> list[Tensor]:
    n, m = map(int, prune["pattern"].split(":"))
    out = []
    for w, g, h in zip(weights, gone, held, strict=True):
        rows, columns = w.shape
        pad = -columns % m
        size = torch.nn.functional.pad(w.detach().float().abs(), (0, pad), value=-2.0)  # padding goes first
        size = torch.where(torch.nn.functional.pad(g, (0, pad)), -1.0, size)
        size = torch.where(torch.nn.functional.pad(h & ~g, (0, pad)), math.inf, size)
        size = size.view(rows, -1, m)
        order = torch.sort(size, dim=2, descending=True, stable=True).indices  # the lower index first on ties
        cut = torch.zeros(size.shape, dtype=torch.bool).scatter_(2, order[..., n:], True)
        out.append(g | (cut.view(rows, -1)[:, :columns] & ~h))
    return out


def choose(prune: dict) -> Callable:
    pattern = prune.get("pattern", "unstructured")
    return {"unstructured": chosen_elements, "rows": chosen_rows}.get(pattern, chosen_n_m)


def pruning_holds(run: Run) -> None:
    """Pruned is what a plain ranking of the updated weights chooses; the rest is what the update gave; exact zeros."""
    dense = run.dense()
    told = {k: pruned(new, q) for k, _, _, new, q in run.each(dense)}
    for prune in {id(g["prune"]): g["prune"] for g in run.opt.param_groups if g["prune"]}.values():
        wide = [k for k, p in enumerate(run.params) if p.dim() >= 2 and run.prune_of(k) is prune]
        weights = [in_order(dense)[k] for k in wide]
        gone = [told[k] for k in wide]
        held = [frozen(run.opt.state[run.params[k]], run.params[k]) for k in wide]
        if selects(prune, run.t):
            gone = choose(prune)(prune, run.t, weights, gone, held)
        if prune["threshold"] is not None and run.t >= prune["begin"]:
            gone = [
                g | ((w.float().abs() < prune["threshold"]) & ~h) for g, w, h in zip(gone, weights, held, strict=True)
            ]
        told.update(zip(wide, gone, strict=True))
        if run.t >= (prune["end"] or prune["begin"]):
            assert sum(int(g.sum()) for g in gone) > 0, "nothing was pruned"
    for (k, _, _, new, q), w in zip(run.each(), in_order(dense), strict=True):
        assert torch.equal(pruned(new, q), told[k]), f"step {run.t} parameter {k}: other entries are pruned"
        assert_same_bits(q, torch.where(told[k], 0.0, w), f"step {run.t} parameter {k}")
        for key in (*run.slots(), *(key for key in new if key.startswith("ema_") and has_value(new, key))):
            assert not bits(new[key])[told[k]].any(), f"step {run.t} parameter {k}: {key} is not 0 where pruned"


class Pruning:
    """A kind of pruning: the option that switches it on. A second one in a setup takes every second parameter."""

    options: Prune

    @classmethod
    def on(cls, setup: Setup) -> None:
        setup.prunes.append(cls.options)

    @staticmethod
    def holds(run: Run) -> None:
        pruning_holds(run)


@option("prune sparsity")
class Sparsity(Pruning):
    options = Prune(0.47, **LIMITS)  # 8948.8 and 10227.2 of the weights: both are rounded


@option("prune threshold")
class Threshold(Pruning):
    @staticmethod
    def on(setup: Setup) -> None:
        setup.prunes.append(Prune(threshold=THRESHOLD[setup.dtype], begin=2))


@option("prune n:m")
class GroupsOfM(Pruning):
    options = Prune(pattern="2:4", begin=2)


@option("prune rows")
class Rows(Pruning):
    options = Prune(0.3, pattern="rows", **LIMITS)


@option("regrow")
class Regrow:
    """The pruning of the pair selects anew at each of its steps; a sparsity where the other option prunes nothing."""

    @staticmethod
    def on(setup: Setup) -> None:
        one = setup.prunes.pop() if setup.prunes else Sparsity.options
        setup.prunes.append(replace(one, regrow=True, **LIMITS))
        setup.spread, setup.jump = 0.1, LIMITS["end"]  # so that one update from 0 can reach the size of the others

    @staticmethod
    def holds(run: Run) -> None:
        pruning_holds(run)
        if run.t == LIMITS["end"] and run.opt.param_groups[0]["prune"]["pattern"] != "rows":  # see pair_statements.py
            back = [pruned(old, p) & ~pruned(new, q) for _, old, p, new, q in run.each()]
            assert any(b.any() for b in back), "no entry came back"


# ---- averages -----------------------------------------------------------------------------------------


class Average:
    """An average: its option, and its formula written anew."""

    options: EMA

    @classmethod
    def on(cls, setup: Setup) -> None:
        setup.averages.append(cls.options)

    @staticmethod
    def update(t: int) -> int:
        """The number of the update at step t, from 1; 0 where none is due."""
        return t

    @staticmethod
    def weight(u: int) -> float:
        raise NotImplementedError

    @classmethod
    def holds(cls, run: Run) -> None:
        key, u = f"ema_{run.setup.averages.index(cls.options)}", cls.update(run.t)
        for k, old, _, new, q in run.each():
            at = f"step {run.t} parameter {k} {key}"
            if not u:
                expected = old.get(key)
            elif u == 1:
                expected = q.detach().to(new[key].dtype)
            else:
                e = old[key].float()
                expected = fma(cls.weight(u), q.detach().float() - e, e).to(new[key].dtype)
                expected = torch.where(frozen(new, q), old[key], expected)
            if expected is None or not has_value({key: expected}, key):
                assert not has_value(new, key), f"{at}: an average before its first update"
                continue
            assert_same_bits(new[key], torch.where(pruned(new, q), 0.0, expected), at)


@option("EMA")
class Plain(Average):
    options = EMA(0.9, warmup="timm")

    @staticmethod
    def weight(u: int) -> float:
        return 1 - min(0.9, 1 - u ** (-2 / 3))


@option("EMA start, every")
class Late(Average):
    options = EMA(0.75, warmup="diffusers", start=1, every=2)

    @staticmethod
    def update(t: int) -> int:
        return (t - 1) // 2 if t > 1 and t % 2 else 0

    @staticmethod
    def weight(u: int) -> float:
        return 1 - min(0.75, u / (9 + u))


@option("EMA dtype")
class Short(Average):
    """On bf16 parameters: in fp32 ones there is no difference."""

    options = EMA(0.5, dtype="parameter")

    @classmethod
    def on(cls, setup: Setup) -> None:
        setup.dtype = BF16
        super().on(setup)

    @staticmethod
    def weight(u: int) -> float:
        return 0.5

    @classmethod
    def holds(cls, run: Run) -> None:
        super().holds(run)
        key = f"ema_{run.setup.averages.index(cls.options)}"
        assert all(run.opt.state[p][key].dtype == BF16 == p.dtype for p in run.params)


# ---- arithmetic ---------------------------------------------------------------------------------------


def same(run: Run, twin) -> None:
    """The run's parameters, moments and averages have a twin's bits (-0.0 counts as 0.0)."""
    for (k, _, _, new, q), (_, _, _, other, r) in zip(run.each(), run.each(twin), strict=True):
        assert torch.equal(q, r), f"step {run.t} parameter {k}: {(q != r).sum()} entries differ"
        for key in (*run.slots(), *(key for key in new if key.startswith("ema_") and has_value(new, key))):
            assert torch.equal(new[key], other[key]), f"step {run.t} parameter {k} {key}"


def moved(run: Run, twin) -> list:
    """(state, parameter before, state after, twin's, parameter, twin's, entries that the step may move and both keep)."""
    out = []
    for (_, old, p, new, q), (_, _, _, other, r) in zip(run.each(), run.each(twin), strict=True):
        out.append((old, p, new, other, q, r, ~(frozen(new, q) | pruned(new, q) | pruned(other, r))))
    return out


def added(run: Run, twin, expected: Callable) -> None:
    """The first moment is that of a twin without `expected(p)` added to its gradient."""
    share = {fuseopt.SGD: 1.0 if run.t == 1 else 1 - run.options.get("dampening", 0)}
    c = share.get(run.cls, 1 - run.options.get("betas", (0, 0))[0])
    for _, p, new, other, _, _, may in moved(run, twin):
        difference = (new[run.slots()[0]].double() - other[run.slots()[0]].double())[may]
        assert_close(difference, c * expected(p.detach().double())[may], WITHIN[run.setup.dtype], f"step {run.t}")


# Absolute, of the difference of two numbers that were stored rounded: up to 16 in fp32, up to 8 in bf16.
WITHIN = {F32: (0.0, 16 * 2**-23), BF16: (0.0, 8 * 2**-8)}


def decoupled(run: Run) -> bool:
    return run.cls is fuseopt.AdamW or bool(run.options.get("decoupled_weight_decay"))


def norm(run: Run) -> float:
    """The norm of the unscaled gradient over the entries that the step may change."""
    total = 0.0
    for k, old, p, new, q in run.each():
        may = kept(new, q) & ~(pruned(old, p) if not lifts(run, k) else pruned(old, p) & frozen(new, q))
        total += float(run.grads[k].double()[may].square().sum())
    return math.sqrt(total)


def lifts(run: Run, k: int) -> bool:
    """Whether this step lets the pruned entries of a parameter move."""
    prune = run.prune_of(k)
    return bool(prune and prune.get("regrow") and selects(prune, run.t))


@option("clip")
class Clip:
    @staticmethod
    def on(setup: Setup) -> None:
        setup.options["max_grad_norm"] = CLIP

    @staticmethod
    def holds(run: Run) -> None:
        """As a step without clipping on gradients scaled by min(1, max / (norm + 1e-6))."""
        factor = torch.tensor(CLIP / (norm(run) + 1e-6))
        assert 0.1 < factor < 0.9
        twin = run.twin([g.float() * factor for g in run.grads], max_grad_norm=None)
        if run.setup.dtype is F32:
            same(run, twin)
        for _, _, new, other, _, _, may in moved(run, twin):
            key = run.slots()[0]
            assert_close(new[key][may], other[key][may], (2**-6, 2**-6), f"step {run.t}")


@option("weight decay")
class Decay:
    @staticmethod
    def on(setup: Setup) -> None:
        setup.options["weight_decay"] = 0.2

    @staticmethod
    def holds(run: Run) -> None:
        """Decoupled, the weight goes down by lr*wd*p; coupled, the gradient goes up by wd*p."""
        twin = run.twin(weight_decay=0.0)
        if not decoupled(run):
            return added(run, twin, lambda p: 0.2 * p)
        for _, p, _, _, q, r, may in moved(run, twin):
            may = may & (q * r > 0)  # a soft threshold has not cut either off
            drop = (r.detach().double() - q.detach().double())[may]
            expected = run.opt.param_groups[0]["lr"] * 0.2 * p.detach().double()[may]
            assert_close(drop, expected, WITHIN[run.setup.dtype], f"step {run.t}")


@option("l1")
class L1:
    @staticmethod
    def on(setup: Setup) -> None:
        setup.options["l1"] = 0.3

    @staticmethod
    def holds(run: Run) -> None:
        """Decoupled, a soft threshold of lr*l1; coupled, l1*sign(p) on the gradient."""
        twin = run.twin(l1=0.0)
        if not decoupled(run):
            return added(run, twin, lambda p: 0.3 * p.sign())
        for _, _, _, _, q, r, may in moved(run, twin):
            shrunk = (r.detach().float().abs() - torch.tensor(run.opt.param_groups[0]["lr"] * 0.3)).clamp(
                min=0
            ) * r.sign()
            bound = (0.0, 0.0) if run.setup.dtype is F32 else (2**-7, 4e-4)
            assert_close(q[may], shrunk[may], bound, f"step {run.t}")


@option("maximize")
class Maximize:
    @staticmethod
    def on(setup: Setup) -> None:
        setup.options["maximize"] = True

    @staticmethod
    def holds(run: Run) -> None:
        """As minimising on the negative gradient."""
        same(run, run.twin([-g for g in run.grads], maximize=False))


@option("loss scaling")
class Scaling:
    @staticmethod
    def on(setup: Setup) -> None:
        setup.scale, setup.skip = SCALE, 3

    @staticmethod
    def holds(run: Run) -> None:
        """As a step without a scale; `Run.skipped` has seen that a skipped one changes nothing."""
        same(run, run.twin(scale=1.0))


@option("statistics")
class Statistics:
    @staticmethod
    def on(setup: Setup) -> None:
        setup.options["statistics"] = True

    @staticmethod
    def holds(run: Run) -> None:
        """The sums, by hand; of the pass before the selection where the step selects."""
        select = any(group["prune"] and selects(group["prune"], run.t) for group in run.opt.param_groups)
        rows = list(run.each(run.dense() if select else None))
        found = run.opt.statistics()
        total = {"param_norm": 0.0, "update_norm": 0.0}
        for _, _, p, _, q in rows:
            total["param_norm"] += float(q.detach().double().square().sum())
            total["update_norm"] += float((q.detach().double() - p.detach().double()).square().sum())
        assert found["grad_norm"] == pytest.approx(norm(run), rel=1e-6)
        for key, value in total.items():
            assert found[key] == pytest.approx(math.sqrt(value), rel=1e-6), key
        assert found["zeros"] == sum(int((q == 0).sum()) for *_, q in rows) and found["nonfinite"] == 0


@option("save, load")
class Save:
    @staticmethod
    def on(setup: Setup) -> None:
        setup.save = 3

    @staticmethod
    def holds(run: Run) -> None:
        """The run that was saved and loaded goes on bit for bit as the one that was not."""
        if run.t > run.setup.save:
            assert_same_state(run.opt, run.resumed)
