"""opt.mask: by name, pattern and function; masks that are recomputed; the ready ones of fuseopt.masks."""

import copy
import io
from functools import partial

import pytest
import torch
from cases import (
    BF16,
    BY_NAME,
    F16,
    F32,
    F64,
    Snapshot,
    all_params,
    assert_same_bits,
    assert_same_state,
    element_mask,
    ident,
    like,
    parameters,
    run,
    set_gradients,
)

import fuseopt
from fuseopt import EMA, Prune, cpu, masks, ranking, verify

SHAPES = [(33, 31), (40, 25), (37,), (5, 4, 3, 3), (1,)]


def named(params):
    return [(f"layer{k}.{'weight' if p.dim() > 1 else 'bias'}", p) for k, p in enumerate(params)]


def kept(opt, p):
    """The user's mask of a parameter as a checkpoint holds it; None where there is none."""
    index = [id(q) for q in all_params(opt)].index(id(p))
    keep = opt.state_dict()["state"].get(index, {}).get("mask_keep")
    return None if keep is None else keep.expand(p.shape)


def coarse_gradients(params, t, dtype=None):
    """With many equal magnitudes."""
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = (torch.randint(-6, 7, p.shape, generator=generator) / 4).to(p.dtype)


def plain_ranking(scores, share):
    """The mask that keeps round(share * n) of all entries, by a stable sort; NaN last."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    order = torch.sort(flat.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf), descending=True, stable=True)
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[order.indices[: round(share * len(flat))]] = True
    parts = keep.split([s.numel() for s in scores])
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


# ---- names, patterns, functions -------------------------------------------------------------------


def test_names_and_patterns(backend):
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(named(params), backend=backend)
    opt.mask("*.bias", torch.tensor(False))
    assert [kept(opt, p) is not None for p in params] == [False, False, True, False, True]
    opt.mask("*.bias", torch.tensor(True))
    assert not any(kept(opt, p) is not None for p in params)
    opt.mask("layer[13].weight", keep=lambda p: p > 0, mode="grad")
    for k in (1, 3):
        assert torch.equal(kept(opt, params[k]), params[k] > 0) and not opt.state[params[k]]["mask_freeze"]
    assert kept(opt, params[0]) is None
    opt.mask("*", keep=masks.nonzero)
    assert all(kept(opt, p) is None for p in params), "all True removes a mask"


def test_an_exact_name_is_no_pattern(backend):
    a, b = parameters([(3,), (3,)])
    opt = fuseopt.AdamW([("w[0]", a), ("w0", b)], backend=backend)
    opt.mask("w[0]", torch.arange(3) > 0)
    assert kept(opt, a) is not None and kept(opt, b) is None


def test_a_star_needs_no_names(backend):
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(params, backend=backend)
    opt.mask("*", keep=lambda p: p < 0)
    assert all(torch.equal(kept(opt, p), p < 0) for p in params)
    with pytest.raises(ValueError, match=r"'\*.bias', as the optimizer was given no names.*named_parameters"):
        opt.mask("*.bias", torch.tensor(False))


REFUSED = {
    "no match": (("*.gamma", torch.tensor(False)), {}, ValueError, r"'\*.gamma'.*pattern; names are 'layer0.weight'"),
    "both": (("*", torch.tensor(False)), {"fn": masks.Fisher(0.1)}, TypeError, "either keep or fn"),
    "neither": (("*",), {}, TypeError, "'layer0.weight'.*NoneType"),
    "every alone": (("*", torch.tensor(False)), {"every": 3}, TypeError, "every: 3"),
    "every 0": (("*",), {"fn": masks.Fisher(0.1), "every": 0}, ValueError, "every: 0"),
    "every True": (("*",), {"fn": masks.Fisher(0.1), "every": True}, ValueError, "every: True"),
    "fn": (("*",), {"fn": 3}, TypeError, "fn: 3"),
    "a class": (("*",), {"fn": masks.Fisher}, TypeError, r"masks.Fisher\(0.1\)"),
    "ranking as keep": (("*", masks.Fisher(0.1)), {}, TypeError, r"layer0.weight.*fn=fuseopt.masks.Fisher\(0.1\)"),
    "class as keep": (("*", masks.Random), {}, TypeError, r"layer0.weight.*fn=fuseopt.masks.Random\(0.1\)"),
    "keep's as fn": (("*",), {"fn": masks.nonzero}, TypeError, "masks.nonzero.*keep="),
    "mode": (("*",), {"fn": masks.Fisher(0.1), "mode": "held"}, ValueError, "'held'"),
    # fits the first parameter alone: nothing may be set before all are checked
    "second shape": (("layer[01].weight", torch.ones(33, 31, dtype=torch.bool) > 2), {}, ValueError, "layer1.*33, 31"),
    "function's shape": (("*", lambda p: torch.zeros(33, 31) > 0), {}, ValueError, "layer1.*33, 31"),
    "function's type": (("*", lambda p: p), {}, TypeError, "layer0.*float32"),
    "function raises": (("*", lambda p: p.new_ones(p.shape[1]) > 0), {}, IndexError, "out of range"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_changes_nothing(kind, backend):
    arguments, more, error, message = REFUSED[kind]
    params = parameters(SHAPES)
    opt = run(fuseopt.AdamW(named(params), backend=backend), params)
    opt.mask(params[0], element_mask(params[0]))
    before = Snapshot(opt)
    with pytest.raises(error, match=message):
        opt.mask(*arguments, **more)
    before.assert_unchanged()
    assert not opt._dynamic


@pytest.mark.parametrize("make", [
    lambda: masks.Fisher(1.1), lambda: masks.TopGradient(-0.1), lambda: masks.Movement(True),
    lambda: masks.Random("a"), lambda: masks.Fisher(float("nan")),
    lambda: masks.Fisher(0.1, "model"), lambda: masks.Random(0.1, 0.5),
    lambda: masks.new_rows(torch.ones(3, 2), 4), lambda: masks.new_rows(torch.ones(3, 2), -1),
    lambda: masks.new_rows(torch.ones(()), 1),
])  # fmt: skip
def test_arguments_of_the_ready_masks(make):
    with pytest.raises(ValueError, match="Invalid"):
        make()


def test_a_pruned_model_stays_pruned(backend):
    p = parameters([(30, 20)])[0]
    p.data[element_mask(p)] = 0.0
    zeros = p == 0
    opt = fuseopt.AdamW([p], lr=0.1, weight_decay=0.1, ema=EMA(0.5), backend=backend)
    opt.mask(p, keep=masks.nonzero)
    run(opt, [p], 4)
    assert torch.equal(p == 0, zeros) and torch.equal(opt.state[p]["ema_0"] == 0, zeros)


def test_new_rows_of_an_embedding(backend):
    p = parameters([(30, 20)])[0]
    before = p.detach().clone()
    opt = fuseopt.AdamW([("embedding", p)], lr=0.1, weight_decay=0.1, backend=backend)
    opt.mask("embedding", keep=partial(masks.new_rows, first=25))
    assert opt.state[p]["mask_keep"].numel() == 4, "one bit a row"
    run(opt, [p], 4)
    assert_same_bits(p[:25], before[:25])
    assert (p[25:] != before[25:]).all()


# ---- the ready masks against plain torch ------------------------------------------------------------


READY = {
    "TopGradient": (masks.TopGradient, lambda w, gs: gs[-1].abs()),
    "Fisher": (masks.Fisher, lambda w, gs: sum(g.square() for g in gs)),
    "Movement": (masks.Movement, lambda ws, gs: sum(-g * w for g, w in zip(gs, ws, strict=True))),
}


@pytest.mark.parametrize("dtype", (F32, F64, BF16), ids=ident)
@pytest.mark.parametrize("scope", ("tensor", "global"))
@pytest.mark.parametrize("name", READY)
def test_ready_masks_keep_what_plain_torch_would(name, scope, dtype, backend):
    """At every third step; in between they stay. A parameter without gradient at a step is left out."""
    make, score = READY[name]
    params = [torch.nn.Parameter((p.detach() * 4).round().to(dtype) / 4) for p in parameters(SHAPES)]
    opt = fuseopt.SGD(params, lr=2.0**-6, backend=backend)
    opt.mask("*", fn=make(0.3, scope), every=3)
    history = {p: ([], []) for p in params}
    for t in range(1, 8):
        coarse_gradients(params, t)
        if t == 4:
            params[1].grad = None
        there = [p for p in params if p.grad is not None]
        for p in there:
            wide = F64 if dtype == F64 else F32
            history[p][0].append(p.detach().to(wide, copy=True)), history[p][1].append(p.grad.to(wide))
        before = [kept(opt, p) for p in params]
        opt.step()
        if t % 3 == 1:
            scores = [score(*history[p]) for p in there]
            expected = plain_ranking(scores, 0.3) if scope == "global" else [plain_ranking([s], 0.3)[0] for s in scores]
            for p, keep in zip(there, expected, strict=True):
                assert torch.equal(kept(opt, p), keep), (t, p.shape)
            assert t != 4 or torch.equal(kept(opt, params[1]), before[1])
        else:
            assert all(torch.equal(kept(opt, p), keep) for p, keep in zip(params, before, strict=True)), t


def test_movement_follows_what_is_minimised(backend):
    """With maximize the gradient's sign turns: scores are those of a minimised run on the turned gradient."""
    found = []
    for maximize in (False, True):
        p = parameters([(20, 10)])[0]
        opt = fuseopt.SGD([p], lr=0.1, maximize=maximize, backend=backend)
        opt.mask(p, fn=masks.Movement(0.5), every=2)
        for t in range(1, 4):
            set_gradients([p], t, -1.0 if maximize else 1.0)
            opt.step()
        found.append((kept(opt, p), p.detach()))
    assert all(map(torch.equal, *found))


def test_random_masks(backend):
    """Exactly the share, another at each recomputation, the same again from the same seed."""

    def drawn(seed, steps):
        params = parameters(SHAPES)
        opt = fuseopt.AdamW(params, backend=backend)
        opt.mask("*", fn=masks.Random(0.3, seed), every=2)
        run(opt, params, steps)
        return [kept(opt, p) for p in params]

    first = drawn(0, 1)
    assert [int(keep.sum()) for keep in first] == [round(0.3 * keep.numel()) for keep in first]
    assert all(map(torch.equal, first, drawn(0, 2)))
    for other in (drawn(0, 3), drawn(1, 1)):
        assert not any(map(torch.equal, first[:4], other[:4]))
    a, b = (x[:500] for x in (first[0].flatten(), first[1].flatten()))
    assert not torch.equal(a, b), "two parameters draw from one stream"


@pytest.mark.parametrize("share", (0.0, 1.0))
def test_shares_of_nothing_and_of_all(share, backend):
    params = parameters(SHAPES)
    before = [p.detach().clone() for p in params]
    opt = fuseopt.AdamW(params, backend=backend)
    opt.mask("*", fn=masks.TopGradient(share, "global"), every=2)
    run(opt, params)
    for p, old in zip(params, before, strict=True):
        assert torch.equal(kept(opt, p), torch.full(p.shape, bool(share))), "one that keeps all stays"
        assert bool((p == old).all()) == (not share)


def test_not_a_number_comes_last(backend):
    p = parameters([(4, 5)])[0]
    opt = fuseopt.AdamW([p], backend=backend)
    opt.mask(p, fn=masks.TopGradient(0.5))
    p.grad = torch.ones(4, 5)
    p.grad[:, 0], p.grad[0, 1:] = torch.nan, torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    p.grad[3] = torch.nan
    opt.step()
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[0, 1:3] = expected[1:3, 1:] = True  # ten entries: two infinite, eight of ones
    assert torch.equal(kept(opt, p), expected)
    assert torch.isfinite(p[1:]).all()


@pytest.mark.parametrize("dtype", (F32, F64), ids=ident)
def test_the_ranking_on_values_of_every_kind(dtype):
    """Signed zeros are equal, subnormals are told apart, NaN of either sign is last."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = [
        0.0,
        -0.0,
        tiny,
        -tiny,
        1.0,
        -1.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        -torch.nan,
        1 + torch.finfo(dtype).eps,
    ]
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor(values, dtype=dtype)[torch.randint(len(values), (300,), generator=generator)]
    for count in (1, 20, 60, 100, 150, 200, 260, 299):
        plain = x.clone()
        plain[plain.isnan()] = -torch.inf
        expected = torch.zeros(300, dtype=torch.bool)
        expected[torch.sort(plain, descending=True, stable=True).indices[:count]] = True
        (found,) = ranking.largest([x], [x], count / 300, False)
        assert torch.equal(found, expected), count


# ---- functions of one's own --------------------------------------------------------------------------


def test_a_function_sees_the_parameter_its_gradient_and_its_state(backend):
    params = parameters([(6, 5), (7,)])
    opt = fuseopt.AdamW(params, backend=backend)
    seen = []

    def fn(param, grad, state):
        assert not torch.is_grad_enabled()
        seen.append((param, grad.clone(), state is opt.state[param]))
        return grad > 0

    opt.mask("*", fn=fn, every=3)
    for t in range(1, 6):
        set_gradients(params, t)
        before = [p.detach().clone() for p in params]
        opt.step()
        assert len(seen) == (2 if t in (1, 4) else 0)
        for p, old, (param, grad, own) in zip(params, before, seen, strict=False):
            assert param is p and own and torch.equal(grad, p.grad)
            assert torch.equal(kept(opt, p), grad > 0) and torch.equal(p == old, ~(grad > 0))
        seen.clear()


def test_masks_of_any_shape_that_broadcasts(backend):
    """A row mask stays a row mask in memory, and is saved in the parameter's shape."""
    p, q = parameters([(64, 48), (64, 48)])
    opt = fuseopt.AdamW([p, q], backend=backend)
    opt.mask(p, fn=lambda p, g, state: g.sum(1, keepdim=True) > 0, every=2)
    opt.mask(q, fn=lambda p, g, state: torch.tensor(False))
    before = p.detach().clone(), q.detach().clone()
    run(opt, [p, q], 1)
    assert opt.state[p]["mask_keep"].numel() == 8 and opt.state_dict()["state"][0]["mask_keep"].shape == p.shape
    assert torch.equal(p != before[0], (p.grad.sum(1, keepdim=True) > 0).expand(p.shape))
    assert_same_bits(q, before[1])


def test_a_scaled_gradient_is_unscaled_first(backend):
    p = parameters([(6, 5)], F16)[0]
    opt = fuseopt.AdamW([p], backend=backend)
    grads = []
    opt.mask(p, fn=lambda p, g, state: grads.append(g) or g > 0)
    p.grad = torch.full((6, 5), 2.0**-10, dtype=F16)
    opt.grad_scale = torch.tensor(2.0**20)
    opt.step()
    assert grads[0].dtype == F32 and torch.equal(grads[0], torch.full((6, 5), 2.0**-30)), "lost in fp16"
    p = parameters([(6, 5)])[0]
    opt = fuseopt.SGD([p], lr=0.0, backend=backend)
    opt.mask(p, fn=masks.Fisher(0.5), every=9)
    opt.grad_scale = torch.tensor(8.0)
    p.grad = torch.full((6, 5), 8.0)
    opt.step()
    assert torch.equal(opt.state[p]["mask_score"], torch.ones(6, 5))


def test_a_skipped_step_calls_nothing(backend):
    p = parameters([(6, 5)])[0]
    opt = fuseopt.AdamW([p], backend=backend)
    calls = []
    opt.mask(p, fn=lambda p, g, state: calls.append(1) or g > 0)
    set_gradients([p], 1)
    before = Snapshot(opt)
    opt.found_inf = torch.tensor(2.0)
    opt.step()
    before.assert_unchanged()
    assert not calls
    opt.found_inf = None
    opt.step()
    opt.step()
    assert calls == [1], "once, at the next step that is taken"


def test_a_parameter_without_a_gradient_keeps_its_mask_and_has_it_computed_once_it_has_one(backend):
    p, q = parameters([(6, 5), (6, 5)])
    opt = fuseopt.AdamW([p, q], backend=backend)
    opt.mask("*", fn=lambda p, g, state: g > 0, every=4)
    set_gradients([p], 1)
    opt.step()
    assert kept(opt, q) is None or kept(opt, q).all()
    set_gradients([p, q], 2)
    first = kept(opt, p)
    opt.step()
    assert torch.equal(kept(opt, q), q.grad > 0) and torch.equal(kept(opt, p), first)
    q.grad, old = None, kept(opt, q)
    for t in (3, 4, 5):
        set_gradients([p], t)
        opt.step()
    assert torch.equal(kept(opt, p), p.grad > 0) and torch.equal(kept(opt, q), old)


def test_a_mask_that_is_there_holds_until_the_first_step_that_is_due(backend):
    p = parameters([(6, 5)])[0]
    opt = fuseopt.AdamW([p], backend=backend)
    opt.mask(p, element_mask(p))
    run(opt, [p], 2)
    opt.mask(p, fn=lambda p, g, state: g > 0, every=4)
    run(opt, [p], 2, first=3)
    assert torch.equal(kept(opt, p), element_mask(p))
    run(opt, [p], 1, first=5)
    assert torch.equal(kept(opt, p), p.grad > 0)


def test_a_static_mask_ends_a_dynamic_one(backend):
    p = parameters([(6, 5)])[0]
    opt = fuseopt.AdamW([p], backend=backend)
    opt.mask(p, fn=masks.Fisher(0.5), every=1)
    run(opt, [p], 2)
    opt.mask(p, element_mask(p))
    assert not {"mask_score", "mask_t"} & opt.state[p].keys() and not opt._dynamic
    run(opt, [p], 2, first=3)
    assert torch.equal(kept(opt, p), element_mask(p))


def test_scores_of_another_mask_do_not_count(backend):
    p = parameters([(6, 5)])[0]
    opt = fuseopt.AdamW([p], lr=0.0, weight_decay=0.0, backend=backend)
    opt.mask(p, fn=masks.Fisher(0.5), every=9)
    run(opt, [p], 2)
    fisher = opt.state[p]["mask_score"]
    opt.mask(p, fn=masks.Fisher(0.5), every=9)  # the same again
    assert torch.equal(opt.state[p]["mask_score"], fisher)
    opt.mask(p, fn=masks.Movement(0.5), every=9)
    run(opt, [p], 1, first=3)
    torch.testing.assert_close(opt.state[p]["mask_score"], -(p.grad * p.detach()))


# ---- a step is whole or not at all --------------------------------------------------------------------


def raises(p, g, state):
    raise ArithmeticError("in fn")


WRONG = {
    "raises": (raises, ArithmeticError, "in fn"),
    "shape": (lambda p, g, state: torch.ones(3, 3) > 0, ValueError, "'layer2.bias'.*3, 3"),
    "type": (lambda p, g, state: g, TypeError, "'layer2.bias'.*float32.*boolean"),
    "nothing": (lambda p, g, state: None, TypeError, "'layer2.bias'.*NoneType"),
}


@pytest.mark.parametrize("steps", (0, 2))
@pytest.mark.parametrize("kind", WRONG)
def test_a_function_that_fails_changes_nothing(kind, steps, backend):
    """Even of parameters whose mask or score was there before; the next step is due again."""
    fn, error, message = WRONG[kind]
    params, twins = parameters(SHAPES), parameters(SHAPES)
    opts = [fuseopt.AdamW(named(x), ema=EMA(0.9), backend=backend) for x in (params, twins)]
    for opt, x in zip(opts, (params, twins), strict=True):
        opt.mask("*.weight", fn=masks.Fisher(0.5), every=1)
        run(opt, x, steps)
    opt = opts[0]
    opt.mask("layer2.bias", fn=fn, every=1)
    set_gradients(params, 9)
    before = Snapshot(opt)
    with pytest.raises(error, match=message):
        opt.step()
    before.assert_unchanged()
    for one in opts:
        one.mask("layer2.bias", torch.tensor(True))
    set_gradients(twins, 9)
    opts[0].step(), opts[1].step()
    assert_same_state(*opts)


def test_other_bad_input_leaves_masks_as_they_were(backend):
    """A gradient that cannot be stepped, and a sparsity that the new mask does not leave room for."""
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(named(params), prune=Prune(0.6, begin=3), backend=backend)
    opt.mask("*.weight", fn=masks.TopGradient(0.5), every=2)
    run(opt, params, 2)
    set_gradients(params, 3)
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="sparsity"):
        opt.step()
    before.assert_unchanged()
    params[4].grad = torch.zeros(1).to_sparse()
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    before.assert_unchanged()


@pytest.mark.parametrize("ready", (masks.Fisher(0.5, "global"), masks.TopGradient(0.5)), ids=ident)
def test_an_interrupted_step_is_whole_or_not_at_all(ready, backend):
    from test_interrupts import Interrupts, tried_until_taken

    outcomes, rounds = set(), 0
    with Interrupts() as interrupted:
        while rounds < 10 or (rounds < 200 and not {(True, False), (False, True)} <= outcomes):
            rounds += 1
            params, twins = parameters(SHAPES), parameters(SHAPES)
            a, b = (fuseopt.AdamW(x, ema=EMA(0.9), backend=backend) for x in (params, twins))
            a.mask("*", fn=ready, every=2), b.mask("*", fn=ready, every=2)
            for t in range(1, 6):
                set_gradients(params, t), set_gradients(twins, t)
                outcomes |= tried_until_taken(interrupted, (a, params), (b, twins))
    assert (True, False) in outcomes and (False, True) in outcomes, "no interrupt fell into a step"


# ---- checkpoints --------------------------------------------------------------------------------------

EVERY_READY = {
    "TopGradient": masks.TopGradient(0.3, "global"),
    "Fisher": masks.Fisher(0.3),
    "Movement": masks.Movement(0.3, "global"),
    "Random": masks.Random(0.3, 5),
    "function": lambda p, g, state: g + state["exp_avg"] > 0,
}


@pytest.mark.parametrize("dtype", (F32, F64, BF16), ids=ident)
@pytest.mark.parametrize("when", ("before", "after", "both"))
@pytest.mark.parametrize("name", EVERY_READY)
def test_a_run_that_is_saved_and_resumed_goes_on_as_if_uninterrupted(name, when, dtype, backend):
    """At any step, with fn set before loading, after it, or both."""
    fn = EVERY_READY[name]
    for at in range(0, 6):
        params = parameters(SHAPES, dtype)
        opt = fuseopt.AdamW(named(params), lr=0.01, ema=EMA(0.9), max_grad_norm=1.0, backend=backend)
        set_masks = lambda opt: (opt.mask("*.weight", fn=fn, every=3), opt.mask("*.bias", fn=fn, every=2, mode="grad"))
        set_masks(opt)
        run(opt, params, at)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        twins = like(params)
        run(opt, params, 7 - at, first=at + 1)
        other = fuseopt.AdamW(named(twins), lr=0.5, ema=EMA(0.9), max_grad_norm=1.0, backend=backend)
        if when != "after":
            set_masks(other)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        if when != "before":
            set_masks(other)
        run(other, twins, 7 - at, first=at + 1)
        assert_same_state(opt, other)


def test_a_function_is_lost_by_deepcopy_and_the_mask_is_not(backend):
    p = parameters([(6, 5)])[0]
    opt = fuseopt.AdamW([p], backend=backend)
    opt.mask(p, fn=masks.Fisher(0.5), every=1)
    run(opt, [p], 2)
    other = copy.deepcopy(opt)
    (q,) = all_params(other)
    keep = kept(opt, p)
    run(other, [q], 1, first=3)
    assert torch.equal(kept(other, q), keep)


def test_a_score_that_does_not_fit_is_refused(backend):
    p = parameters([(6, 5)])[0]
    opt = fuseopt.AdamW([("w", p)], backend=backend)
    opt.mask(p, fn=masks.Fisher(0.5), every=1)
    run(opt, [p], 1)
    saved = opt.state_dict()
    saved["state"][0]["mask_score"] = torch.zeros(6, 4)
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="mask_score.*6, 4"):
        opt.load_state_dict(saved)
    before.assert_unchanged()
    opt.state[p]["mask_score"] = torch.zeros(6, 4)
    set_gradients([p], 2)
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="mask_score.*'w'.*6, 4"):
        opt.step()
    before.assert_unchanged()


# ---- what holds between recomputations -----------------------------------------------------------------


FROZEN_UNDER = [
    (rule, {"max_grad_norm": norm, "l1": l1, "ema": EMA(0.5)})
    for rule in BY_NAME.values()
    for norm, l1 in ((None, 0.0), (0.5, 0.1))
]


@pytest.mark.parametrize(("rule", "options"), FROZEN_UNDER, ids=lambda x: ident(x) if hasattr(x, "name") else "")
def test_frozen_entries_keep_their_bits_until_the_mask_changes(rule, options, backend):
    """Parameter, moments and averages, whatever decay, momentum and clipping do; the mask changes every 2 steps."""
    params = parameters([(33, 31), (128,)])
    opt = rule.ours(params, **options, backend=backend)
    opt.mask("*", fn=masks.Random(0.6), every=2)
    run(opt, params, 1)  # which makes moments and averages
    for t in range(2, 8):
        before = [(p.detach().clone(), {k: v.clone() for k, v in tensors(opt, p)}) for p in params]
        run(opt, params, 1, first=t)
        for p, (old, state) in zip(params, before, strict=True):
            frozen = ~kept(opt, p)
            assert frozen.any()
            assert_same_bits(p[frozen], old[frozen], f"step {t}")
            assert (p[~frozen] != old[~frozen]).any()
            for key, value in tensors(opt, p):
                assert_same_bits(value[frozen], state[key][frozen], f"step {t} {key}")


def tensors(opt, p):
    """Everything of the parameter's shape in its state."""
    return [(k, v) for k, v in opt.state[p].items() if isinstance(v, torch.Tensor) and v.shape == p.shape]


def test_the_norm_leaves_out_what_the_new_mask_drops(backend):
    """Of the mask that the step itself has computed, not of the one before."""
    params = parameters(SHAPES)
    opt = fuseopt.SGD(params, lr=0.1, max_grad_norm=0.5, statistics=True, backend=backend)
    opt.mask("*", fn=lambda p, g, state: g > 0.5, every=1)
    for t in range(1, 4):
        set_gradients(params, t)
        expected = torch.cat([p.grad[p.grad > 0.5] for p in params]).double().norm()
        before = [p.detach().clone() for p in params]
        opt.step()
        assert opt.statistics()["grad_norm"] == pytest.approx(float(expected), rel=1e-12)
        for p, old in zip(params, before, strict=True):
            new = torch.where(p.grad > 0.5, old - 0.1 * p.grad * 0.5 / (expected.float() + 1e-6), old)
            torch.testing.assert_close(p.detach(), new)


# ---- a tensor that is frozen wholly -------------------------------------------------------------------


def freezes_all(form):
    """Every way to freeze the whole of a parameter."""
    return {
        "one": lambda p: torch.tensor(False),
        "rows": lambda p: torch.zeros(p.shape[0], *[1] * (p.dim() - 1), dtype=torch.bool),
        "elements": lambda p: torch.zeros(p.shape, dtype=torch.bool),
    }[form]


@pytest.mark.parametrize("statistics", (False, True))
@pytest.mark.parametrize("form", ("one", "rows", "elements"))
def test_a_tensor_wholly_frozen_changes_in_its_count_alone(form, statistics, backend):
    params, twins = parameters([(40, 33), (2000, 41), (37,)]), parameters([(40, 33), (2000, 41), (37,)])
    options = {"lr": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.5, "ema": [EMA(0.5), EMA(0.9)]}
    opt = fuseopt.AdamW(params, **options, statistics=statistics, backend=backend)
    run(opt, params, 2)
    opt.mask(params[1], keep=freezes_all(form))
    alone = fuseopt.AdamW(twins, **options, backend=backend)
    run(alone, twins, 2)
    before = params[1].detach().clone(), {k: v.clone() for k, v in tensors(opt, params[1])}
    for t in (3, 4):
        set_gradients(params, t), set_gradients(twins, t)
        params[1].grad.fill_(torch.nan)  # must not reach the norm either
        twins[1].grad = None
        opt.step(), alone.step()
    assert_same_bits(params[1], before[0])
    for key, value in tensors(opt, params[1]):
        assert_same_bits(value, before[1][key], key)
    assert opt.state[params[1]]["step"] == 4
    for k in (0, 2):
        assert_same_bits(params[k], twins[k])
    if statistics:
        assert opt.statistics()["param_norm"] == pytest.approx(
            float(torch.cat([p.detach().double().flatten() for p in params]).norm()), rel=1e-12
        )


@pytest.mark.skipif(cpu.native_error() is not None, reason="needs the compiled pass")
def test_a_tensor_wholly_frozen_is_not_visited():
    """Its memory is not touched: what cannot be read does not matter, and it counts no bytes."""
    import mmap

    p, q = parameters([(64, 64), (64, 64)])
    opt = fuseopt.AdamW([p, q], max_grad_norm=1.0, ema=EMA(0.9))
    run(opt, [p, q], 2)
    full = opt.explain().bytes_per_step
    opt.mask(q, torch.tensor(False))
    assert opt.explain().bytes_per_step == full / 2 and opt.explain().rows[0]["elements"] == 2 * p.numel()
    opt.mask(p, fn=masks.Fisher(0.5), every=10)
    assert opt.explain().rows[0]["masks"] == p.numel() * (4 + 8) + 1  # its mask is not made yet
    opt.mask(p, torch.tensor(True))
    held = mmap.mmap(-1, q.numel() * 4)
    for change in ("p", "grad", "exp_avg", "exp_avg_sq", "ema_0"):
        unreadable = torch.frombuffer(held, dtype=F32).reshape(q.shape)
        if change == "p":
            q.data = unreadable
        elif change == "grad":
            q.grad = unreadable
        else:
            opt.state[q][change] = unreadable
    forbid(held, 0)
    try:
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        opt.step()
        assert not torch.equal(p, before)
    finally:
        forbid(held, mmap.PROT_READ | mmap.PROT_WRITE)


def forbid(memory, rights: int) -> None:
    """mprotect: with rights 0 any access ends the process."""
    import ctypes

    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), rights) == 0, ctypes.get_errno()


# ---- the checker ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", EVERY_READY.values(), ids=EVERY_READY)
@pytest.mark.parametrize("mode", ("freeze", "grad"))
def test_verify_follows_masks_that_change(fn, mode, backend):
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(
        named(params), lr=0.01, weight_decay=0.1, max_grad_norm=0.5, ema=[EMA(0.9), EMA(0.99, warmup="timm")],
        prune=Prune(0.2, begin=2, end=4, every=2), statistics=True, backend=backend,
    )  # fmt: skip
    opt.mask("*", fn=fn, every=3, mode=mode)
    checker = verify.attach(opt)
    run(opt, params, 4)
    opt.mask("layer1.weight", torch.tensor(False))  # wholly frozen
    run(opt, params, 4, first=5)
    assert checker.report().passed, str(checker.report())


@pytest.mark.parametrize("what", ("p", "exp_avg", "ema_0"))
def test_verify_finds_a_frozen_entry_that_moved(what, backend):
    """Of a mask that changed in the very step."""
    p = parameters([(20, 10)])[0]
    opt = fuseopt.AdamW([p], lr=0.01, ema=EMA(0.9), backend=backend)
    opt.mask(p, fn=masks.TopGradient(0.5), every=2)
    run(opt, [p], 2)

    def move(opt, args, kwargs):
        x = p.detach() if what == "p" else opt.state[p][what]
        x[(~kept(opt, p)).nonzero()[0].tolist()] *= 1.001

    opt.register_step_post_hook(move)
    checker = verify.attach(opt)
    run(opt, [p], 1, first=3)
    assert not checker.report().passed


def test_a_dynamic_mask_keeps_its_schedule_where_every_parameter_missed_a_step(backend):
    """The state's own counters then lag behind the optimizer's, and the checkpoint must tell it."""
    first, second = [torch.nn.Parameter(torch.randn(4, 8)) for _ in range(2)]

    def make(*params):
        opt = fuseopt.AdamW(params, lr=0.1, backend=backend)
        opt.mask(params[0], fn=lambda p, grad, state: grad > 0, every=3)
        return opt

    opt = make(first, second)
    for skipped in (None, first, second):
        for p in (first, second):
            p.grad = None if p is skipped else torch.randn_like(p)
        opt.step()
    saved = copy.deepcopy(opt.state_dict())
    copies = [torch.nn.Parameter(p.detach().clone()) for p in (first, second)]
    resumed = make(*copies)
    resumed.load_state_dict(saved)
    for _ in range(3):
        for p, q in zip((first, second), copies, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        opt.step(), resumed.step()
        assert torch.equal(first, copies[0])
