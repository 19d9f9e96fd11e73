"""Pruning to n of every m entries and to whole rows, and pruning that regrows: against plain references and torch.nn.utils.prune."""

import copy
import math

import pytest
import torch
from cases import (
    BF16,
    DTYPES,
    F32,
    F64,
    Snapshot,
    assert_same_bits,
    assert_same_state,
    bits,
    element_mask,
    ident,
    parameters,
    run,
    set_gradients,
)
from torch import nn
from torch.nn.utils import prune as torch_prune

import fuseopt
from fuseopt import EMA, Prune, patterns
from fuseopt.stages.prune import smallest, smallest_of_m, smallest_rows


def coarse(shape, dtype=F32, seed=0):
    """Weights of few values, so that most groups and many rows have equals."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-3, 4, shape, generator=generator) / 4).to(dtype)


def hold(params, backend, prune, **more):
    """AdamW that changes no weight but by pruning, and whose moments and average are nowhere 0."""
    opt = fuseopt.AdamW(params, lr=0.0, weight_decay=0.0, prune=prune, ema=EMA(0.9), backend=backend, **more)
    for p in params:
        p.grad = torch.ones_like(p)
    return opt


def assert_zeroed(opt, p, old, pruned):
    """Weights, moments and average are +0.0 where pruned, and elsewhere the weights are as they were."""
    assert torch.equal(opt.prune_mask(p), pruned)
    assert_same_bits(p, torch.where(pruned, torch.zeros_like(old), old))
    for key in ("exp_avg", "exp_avg_sq", "ema_0"):
        assert not bits(opt.state[p][key])[pruned].any(), key
    assert (opt.state[p]["exp_avg"][~pruned] != 0).all()


# ---- n of every m --------------------------------------------------------------------------------

# Whole groups and short ones, words and tiles cut anywhere; then the dimension inside others, up to wider than a tile.
SHAPES = ((5, 12), (7, 13), (2, 1030), (1, 2100), (30, 64), (6, 9, 3, 3), (1, 5, 700), (2, 34, 40), (4, 2), (4, 1))


def outside(p):
    """The same values in memory with gaps, or with the dimensions in another order."""
    return torch.stack([p, p], -1)[..., 0]


MEMORY = {"row-major": torch.clone, "reversed": lambda p: p.permute(*range(p.dim())[::-1]).contiguous().permute(*range(p.dim())[::-1]),
          "gaps": outside}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("pattern", ("2:4", "1:2", "4:8", "5:7", "3:32"))
def test_the_n_largest_of_every_m_stay(pattern, memory, dtype, backend):
    """Of equal ones the first; frozen entries stay and count, so do pruned ones; whatever the order of the memory."""
    n, m = map(int, pattern.split(":"))
    for shape in SHAPES:
        old = coarse(shape, dtype)
        p = nn.Parameter(MEMORY[memory](old))
        opt = hold([p], backend, None)
        opt.step()
        frozen = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < n / m / 4
        frozen &= patterns_rank(frozen, m) < n
        pruned = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.1
        opt.state[p]["prune_mask"] = fuseopt.stages.mask.empty_bits(p.numel(), p.device)
        fuseopt.stages.mask.into_memory_order(opt.state[p], p)
        fuseopt.stages.mask.set_pruned(opt.state[p], p, pruned)
        opt.mask(p, ~frozen)
        opt.param_groups[0]["prune"] = Prune(pattern=pattern, begin=2)
        opt.step()
        # What was set to be pruned is zeroed by the pass, save what is frozen.
        chosen = smallest_of_m(torch.where(pruned & ~frozen, 0.0, old), ~frozen & ~pruned, pruned, n, m)
        gone = pruned | chosen
        assert torch.equal(opt.prune_mask(p), gone), shape
        assert_same_bits(p, torch.where(gone & ~frozen, torch.zeros_like(old), old), str(shape))
        for key in ("exp_avg", "exp_avg_sq", "ema_0"):
            assert not bits(opt.state[p][key])[chosen].any(), (key, shape)


def patterns_rank(x, m):
    """How many True entries come before each in its group."""
    moved = x.movedim(1, -1)
    parts = [part.cumsum(-1) - part.int() for part in moved.split(m, -1)]
    return torch.cat(parts, -1).movedim(-1, 1)


@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=ident)
@pytest.mark.parametrize("threads", (1, 2, 7))
def test_any_number_of_threads_prunes_the_same(threads, dtype, native):
    """Pieces that share a word of bits are marked by several threads."""
    for shape in ((129, 1002), (40, 18, 3, 3)):
        old, free = coarse(shape, dtype), torch.ones(shape, dtype=torch.bool)
        p = nn.Parameter(old.clone())
        torch.set_num_threads(threads)
        opt = hold([p], "cpu", Prune(pattern="2:4"))
        opt.step()
        assert_zeroed(opt, p, old, smallest_of_m(old, free, ~free, 2, 4))


def test_not_a_number_stays(backend):
    """NaN ranks above infinity, as everywhere in pruning; zeros of either sign are equal."""
    p = nn.Parameter(torch.tensor([[1.0, math.nan, math.inf, 2.0, -0.0, 0.0, -0.0, 0.0]]))
    opt = fuseopt.SGD([p], lr=0.0, prune=Prune(pattern="1:4"), backend=backend)
    p.grad = torch.ones_like(p)  # all 0 would be a dry run
    opt.step()
    assert opt.prune_mask(p).tolist() == [[True, False, True, True, False, True, True, True]]


def test_n_m_holds_from_begin_on(backend):
    """Chosen once, at begin; what is pruned stays, and what is not pruned moves on."""
    p = parameters([(20, 48)])[0]
    opt = fuseopt.AdamW([p], lr=0.1, prune=Prune(pattern="2:4", begin=3), backend=backend)
    run(opt, [p], 2)
    assert opt.prune_mask(p) is None
    seen = []
    for t in range(3, 7):
        run(opt, [p], 1, t)
        assert torch.equal(opt.prune_mask(p), p == 0)
        assert (p != 0).reshape(20, 12, 4).sum(2).eq(2).all()
        seen.append(opt.prune_mask(p))
    assert all(torch.equal(seen[0], one) for one in seen)


@pytest.mark.parametrize("moments", ("zero", "keep"))
@pytest.mark.parametrize(
    "prune", ({"pattern": "2:4"}, {"sparsity": 0.5, "pattern": "rows"}), ids=lambda x: x["pattern"]
)
def test_moments_of_patterns(prune, moments, backend):
    p = parameters([(20, 32)])[0]
    opt = fuseopt.AdamW([p], prune=Prune(**prune, begin=2, moments=moments), backend=backend)
    run(opt, [p], 3)
    pruned = opt.prune_mask(p)
    assert int(pruned.sum()) == 320
    for key in ("exp_avg", "exp_avg_sq"):
        assert bool((opt.state[p][key][pruned] != 0).all()) == (moments == "keep")
        assert bool(bits(opt.state[p][key])[pruned].any()) == (moments == "keep")


@pytest.mark.parametrize("regrow", (False, True))
def test_a_group_with_too_few_free_entries_is_refused(regrow, backend):
    """Before anything changes; pruned entries that are frozen later count as pruned, and raise nothing."""
    p = parameters([(6, 8)])[0]
    opt = fuseopt.AdamW(
        [("head.weight", p)], prune=Prune(pattern="2:4", end=3, regrow=regrow), ema=EMA(0.9), backend=backend
    )
    run(opt, [p], 1)
    opt.mask(p, torch.arange(8)[None, :] >= 4)
    run(opt, [p], 1, 2)
    assert (p != 0).reshape(6, 2, 4).sum(2).eq(2).all()
    with torch.no_grad():
        opt.state[p]["prune_mask"].zero_()
    set_gradients([p], 3)
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="'2:4' keeps 2 of every 4 .* 6 groups of 'head.weight'.*prune=None"):
        opt.step()
    before.assert_unchanged()


def test_every_group_of_parameters_has_its_own_pattern(backend):
    a, b, c, v = parameters([(4, 8), (4, 8), (4, 8), (8,)])
    groups = [{"params": [a, v]}, {"params": [b], "prune": Prune(pattern="1:8")}, {"params": [c], "prune": None}]
    opt = fuseopt.SGD(groups, lr=0.1, prune=Prune(pattern="2:4", scope="tensor"), backend=backend)
    run(opt, [a, b, c, v], 1)
    assert [int((x == 0).sum()) for x in (a, b, c, v)] == [16, 28, 0, 0]


# ---- whole rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ("global", "tensor"))
@pytest.mark.parametrize("sparsity", (0.0, 0.1, 1 / 3, 0.5, 0.9))
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_the_rows_of_least_norm_go(dtype, sparsity, scope, backend):
    """Exactly round(s*R); equal ones in the order of parameters and rows; never one with a frozen entry."""
    olds = [coarse(shape, dtype, k) for k, shape in enumerate([(40, 5), (30, 5), (3,), (12, 1, 5), (20, 3, 2, 2)])]
    olds[1][3:9] = olds[0][:6]
    params = [nn.Parameter(old.clone()) for old in olds]
    params[4].data = params[4].data.contiguous(memory_format=torch.channels_last)
    wide = [k for k, old in enumerate(olds) if old.dim() >= 2]
    frozen = {k: torch.zeros(olds[k].shape, dtype=torch.bool) for k in wide}
    frozen[0][5, 2] = frozen[4][7] = True
    free = {k: ~frozen[k].flatten(1).any(1) for k in wide}
    expected = {}
    for part in [wide] if scope == "global" else [[k] for k in wide]:
        count = round(sparsity * sum(len(olds[k]) for k in part))
        rows = smallest_rows([olds[k] for k in part], [free[k] for k in part], count)
        expected |= dict(zip(part, rows, strict=True))
    opt = hold(params, backend, Prune(sparsity, pattern="rows", scope=scope))
    for k in (0, 4):
        opt.mask(params[k], ~frozen[k])
    opt.step()
    assert_same_bits(params[2], olds[2])
    for k in wide:
        whole = expected[k].reshape(-1, *[1] * (olds[k].dim() - 1)).expand(olds[k].shape)
        assert torch.equal(opt.prune_mask(params[k]), whole), k
        assert_same_bits(params[k], torch.where(whole, torch.zeros_like(olds[k]), olds[k]))
        assert not bits(opt.state[params[k]]["ema_0"])[whole].any()


def test_sums_of_squares_are_formed_in_a_fixed_order(native):
    """Whatever the threads, the other rows and the memory: equal rows have the same sum to the bit."""
    row = torch.randn(100_003)
    tall = row.expand(40, -1).clone()
    sums = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        sums += [
            patterns.squares(tall),
            patterns.squares(tall.t().contiguous().t()),
            patterns.squares(row[None]).expand(40),
        ]
    for one in sums:
        assert torch.equal(one, sums[0])
        torch.testing.assert_close(one, row.double().square().sum().expand(40), rtol=1e-13, atol=0.0)


def test_rows_that_are_not_numbers_stay(backend):
    """NaN of either sign ranks above infinity."""
    nan = torch.tensor(math.nan)
    values = torch.stack(
        [torch.tensor(1.0), nan.copysign(torch.tensor(-1.0)), torch.tensor(math.inf), nan, torch.tensor(2.0)]
    )
    p = nn.Parameter(values[:, None].repeat(1, 3))
    opt = hold([p], backend, Prune(0.6, pattern="rows"))
    opt.step()
    assert opt.prune_mask(p).all(1).tolist() == [True, False, True, False, True]


def test_too_few_free_rows_are_refused_before_anything_changes(backend):
    params = parameters([(10, 4), (10, 4)])
    opt = fuseopt.AdamW(
        [("a", params[0]), ("b", params[1])], prune=Prune(0.8, pattern="rows", begin=2), backend=backend
    )
    opt.mask(params[0], torch.arange(4)[None, :] < 3)
    run(opt, params, 1)
    set_gradients(params, 2)
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="16 of 20 rows.*all but 10.*lower"):
        opt.step()
    before.assert_unchanged()


def test_rows_that_are_partly_pruned_are_not_pruned_rows(backend):
    """Pruned entry by entry first, then row by row: such rows have small norms and may be chosen."""
    p = nn.Parameter(torch.tensor([[1.0, 8.0], [2.0, 2.0], [9.0, 9.0], [1.0, 1.0]]))
    opt = fuseopt.SGD([p], lr=0.0, prune=Prune(3 / 8), backend=backend)
    p.grad = torch.ones_like(p)  # all 0 would be a dry run
    opt.step()
    assert p.tolist() == [[0.0, 8.0], [2.0, 2.0], [9.0, 9.0], [0.0, 0.0]]
    opt.param_groups[0]["prune"] = Prune(0.5, pattern="rows", begin=2)
    opt.step()
    assert p.tolist() == [[0.0, 8.0], [0.0, 0.0], [9.0, 9.0], [0.0, 0.0]]
    assert opt.prune_mask(p).tolist() == [[True, False], [True, True], [False, False], [True, True]]


# ---- torch's pruning after a torch step ----------------------------------------------------------

SCHEDULES = {
    "once": {"begin": 2, "schedule": "once"},
    "linear": {"begin": 2, "end": 5, "schedule": "linear"},
    "cubic": {"begin": 1, "end": 7, "every": 2},
}
RULES = {
    # With a small eps every update from moments of 0 is as large: all ties.
    "adamw": (fuseopt.AdamW, torch.optim.AdamW, {"lr": 3.0, "weight_decay": 0.01, "eps": 0.5}),
    "sgd": (fuseopt.SGD, torch.optim.SGD, {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.01}),
}
KINDS = {
    "global": {"sparsity": 0.7},
    "tensor": {"sparsity": 0.7, "scope": "tensor"},
    "rows": {"sparsity": 0.7, "scope": "tensor", "pattern": "rows"},
    "2:4": {"pattern": "2:4"},
}


def torch_masks(kind, params, masks, sparsity):
    """Masks of what stays by torch.nn.utils.prune, on top of `masks`; of n:m, which it has not, by the reference."""
    if kind == "2:4":
        gone = [m == 0 for m in masks]
        return [(~(g | smallest_of_m(p, ~g, g, 2, 4))).float() for p, g in zip(params, gone, strict=True)]
    holders = []
    for p, m in zip(params, masks, strict=True):
        holder = nn.Module()
        holder.weight = nn.Parameter(p.detach().clone())
        holders.append(torch_prune.custom_from_mask(holder, "weight", m))
    if kind == "global":
        more = round(sparsity * sum(m.numel() for m in masks)) - sum(int((m == 0).sum()) for m in masks)
        torch_prune.global_unstructured([(h, "weight") for h in holders], torch_prune.L1Unstructured, amount=more)
    for holder, m in zip(holders, masks, strict=True):
        if kind == "tensor":
            torch_prune.l1_unstructured(holder, "weight", amount=round(sparsity * m.numel()) - int((m == 0).sum()))
        elif kind == "rows":
            more = round(sparsity * len(m)) - int((m.flatten(1) == 0).all(1).sum())
            torch_prune.ln_structured(holder, "weight", amount=more, n=2, dim=0)
    return [holder.weight_mask for holder in holders]


def sparsity_at(options, t):
    """The schedule written out; None at steps that do not select."""
    begin, s = options["begin"], options.get("sparsity", 0.5)
    if "end" not in options:
        return s if t == begin else None
    if not begin <= t <= options["end"] or (t - begin) % options.get("every", 1):
        return None
    x = (t - begin) / (options["end"] - begin)
    return s * x if options.get("schedule") == "linear" else s * (1 - (1 - x) ** 3)


def scaled_parameters(shapes, dtype=F32):
    """Small weights, which what regrows can outgrow."""
    params = parameters(shapes, dtype)
    for p in params:
        p.data *= 0.1
    return params


def uneven_step(opt, params, t):
    """A third of the rows, others at each step, have gradients that outgrow all before: what is pruned there comes back."""
    set_gradients(params, t, 1e-3)
    for p in params:
        p.grad[t % 3 :: 3] *= 4**t
    opt.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("regrow", (False, True), ids=("grows", "regrows"))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchs_pruning_after_a_torch_step(kind, schedule, regrow, rule, native):
    """Bit for bit: a step of torch's fused optimizer, dense where it regrows, then torch.nn.utils.prune, then zeroing."""
    options = KINDS[kind] | SCHEDULES[schedule]
    ours, theirs, hyper = RULES[rule]
    params, theirs_params = (scaled_parameters([(64, 32), (16, 8, 4, 4)]) for _ in range(2))
    opt = ours(params, prune=Prune(**options, regrow=regrow), **hyper)
    plain = theirs(theirs_params, fused=True, **hyper)
    masks, changed = [torch.ones_like(p) for p in params], 0
    for t in range(1, 10):
        uneven_step(opt, params, t)
        uneven_step(plain, theirs_params, t)
        sparsity = sparsity_at(options, t)
        last = masks
        if regrow and sparsity is not None:  # every weight has moved: choose from scratch
            masks = [torch.ones_like(m) for m in masks]
        with torch.no_grad():
            for p, m in zip(theirs_params, masks, strict=True):
                p.masked_fill_(m == 0, 0.0)
        if sparsity is not None:
            masks = torch_masks(kind, theirs_params, masks, sparsity)
        changed += any(bool((m > n).any()) for m, n in zip(masks, last, strict=True))
        for p, q, m in zip(params, theirs_params, masks, strict=True):
            for x in (q.data, *(v for k, v in plain.state[q].items() if k != "step")):
                x.masked_fill_(m == 0, 0.0)
            assert_same_bits(p, q, f"step {t}")
            pruned = opt.prune_mask(p)
            assert torch.equal(m == 0, torch.zeros_like(p, dtype=torch.bool) if pruned is None else pruned), f"step {t}"
    assert bool(changed) == (regrow and "end" in options), "weights came back, or did not"


# ---- regrow --------------------------------------------------------------------------------------

REGROW = {
    "unstructured": Prune(0.6, begin=2, end=8, every=2, regrow=True),
    "rows": Prune(0.5, pattern="rows", begin=2, end=8, every=2, regrow=True, schedule="linear"),
    "2:4": Prune(pattern="2:4", begin=2, end=8, every=2, regrow=True),
}


@pytest.mark.parametrize("name", REGROW)
def test_the_norm_counts_what_is_let_go(name, backend):
    """At a step that selects the gradient of every entry counts, at others only of those not pruned."""
    p = parameters([(16, 24)])[0]
    opt = fuseopt.AdamW([p], lr=0.1, max_grad_norm=0.5, statistics=True, prune=REGROW[name], backend=backend)
    for t in range(1, 8):
        pruned = opt.prune_mask(p)
        set_gradients([p], t)
        free = p.grad if pruned is None or t % 2 == 0 else p.grad[~pruned]
        opt.step()
        assert opt.statistics()["grad_norm"] == pytest.approx(float(free.double().norm()), rel=1e-12), t


@pytest.mark.parametrize("name", REGROW)
@pytest.mark.parametrize("dtype", (F32, BF16), ids=ident)
def test_averages_of_what_regrows_go_on_from_zero(name, dtype, backend):
    """By e + w*(p - e) from e = +0.0, and frozen entries are never let go."""
    p = scaled_parameters([(16, 24)], dtype)[0]
    opt = fuseopt.SGD([p], lr=0.5, ema=EMA(0.75), prune=REGROW[name], backend=backend)
    run(opt, [p], 3)
    back = 0
    for t in range(4, 9):
        pruned, average = opt.prune_mask(p), opt.state[p]["ema_0"].clone()
        uneven_step(opt, [p], t)
        regrown = pruned & ~opt.prune_mask(p)
        back += int(regrown.sum())
        assert not regrown.any() or t % 2 == 0
        assert torch.equal(opt.state[p]["ema_0"][regrown], 0.25 * p.detach()[regrown].float())
        assert (average[pruned] == 0).all() and torch.equal(opt.state[p]["ema_0"] == 0, opt.prune_mask(p))
    assert back > 0


@pytest.mark.parametrize("name", REGROW)
def test_pruned_entries_that_are_frozen_do_not_regrow(name, backend):
    p = scaled_parameters([(16, 24)])[0]
    opt = fuseopt.SGD([p], lr=2.0, prune=REGROW[name], backend=backend)
    run(opt, [p], 4)
    pruned = opt.prune_mask(p)
    frozen = (torch.arange(16)[:, None] < 3) | pruned.all(1)[:, None] if name == "rows" else torch.arange(24) % 4 < 2
    frozen = (frozen & pruned).expand(16, 24)
    opt.mask(p, ~frozen)
    run(opt, [p], 4, 5)
    assert frozen.any() and opt.prune_mask(p)[frozen].all() and not bits(p)[frozen].any()
    assert name == "rows" or (pruned & ~opt.prune_mask(p)).any()  # others did


@pytest.mark.parametrize("name", REGROW)
@pytest.mark.parametrize("at", (1, 2, 3, 5))
def test_saving_and_loading_between_selections(name, at, backend):
    options = {"lr": 0.1, "ema": EMA(0.9), "prune": REGROW[name], "backend": backend}
    shapes = [(16, 24), (6, 8, 3, 3), (5,)]
    whole = parameters(shapes)
    first = run(fuseopt.AdamW(whole, **options), whole, at)
    params = [nn.Parameter(p.detach().clone()) for p in whole]
    second = fuseopt.AdamW(params, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, whole, 8 - at, at + 1)
    run(second, params, 8 - at, at + 1)
    assert_same_state(first, second)


def test_a_skipped_step_lets_nothing_go(backend):
    p = parameters([(16, 24)])[0]
    opt = run(fuseopt.AdamW([p], lr=0.1, prune=REGROW["2:4"], backend=backend), [p], 3)
    set_gradients([p], 4)
    before = Snapshot(opt)
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    before.assert_unchanged()


@pytest.mark.parametrize("name", REGROW)
def test_bad_input_lets_nothing_go(name, backend):
    p, q = parameters([(16, 24), (4, 8)])
    opt = run(fuseopt.AdamW([p, q], lr=0.1, prune=REGROW[name], backend=backend), [p, q], 3)
    set_gradients([p, q], 4)
    opt.state[q]["exp_avg"] = torch.zeros(3)
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="exp_avg"):
        opt.step()
    before.assert_unchanged()


def test_both_backends_prune_and_regrow_alike(native):
    """Random options, masks and types: the same bits of what is pruned, with weights that are exact in both."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        pick = lambda *values: values[int(torch.randint(len(values), (), generator=generator))]
        kind = pick({"pattern": "2:4"}, {"pattern": "3:5"}, {"sparsity": 0.6, "pattern": "rows"}, {"sparsity": 0.6})
        prune = Prune(**kind, begin=pick(1, 2), end=6, every=pick(1, 4) if kind.get("begin") else 1, regrow=pick(True, False),
                      moments=pick("zero", "keep"), scope=pick("global", "tensor"))  # fmt: skip
        dtype, masked = pick(*DTYPES), pick(None, "freeze", "grad")
        found = []
        for backend in ("cpu", "torch"):
            params = [nn.Parameter(coarse(shape, dtype, k)) for k, shape in enumerate([(9, 20), (6, 10, 2, 2), (8,)])]
            opt = fuseopt.SGD(params, lr=0.25, momentum=0.5, prune=prune, ema=EMA(0.5), backend=backend)
            if masked:
                keep = element_mask(params[0]) if masked == "grad" else torch.arange(9)[:, None] % 9 > 0
                opt.mask(params[0], keep | (torch.arange(20) % 5 > 0), masked)
            for t in range(1, 8):
                for k, p in enumerate(params):
                    p.grad = coarse(p.shape, dtype, 10 * t + k)
                opt.step()
            found.append(opt)
        assert_same_state(*found)


def test_the_references_agree_where_a_group_is_everything():
    """n:m of one group, and rows of one entry, are the unstructured reference."""
    w = torch.randn(1, 8)
    free, nothing = torch.ones_like(w, dtype=torch.bool), torch.zeros_like(w, dtype=torch.bool)
    assert torch.equal(smallest_of_m(w, free, nothing, 3, 8), smallest([w], [free], 5)[0])
    assert torch.equal(smallest_rows([w.t()], [free[0]], 5)[0], smallest([w], [free], 5)[0][0])


def test_blocks_take_their_ties_in_turn():
    """Blocks that count at different speeds: odd rows are nearly all frozen. Ties go in order, whoever is first."""
    usual = torch.get_num_threads()
    keep = torch.ones(64, 16384, dtype=torch.bool)
    keep[1::2, 100:] = False
    try:
        torch.set_num_threads(4)
        for _ in range(40):
            p = torch.nn.Parameter(torch.ones(64, 16384))
            opt = fuseopt.SGD([p], lr=0.0, prune=Prune(0.251))
            opt.mask(p, keep)
            p.grad = torch.ones_like(p)
            opt.step()
            pruned = opt.prune_mask(p)[keep]
            count = round(0.251 * p.numel())
            assert pruned[:count].all() and not pruned[count:].any()
    finally:
        torch.set_num_threads(usual)


def test_the_version_of_what_is_pruned_without_a_gradient_counts(backend):
    """Autograd must notice: only the selection writes to it."""
    a, b = parameters([(8, 8), (8, 8)])
    opt = fuseopt.SGD([a, b], lr=0.1, prune=Prune(0.5), backend=backend)
    a.grad = torch.ones_like(a)
    before = b._version
    opt.step()
    assert (b == 0).any() and b._version > before
