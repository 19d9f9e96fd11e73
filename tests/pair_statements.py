"""What the numbered sentences below the table of pairs say, each shown on a small case.

A function is registered under the sentence, word for word, and is called for each pair whose cell has its number.
"""

import io
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import BF16, F32, Snapshot, assert_same_bits, like
from pair_options import OPTIONS
from torch import Tensor
from torch.nn import Parameter

import fuseopt
from fuseopt import Prune
from fuseopt.stages import mask as masks

STATEMENTS: dict[str, Callable] = {}
RULES = (
    lambda groups, **more: fuseopt.AdamW(groups, **{"lr": 0.01, "weight_decay": 0.1, **more}),
    lambda groups, **more: fuseopt.SGD(
        groups, **{"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, **more}
    ),
)
EVEN = torch.arange(8) % 2 == 0  # columns that the masks here keep


def says(*sentences: str) -> Callable:
    """Register a function of a pair under the sentences that it shows."""

    def register(function):
        for sentence in sentences:
            STATEMENTS[sentence] = function
        return function

    return register


# ---- a small case: one parameter of 8 by 8 ----------------------------------------------------------


def weights(seed: int = 0) -> Parameter:
    """Magnitudes from 0.25 to 1, so that a step or two puts none of them near 0."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)
    return Parameter(x / 4 + 0.25 * x.sign())


def gradient(t: int) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(100 + t)).clamp(-3, 3)


def step(opt, p: Tensor, grad: Tensor) -> None:
    p.grad = grad.to(p.dtype)
    opt.step()


def options_of(pair) -> dict:
    """The pruning and the averages of a pair as keyword options; its pruning acts at steps 1 and 2."""
    acts = {
        "prune sparsity": Prune(0.5, begin=1, end=2),
        "prune threshold": Prune(threshold=0.4),
        "prune n:m": Prune(pattern="2:4", begin=1, end=2),
        "prune rows": Prune(0.5, pattern="rows", begin=1, end=2),
    }
    prune = next((acts[name] for name in pair if name in acts), None)
    if "regrow" in pair:
        prune = replace(prune or acts["prune sparsity"], regrow=True)
    ema = [OPTIONS[name].options for name in pair if name in ("EMA", "EMA start, every", "EMA dtype")]
    return {"prune": prune, "ema": ema}


def set_mask(opt, p: Tensor, pair, keep: Tensor = EVEN) -> Tensor:
    """Mask p as the pair says, keeping the even columns; returns the mask written out."""
    if "dynamic mask" in pair:
        opt.mask(p, fn=lambda param, grad, state: keep, every=1)
    else:
        opt.mask(p, keep, mode="grad" if "mask grad" in pair else "freeze")
    return keep.expand(p.shape)


def pruned_of(opt, p: Tensor) -> Tensor:
    found = opt.prune_mask(p)
    return torch.zeros(p.shape, dtype=torch.bool) if found is None else found


def averages_of(opt, p: Tensor) -> list[str]:
    return [key for key in opt.state[p] if key.startswith("ema_")]


def saved_and_loaded(opt):
    """The checkpoint of an optimizer, by way of a file."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- masks ------------------------------------------------------------------------------------------


@says("A parameter has one mask: the later call replaces the earlier, mode included.")
def one_mask(pair):
    for make in RULES:
        for first, last in (("freeze", "grad"), ("grad", "freeze")):
            p, q = weights(), weights()
            opt, alone = make([p]), make([q])
            opt.mask(p, EVEN, mode=first)
            opt.mask(p, EVEN[:, None], mode=last)
            alone.mask(q, EVEN[:, None], mode=last)
            for t in (1, 2, 3):
                step(opt, p, gradient(t)), step(alone, q, gradient(t))
            assert_same_bits(p, q)


@says("A parameter has one mask: a fixed one ends a dynamic one, and the other way round.")
def fixed_or_dynamic(pair):
    mode = "grad" if "mask grad" in pair else "freeze"
    for make in RULES:
        p = weights()
        opt, calls = make([p]), []

        def fn(param, grad, state, calls=calls):
            calls.append(1)
            return ~EVEN

        opt.mask(p, fn=fn, every=1)
        step(opt, p, gradient(1))
        assert len(calls) == 1 and torch.equal(masks.unfold(opt.state[p], p), (~EVEN).expand(8, 8))
        opt.mask(p, EVEN, mode=mode)
        step(opt, p, gradient(2))
        assert len(calls) == 1 and torch.equal(masks.unfold(opt.state[p], p), EVEN.expand(8, 8))
        opt.mask(p, fn=fn, every=1, mode=mode)
        step(opt, p, gradient(3))
        assert len(calls) == 2 and torch.equal(masks.unfold(opt.state[p], p), (~EVEN).expand(8, 8))
        assert opt.state[p]["mask_freeze"] == (mode == "freeze")


@says("Frozen entries count in the number of weights and are never pruned; with too few others the step is refused.")
def frozen_are_counted(pair):
    for make in RULES:
        p = weights()
        opt = make([p], prune=Prune(0.5))
        keep = set_mask(opt, p, pair)
        step(opt, p, gradient(1))
        assert torch.equal(pruned_of(opt, p), keep)  # 32 of 64, and 32 are not frozen
        p = weights()
        opt = make([p], prune=Prune(0.6))
        set_mask(opt, p, pair)
        refused(opt, p)


def refused(opt, p: Tensor) -> None:
    """A step is refused for too few free entries, and has changed nothing."""
    p.grad = gradient(1)
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="frozen|free"):
        opt.step()
    before.assert_unchanged()


@says("A frozen entry is not pruned, however small.")
def small_but_frozen(pair):
    for make in RULES:
        p = weights()
        with torch.no_grad():
            p[:, 1], p[:, 2] = 1e-6, 1e-6
        opt = make([p], prune=Prune(threshold=0.2))
        set_mask(opt, p, pair)
        step(opt, p, torch.zeros(8, 8))
        assert (p[:, 1] == 1e-6).all() and not p[:, 2].any()


@says("Frozen entries stay and the others of their group go; a group with too few others is refused.")
def groups_with_frozen(pair):
    for make in RULES:
        p = weights()
        opt = make([p], prune=Prune(pattern="2:4"))
        keep = set_mask(opt, p, pair)
        step(opt, p, gradient(1))
        assert torch.equal(pruned_of(opt, p), keep)
        p = weights()
        opt = make([p], prune=Prune(pattern="2:4"))
        set_mask(opt, p, pair, torch.arange(8) % 4 == 0)
        refused(opt, p)


@says("A row with a frozen entry is never pruned; it counts in the number of rows.")
def rows_with_frozen(pair):
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[:6, 3] = False
    for make in RULES:
        p = weights()
        with torch.no_grad():
            p[:6] *= 0.1
        opt = make([p], prune=Prune(0.25, pattern="rows"))
        set_mask(opt, p, pair, keep)
        step(opt, p, gradient(1))
        assert pruned_of(opt, p).all(1).tolist() == [False] * 6 + [True] * 2


@says("What was pruned before it was frozen stays pruned.")
def pruned_then_frozen(pair):
    for make in RULES:
        p = weights()
        opt = make([p], prune=Prune(0.25, begin=1, end=3, every=2, schedule="linear", regrow=True), lr=0.5)
        opt.param_groups[0]["prune"]["begin"] = opt.param_groups[0]["prune"]["end"] = 1
        step(opt, p, gradient(1))
        gone = pruned_of(opt, p)
        assert gone.sum() == 16
        opt.param_groups[0]["prune"]["begin"] = opt.param_groups[0]["prune"]["end"] = 2
        keep = set_mask(opt, p, pair)
        step(opt, p, gradient(2))
        assert pruned_of(opt, p).sum() == 16
        assert pruned_of(opt, p)[gone & ~keep].all() and (gone & ~keep).any()
        assert not torch.equal(pruned_of(opt, p), gone)  # of the others some came back


@says("The average of a frozen entry keeps its bits, from its first update on.")
def frozen_average(pair):
    for make in RULES:
        p = weights().to(BF16) if "EMA dtype" in pair else weights()
        p = Parameter(p.detach())
        opt = make([p], ema=options_of(pair)["ema"])
        keep = set_mask(opt, p, pair)
        for t in (1, 2, 3):
            step(opt, p, gradient(t))
        average = opt.state[p]["ema_0"]
        assert torch.equal(average[~keep], p[~keep].to(average.dtype))
        with torch.no_grad():
            average.fill_(7.0)
        for t in (4, 5):
            step(opt, p, gradient(t))
        assert (opt.state[p]["ema_0"][~keep] == 7).all() and (opt.state[p]["ema_0"][keep] < 7).all()


@says("Masked entries do not count in the norm.")
def masked_norm(pair):
    """Whatever their gradient: infinite, or NaN."""
    for make in RULES:
        p, q = weights(), weights()
        opt, other = make([p], max_grad_norm=0.5), make([q], max_grad_norm=0.5)
        keep = set_mask(opt, p, pair)
        set_mask(other, q, pair)
        for t, bad in ((1, math.inf), (2, math.nan)):
            step(opt, p, torch.where(keep, gradient(t), bad))
            step(other, q, torch.where(keep, gradient(t), 0.0))
        assert_same_bits(p, q)
        assert not torch.equal(p, weights())


@says("Frozen entries do not decay.", "L1 does not reach frozen entries.")
def no_decay(pair):
    for make in RULES:
        for name in ("weight_decay", "l1"):
            p, start = weights(), weights()
            opt = make([p], **{name: 0.9})
            keep = set_mask(opt, p, pair)
            for _ in range(3):
                step(opt, p, torch.zeros(8, 8))
            assert_same_bits(p.detach()[~keep], start.detach()[~keep])
            assert (p.abs() < start.abs())[keep].all()


@says("Masked entries still decay, and drift: only their gradient is 0.", "L1 still shrinks masked entries.")
def masked_decay(pair):
    for make in RULES:
        for name in ("weight_decay", "l1"):
            p, start = weights(), weights()
            opt = make([p], **{"weight_decay": 0.0, name: 0.9})
            keep = set_mask(opt, p, pair)
            for t in (1, 2, 3):
                step(opt, p, gradient(t))
            assert (p.abs() < start.abs())[~keep].all()


@says("`grad_norm` leaves masked entries out; `param_norm` and `zeros` count them.")
def masked_statistics(pair):
    for make in RULES:
        p = weights()
        with torch.no_grad():
            p[:, 1] = 0.0
        opt = make([p], statistics=True, weight_decay=0.0)
        keep = set_mask(opt, p, pair)
        step(opt, p, gradient(1))
        found = opt.statistics()
        assert found["grad_norm"] == pytest.approx(float(gradient(1)[keep].double().norm()), rel=1e-6)
        assert found["param_norm"] == pytest.approx(float(p.detach().double().norm()), rel=1e-6)
        assert found["zeros"] == 8


@says("The mask is in the checkpoint, as a boolean tensor in the shape in which it was given, with its mode.")
def saved_mask(pair):
    for make in RULES:
        p, q = weights(), weights()
        opt, other = make([p]), make([q])
        set_mask(opt, p, pair)
        step(opt, p, gradient(1))
        saved = saved_and_loaded(opt)
        state = saved["state"][0]
        assert torch.equal(state["mask_keep"].reshape(-1), EVEN) and state["mask_freeze"] == ("mask freeze" in pair)
        other.load_state_dict(saved)
        assert torch.equal(masks.unfold(other.state[q], q), EVEN.expand(8, 8))
        assert other.state[q]["mask_freeze"] == ("mask freeze" in pair)


@says("The mask of the moment is in the checkpoint; the function is not, and must be set again.")
def saved_dynamic(pair):
    calls = []

    def fn(param, grad, state):
        calls.append(1)
        return grad > 0

    for make in RULES:
        p, q = weights(), weights()
        opt, other = make([p]), make([q])
        opt.mask(p, fn=fn, every=1)
        step(opt, p, gradient(1))
        other.load_state_dict(saved_and_loaded(opt))
        now = gradient(1) > 0
        assert torch.equal(masks.unfold(other.state[q], q), now)
        calls.clear()
        step(other, q, gradient(2))
        assert not calls and torch.equal(masks.unfold(other.state[q], q), now)
        other.mask(q, fn=fn, every=1)
        step(other, q, gradient(3))
        assert calls and torch.equal(masks.unfold(other.state[q], q), gradient(3) > 0)


@says("A masked entry is pruned like any other.")
def masked_and_pruned(pair):
    for make in RULES:
        p, q = weights(), weights()
        opt, plain = make([p], **options_of(pair)), make([q], **options_of(pair))
        keep = set_mask(opt, p, pair)
        for t in (1, 2):
            step(opt, p, gradient(t))
            step(plain, q, torch.where(keep, gradient(t), 0.0))
        assert torch.equal(pruned_of(opt, p), pruned_of(plain, q))
        assert pruned_of(opt, p)[~keep].any()


@says("The function gets the gradient unscaled, and is not called at a skipped step.")
def unscaled_for_the_function(pair):
    for make in RULES:
        p, seen = weights(), []
        opt = make([p])
        opt.mask(p, fn=lambda param, grad, state, seen=seen: seen.append(grad.clone()) or grad > 0, every=1)
        opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(1.0)
        step(opt, p, gradient(1) * math.inf)
        assert not seen
        opt.found_inf = torch.tensor(0.0)
        step(opt, p, gradient(1) * 8)
        assert len(seen) == 1 and torch.equal(seen[0], gradient(1))


@says("The function gets the gradient as backward left it, not turned.")
def unturned_for_the_function(pair):
    for make in RULES:
        p, seen = weights(), []
        opt = make([p], maximize=True)
        opt.mask(p, fn=lambda param, grad, state, seen=seen: seen.append(grad.clone()) or grad > 0, every=1)
        step(opt, p, gradient(1))
        assert torch.equal(seen[0], gradient(1))


# ---- pruning ----------------------------------------------------------------------------------------


@says(
    "One `Prune` takes one of the two; another parameter group takes the other.",
    "A `Prune` has one pattern; another parameter group takes the other.",
)
def one_way_of_pruning(pair):
    one, two = ({k: v for k, v in vars(options_of([name])["prune"]).items() if v is not None} for name in pair)
    if "prune rows" not in pair or "prune threshold" in pair:
        with pytest.raises(ValueError, match="Invalid Prune"):
            Prune(
                **{
                    **one,
                    **two,
                    "begin": 1,
                    "end": None,
                    "pattern": max(one["pattern"], two["pattern"], key=is_special),
                }
            )
    for make in RULES:
        params = [weights(1), weights(2)]
        alone = [weights(1), weights(2)]
        opt = make(
            [{"params": [p], "prune": options_of([name])["prune"]} for p, name in zip(params, pair, strict=True)]
        )
        each = [make([p], **options_of([name])) for p, name in zip(alone, pair, strict=True)]
        for t in (1, 2):
            for p, q, other in zip(params, alone, each, strict=True):
                p.grad = gradient(t)
                step(other, q, gradient(t))
            opt.step()
        for p, q, other in zip(params, alone, each, strict=True):
            assert torch.equal(pruned_of(opt, p), pruned_of(other, q)) and pruned_of(opt, p).any()


def is_special(pattern: str) -> bool:
    return pattern != "unstructured"


@says("At each step that acts what was pruned is let go, updated, and ranked again with all others.")
def all_ranked_again(pair):
    """The first half is pruned; then an update makes it the larger half, and the other half is pruned."""
    for make in RULES:
        p = Parameter(torch.ones(8, 8))
        with torch.no_grad():
            p[:, :2], p[:, 4:6] = 0.5, 0.5
            if "prune rows" in pair:
                p.fill_(1.0)[:4] = 0.5
        small = p.detach() < 1
        opt = make([p], prune=replace(options_of(pair)["prune"], regrow=True, schedule="linear"), weight_decay=0.0)
        opt.param_groups[0]["prune"]["end"] = 1
        step(opt, p, torch.zeros(8, 8))
        assert torch.equal(pruned_of(opt, p), small)
        opt.param_groups[0].update(lr=1.0)
        opt.param_groups[0]["prune"].update(begin=2, end=2)
        step(opt, p, torch.where(small, -4.0, 1.0))
        assert torch.equal(pruned_of(opt, p), ~small) and (p[small] > 0).all()


@says("Refused: a threshold prunes at every step, so that nothing could grow back.")
def threshold_and_regrow(pair):
    with pytest.raises(ValueError, match="regrow"):
        Prune(threshold=0.1, regrow=True)


@says(
    "A pruned weight is +0.0 in the average from the same step on.",
    "A pruned weight is +0.0 in the average from the same step on, whether an update is due or not.",
)
def pruned_average(pair):
    for make in RULES:
        p = Parameter(weights().detach().to(BF16 if "EMA dtype" in pair else F32))
        options = options_of(pair)
        if options["prune"].threshold is None:
            options["prune"] = replace(options["prune"], begin=4, end=None)
        else:
            options["prune"] = replace(options["prune"], begin=4)
        opt = make([p], **options)
        for t in (1, 2, 3):
            step(opt, p, gradient(t))
        assert (opt.state[p]["ema_0"] != 0).all()
        kept_before = opt.state[p]["ema_0"].clone()
        step(opt, p, gradient(4))
        gone, average = pruned_of(opt, p), opt.state[p]["ema_0"]
        assert gone.any() and (~gone).any()
        assert_same_bits(average[gone], torch.zeros_like(average)[gone])
        if "EMA start, every" in pair:  # step 4 is not due
            assert_same_bits(average[~gone], kept_before[~gone])


@says("The average of a weight that comes back goes on from 0.")
def average_comes_back(pair):
    for make in RULES:
        p = Parameter(torch.ones(8, 8, dtype=BF16 if "EMA dtype" in pair else F32))
        with torch.no_grad():
            p[:4] = 0.5
        opt = make([p], ema=options_of(pair)["ema"], prune=Prune(0.5, regrow=True), weight_decay=0.0)
        step(opt, p, torch.zeros(8, 8))
        for t in (2, 3, 4):
            step(opt, p, torch.zeros(8, 8))
        assert (opt.state[p]["ema_0"][4:] == 1).all() and not opt.state[p]["ema_0"][:4].any()
        opt.param_groups[0].update(lr=1.0)
        opt.param_groups[0]["prune"].update(begin=5)
        step(opt, p, torch.tensor([-4.0, 1.0]).repeat_interleave(4)[:, None].expand(8, 8))
        back, average = p.detach()[:4].float(), opt.state[p]["ema_0"][:4].float()
        assert (back > 0).all() and not p[4:].any()
        kind = OPTIONS[next(name for name in pair if name.startswith("EMA"))]
        share = kind.weight(kind.update(5))
        torch.testing.assert_close(average, share * back, rtol=2**-8, atol=0)


@says("Pruned entries do not count in the norm.")
def pruned_norm(pair):
    for make in RULES:
        p, q = weights(), weights()
        opt, other = make([p], max_grad_norm=0.5, **options_of(pair)), make([q], max_grad_norm=0.5, **options_of(pair))
        for t in (1, 2):
            step(opt, p, gradient(t)), step(other, q, gradient(t))
        gone = pruned_of(opt, p)
        assert gone.any() and (~gone).any()
        step(opt, p, torch.where(gone, 1e6, gradient(3)))
        step(other, q, torch.where(gone, 0.0, gradient(3)))
        assert_same_bits(p, q)


@says("At a step that acts, what was let go counts in the norm.")
def regrown_norm(pair):
    for make in RULES:
        p = weights()
        opt = make([p], max_grad_norm=0.5, statistics=True, prune=Prune(0.5, begin=1, end=3, every=2, regrow=True))
        opt.param_groups[0]["prune"].update(begin=1, end=1)
        step(opt, p, gradient(1))
        gone = pruned_of(opt, p)
        step(opt, p, gradient(2))
        assert opt.statistics()["grad_norm"] == pytest.approx(float(gradient(2)[~gone].double().norm()), rel=1e-6)
        opt.param_groups[0]["prune"].update(begin=3, end=3)
        step(opt, p, gradient(3))
        assert opt.statistics()["grad_norm"] == pytest.approx(float(gradient(3).double().norm()), rel=1e-6)


@says("A weight that L1 has brought below the threshold is pruned at the same step.")
def threshold_after_l1(pair):
    for decoupled in (True, False):
        p = Parameter(torch.full((8, 8), 0.5))
        opt = fuseopt.SGD([p], lr=0.1, l1=2.0, decoupled_weight_decay=decoupled, prune=Prune(threshold=0.4))
        step(opt, p, torch.zeros(8, 8))
        assert pruned_of(opt, p).all()
        q = Parameter(torch.full((8, 8), 0.5))
        step(fuseopt.SGD([q], lr=0.1, l1=0.5, prune=Prune(threshold=0.4)), q, torch.zeros(8, 8))
        assert (q > 0.4).all()


@says("A weight that L1 set to 0 is the first to be chosen; until it is, it can move again.")
def zero_by_l1(pair):
    p = Parameter(torch.ones(8, 8))
    with torch.no_grad():
        p[:, :2] = 0.01
    opt = fuseopt.AdamW([p], lr=0.1, l1=0.5, weight_decay=0.0, prune=Prune(0.5, begin=1, end=3))
    step(opt, p, torch.zeros(8, 8))  # to a sparsity of 0
    assert not p[:, :2].any() and not pruned_of(opt, p).any()
    step(opt, p, torch.where(torch.arange(8) == 0, -1.0, 0.0).expand(8, 8))
    gone = pruned_of(opt, p)  # 0.4375 of 64
    assert gone.sum() == 28 and gone[:, 1].all()
    assert (p[~gone] != 0).all()
    p = Parameter(torch.ones(8, 8) * 0.01)
    opt = fuseopt.AdamW([p], lr=0.1, l1=0.5, weight_decay=0.0, prune=Prune(0.5, begin=9))
    step(opt, p, torch.zeros(8, 8))
    assert not p.any()
    step(opt, p, -torch.ones(8, 8))
    assert (p > 0).all()


@says("A skipped step does not count in the schedule.")
def skipped_and_pruned(pair):
    for make in RULES:
        options = options_of(pair)
        options["prune"] = replace(options["prune"], begin=2, **({} if options["prune"].threshold else {"end": None}))
        p = weights()
        opt = make([p], **options)
        step(opt, p, gradient(1))
        for _ in range(3):
            opt.found_inf = torch.tensor(1.0)
            step(opt, p, gradient(2) * math.inf)
        assert not pruned_of(opt, p).any()
        del opt.found_inf
        step(opt, p, gradient(2))
        assert pruned_of(opt, p).any()


@says("At a step that acts, the statistics are of the weights before the selection.")
def statistics_before_selection(pair):
    for make in RULES:
        p, q = weights(), weights()
        opt, dense = make([p], statistics=True, **options_of(pair)), make([q], statistics=True)
        opt.param_groups[0]["prune"].update(end=None)
        step(opt, p, gradient(1)), step(dense, q, gradient(1))
        assert opt.statistics() == dense.statistics() and pruned_of(opt, p).any()
        assert opt.statistics()["zeros"] == 0
        step(opt, p, gradient(2))
        assert opt.statistics()["zeros"] == int(pruned_of(opt, p).sum())


@says("`zeros` counts what the threshold pruned at this step.")
def zeros_by_threshold(pair):
    for make in RULES:
        p = weights()
        opt = make([p], statistics=True, **options_of(pair))
        step(opt, p, gradient(1))
        assert opt.statistics()["zeros"] == int(pruned_of(opt, p).sum()) > 0


@says("What is pruned is in the checkpoint, as a boolean tensor.")
def saved_pruning(pair):
    for make in RULES:
        p = weights()
        opt = make([p], **options_of(pair))
        for t in (1, 2):
            step(opt, p, gradient(t))
        saved = saved_and_loaded(opt)
        assert torch.equal(saved["state"][0]["prune_mask"], pruned_of(opt, p)) and pruned_of(opt, p).any()
        q = like([p])[0]
        other = make([q], **options_of(pair))
        other.load_state_dict(saved)
        step(other, q, gradient(3))
        assert torch.equal(pruned_of(other, q) & pruned_of(opt, p), pruned_of(opt, p))


# ---- averages ---------------------------------------------------------------------------------------


@says("A list keeps both; each has its own options.")
def two_averages(pair):
    for make in RULES:
        together, alone = weights(), [weights(), weights()]
        opt = make([together], ema=options_of(pair)["ema"])
        each = [make([p], ema=one) for p, one in zip(alone, options_of(pair)["ema"], strict=True)]
        for t in range(1, 6):
            step(opt, together, gradient(t))
            for p, other in zip(alone, each, strict=True):
                step(other, p, gradient(t))
        found = [opt.state[together][f"ema_{k}"] for k in (0, 1)]
        for average, p, other in zip(found, alone, each, strict=True):
            assert_same_bits(average, other.state[p]["ema_0"])
        assert not torch.equal(*found)


@says("The average is in the checkpoint, in the type in which it is kept, whatever the parameter's.")
def saved_average(pair):
    for make in RULES:
        p = Parameter(weights().detach().to(BF16))
        opt = make([p], ema=options_of(pair)["ema"])
        for t in range(1, 5):
            step(opt, p, gradient(t))
        kind = BF16 if "EMA dtype" in pair else F32
        saved = saved_and_loaded(opt)
        assert saved["state"][0]["ema_0"].dtype == kind
        q = like([p])[0]
        other = make([q], ema=options_of(pair)["ema"])
        other.load_state_dict(saved)
        assert_same_bits(other.state[q]["ema_0"], opt.state[p]["ema_0"])
        step(opt, p, gradient(5)), step(other, q, gradient(5))
        assert_same_bits(other.state[q]["ema_0"], opt.state[p]["ema_0"])


@says("A skipped step does not count in the average's schedule.")
def skipped_and_averaged(pair):
    for make in RULES:
        p, q = weights(), weights()
        opt, other = make([p], ema=options_of(pair)["ema"]), make([q], ema=options_of(pair)["ema"])
        for t in range(1, 6):
            opt.found_inf = torch.tensor(1.0)
            step(opt, p, gradient(t) * math.inf)
            del opt.found_inf
            step(opt, p, gradient(t)), step(other, q, gradient(t))
        assert_same_bits(opt.state[p]["ema_0"], other.state[q]["ema_0"])


# ---- arithmetic -------------------------------------------------------------------------------------


@says(
    "The gradient is clipped first: coupled decay is added after, unclipped.",
    "The gradient is clipped first: coupled L1 is added after, unclipped.",
)
def clipped_first(pair):
    name, of = ("l1", torch.sign) if "l1" in pair else ("weight_decay", lambda p: p)
    p = weights()
    start = p.detach().clone()
    opt = fuseopt.SGD([p], lr=0.1, momentum=0.9, max_grad_norm=0.5, **{name: 0.4})
    step(opt, p, gradient(1))
    clipped = gradient(1) * 0.5 / gradient(1).norm()
    torch.testing.assert_close(opt.state[p]["momentum_buffer"], clipped + 0.4 * of(start), rtol=1e-5, atol=1e-6)


@says("The norm is of the unscaled gradient.")
def norm_of_the_unscaled(pair):
    for make in RULES:
        p, q = weights(), weights()
        opt, plain = make([p], max_grad_norm=3.0), make([q], max_grad_norm=3.0)
        opt.grad_scale = torch.tensor(1024.0)
        step(opt, p, gradient(1) * 1024), step(plain, q, gradient(1))
        assert_same_bits(p, q)


@says("`grad_norm` is the norm before clipping.")
def norm_before_clipping(pair):
    for make in RULES:
        p = weights()
        opt = make([p], max_grad_norm=0.5, statistics=True)
        step(opt, p, gradient(1))
        assert opt.statistics()["grad_norm"] == pytest.approx(float(gradient(1).double().norm()), rel=1e-6)


@says("L1 is coupled where decay is coupled, and a soft threshold where decay is decoupled.")
def l1_follows_decay(pair):
    for decoupled in (True, False):
        p = weights()
        start = p.detach().double()
        opt = fuseopt.SGD([p], lr=0.1, weight_decay=0.5, l1=3.0, decoupled_weight_decay=decoupled)
        step(opt, p, gradient(1))
        if decoupled:
            dense = start * (1 - 0.05) - 0.1 * gradient(1)
            expected = dense.sign() * (dense.abs() - 0.3).clamp(min=0)
            assert (expected == 0).any()
        else:
            expected = start - 0.1 * (gradient(1) + 0.5 * start + 3 * start.sign())
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=1e-6)


@says("Only the gradient is turned: decay still pulls to 0.", "Only the gradient is turned: L1 still pulls to 0.")
def pulls_to_zero(pair):
    for make in RULES:
        p, start = weights(), weights()
        options = {"weight_decay": 0.0, "weight_decay" if "weight decay" in pair else "l1": 0.5}
        opt = make([p], maximize=True, **options)
        step(opt, p, torch.zeros(8, 8))
        assert (p.abs() < start.abs()).all()


@says("The norms are of the unscaled gradient; a skipped step leaves those of the last step taken.")
def statistics_and_skips(pair):
    for make in RULES:
        p = weights()
        opt = make([p], statistics=True)
        opt.grad_scale = torch.tensor(8.0)
        step(opt, p, gradient(1) * 8)
        found = dict(opt.statistics())
        assert found["grad_norm"] == pytest.approx(float(gradient(1).double().norm()), rel=1e-6)
        opt.found_inf = torch.tensor(1.0)
        step(opt, p, gradient(2) * math.inf)
        assert dict(opt.statistics()) == found


@says("Statistics are not saved: there are none until the next step.")
def no_saved_statistics(pair):
    for make in RULES:
        p = weights()
        opt = make([p], statistics=True)
        step(opt, p, gradient(1))
        other = make([p], statistics=True)
        other.load_state_dict(saved_and_loaded(opt))
        with pytest.raises(RuntimeError, match="no statistics"):
            other.statistics()
        step(other, p, gradient(2))
        assert other.statistics()["grad_norm"] > 0
