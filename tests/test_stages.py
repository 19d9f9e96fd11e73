"""The stages around the rule, alone and together: against the recipe, the oracle, and direct computation."""

import math
from dataclasses import asdict

import pytest
import torch
from cases import (
    BF16,
    BY_NAME,
    COUNTERS,
    DTYPES,
    EMA_ONE_STEP,
    F32,
    F64,
    FUSED_RULES,
    ONE_EACH,
    ONE_STEP,
    SIZES,
    STAGES,
    STEPS,
    SUMS,
    Rule,
    Snapshot,
    Stage,
    assert_close,
    assert_same_bits,
    assert_same_state,
    bits,
    element_mask,
    gradient,
    ident,
    like,
    parameters,
    run,
    set_gradients,
    synchronise,
)
from recipe import Recipe

import fuseopt
from fuseopt import EMA, Prune

# ---- every stage against the recipe (bits) and the oracle (tolerance) -----------------------------


def timm(t: int) -> float:
    """timm's ModelEmaV3(decay=0.999, use_warmup=True): get_decay(step) with step = t - 1."""
    step = max(0, t - 1)
    return 0.0 if step == 0 else max(0.0, min(0.999, 1 - (1 + step / 1.0) ** -(2 / 3)))


def element_masks(params):
    return [element_mask(p, k) for k, p in enumerate(params)]


RECIPES = {  # options of fuseopt, options of the recipe
    "unscale": ({}, {"scale": 3.0}),
    "freeze": ({}, {"mode": "freeze"}),
    "grad": ({}, {"mode": "grad"}),
    "clip": ({"max_grad_norm": 0.5}, {}),
    "clip-freeze": ({"max_grad_norm": 0.5}, {"mode": "freeze"}),
    "l1": ({"l1": 0.3}, {}),
    "threshold": ({"prune": Prune(threshold=0.4)}, {"threshold": 0.4}),
    "threshold-keep": ({"prune": Prune(threshold=0.4, moments="keep")}, {"threshold": 0.4, "keep_moments": True}),
    "sparsity": ({"prune": Prune(0.5, begin=2)}, {"prune": {2: 0.5}}),
    "ema": ({"ema": [EMA(0.25), EMA(0.999, warmup="timm"), EMA(0.9999)]}, {"ema": (0.25, timm, 0.9999)}),
    "everything": (
        {"max_grad_norm": 0.5, "l1": 0.3, "prune": Prune(threshold=0.4), "ema": [EMA(0.9), EMA(0.999, "timm")]},
        {"scale": 3.0, "mode": "freeze", "threshold": 0.4, "ema": (0.9, timm)},
    ),
    "everything-sparsity": (
        {"max_grad_norm": 0.5, "l1": 0.3, "prune": Prune(0.5, begin=1, end=3, every=2, schedule="linear"), "ema": EMA(0.9)},
        {"scale": 3.0, "mode": "freeze", "prune": {1: 0.0, 3: 0.5}, "ema": (0.9,)},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("rule", FUSED_RULES, ids=ident)
def test_equals_torch_with_separate_passes_bit_for_bit(rule: Rule, name):
    options, by_hand = RECIPES[name]
    params = parameters([(16, 64), (64,), (32, 48)])
    if rule.cls is fuseopt.Adagrad and "mode" in by_hand and by_hand["mode"] == "freeze":
        rule = Rule(rule.name, rule.cls, {**rule.options, "initial_accumulator_value": 0.0})
    keep = element_masks(params) if "mode" in by_hand else None
    recipe = Recipe(
        rule, like(params), keep=keep, max_grad_norm=options.get("max_grad_norm"), l1=options.get("l1", 0.0), **by_hand
    )
    opt = rule.ours(params, backend="cpu", **options)
    for k, p in enumerate(params if keep else ()):
        opt.mask(p, keep[k], by_hand["mode"])
    if "scale" in by_hand:
        opt.grad_scale = torch.tensor(by_hand["scale"])
    if "threshold" in by_hand:  # a vector is not pruned, but the recipe's threshold would
        recipe.params[1].data.add_(10), params[1].data.add_(10)
    for t in range(1, 5):
        set_gradients(params, t, 0.5)
        before = [p.grad for p in params]
        opt.step()
        recipe.step([g.clone() for g in before])
        for k, (p, q) in enumerate(zip(params, recipe.params, strict=True)):
            assert_same_bits(p, q, f"step {t} parameter {k}")
            for key, value in recipe.torchs.state[q].items():
                if value is not None:
                    assert_same_bits(opt.state[p][key], value, f"step {t} parameter {k} {key}")
            for j, average in enumerate(recipe.averages):
                assert_same_bits(opt.state[p][f"ema_{j}"], average[k], f"step {t} parameter {k} ema_{j}")
            if p.dim() >= 2 and "prune" in options:
                pruned = opt.prune_mask(p)
                assert torch.equal(recipe.pruned[k], torch.zeros_like(recipe.pruned[k]) if pruned is None else pruned)


def oracle_cases():
    """Everything on tails; on whole blocks and on the torch backend, what may differ there."""
    for backend, sizes, dtypes in (("cpu", "tails", DTYPES), ("cpu", "blocks", (F32, BF16)), ("torch", "tails", (F32, BF16))):
        for rule in ONE_EACH if sizes == "tails" else (BY_NAME["adamw"], BY_NAME["sgd"]):
            for stage in STAGES:
                for dtype in dtypes:
                    if "sparsity" not in stage.name or dtype in (F32, F64):  # 16 bits: ranks what is stored
                        name = f"{backend}-{sizes}-{rule.name}-{stage.name}-{ident(dtype)}"
                        yield pytest.param(backend, sizes, rule, stage, dtype, id=name)


@pytest.mark.parametrize(("backend", "sizes", "rule", "stage", "dtype"), list(oracle_cases()), indirect=["backend"])
def test_agrees_with_the_oracle(backend, sizes, rule, stage: Stage, dtype):
    params = parameters(SIZES[sizes], dtype)
    opt = stage.build(rule, params, dtype, backend=backend)
    copies = like(params, F64)
    oracle = stage.build(rule, copies, dtype, backend="torch")
    for t in range(1, STEPS + 1):
        synchronise(oracle, opt)
        set_gradients(params, t)
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.double()
        opt.step(), oracle.step()
        for p, q in zip(params, copies, strict=True):
            assert_close(p, q, ONE_STEP[dtype], f"step {t} {tuple(p.shape)}")
            assert opt.state.get(p, {}).keys() == oracle.state.get(q, {}).keys()
            for key, value in opt.state.get(p, {}).items():
                other = oracle.state[q][key]
                if key in COUNTERS or key.startswith(("mask_", "prune_")):
                    assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
                else:  # an average follows the stored parameter, the oracle's the unrounded one
                    bound = (EMA_ONE_STEP if key.startswith("ema_") else ONE_STEP)[dtype]
                    assert_close(value, other, bound, f"step {t} {key}")
        if opt.defaults["statistics"]:
            mine, other = opt.statistics(), oracle.statistics()
            assert mine["zeros"] == other["zeros"] and mine["nonfinite"] == other["nonfinite"] == 0
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=SUMS[dtype])
            assert mine["param_norm"] == pytest.approx(other["param_norm"], rel=SUMS[dtype])


# ---- stages 0 and 1: found_inf, grad_scale -------------------------------------------------------


@pytest.mark.parametrize("found_inf", (1.0, 2.0, 0.5, -1.0, math.inf, math.nan))
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_any_found_inf_skips(rule, found_inf, backend):
    """It may be a sum over devices; torch's fused step writes NaN at 2."""
    params = parameters([(5, 7), (33,)])
    opt = Stage("", {"ema": EMA(0.9), "prune": Prune(0.5, begin=2), "max_grad_norm": 1.0}, "grad").build(
        rule, params, F32, backend=backend
    )
    for steps in (0, 1):  # before there is any state, and after
        run(opt, params, steps)
        set_gradients(params, 9, math.inf)
        before = Snapshot(opt)
        opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor([found_inf])
        opt.step()
        del opt.grad_scale, opt.found_inf
        before.assert_unchanged()


@pytest.mark.parametrize("name", ("adamw", "sgd-nesterov"))
def test_grad_scaler_drives_it_as_it_drives_torch(name, backend):
    """A whole loop with overflow at the first and third step; new and old state in one group."""
    rule = BY_NAME[name]
    results = []
    for make in (lambda p: rule.ours(p, backend=backend), lambda p: rule.torchs(p, fused=None, foreach=False)):
        params = parameters([(8, 8), (16,)], F64)
        opt = make(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        for t in range(1, 7):
            set_gradients(params, t)
            if t == 4:
                params[1].grad = None
            for p in params:
                if p.grad is not None:
                    p.grad *= scaler.get_scale() if t not in (1, 3) else math.inf
            scaler.scale(torch.zeros(1))
            if t == 5:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        results.append((params, scaler.get_scale(), opt))
    (ours, scale, opt), (torchs, other_scale, _) = results
    assert scale == other_scale and not hasattr(opt, "found_inf")
    for p, q in zip(ours, torchs, strict=True):
        assert_close(p, q, (1e-12, 1e-12))


# ---- stages 3 and 9: masks -----------------------------------------------------------------------

BROADCASTS = {  # parameter, mask
    "element": ((6, 70), (6, 70)),
    "row": ((6, 70), (6, 1)),
    "column": ((6, 70), (70,)),
    "long-column": ((5, 1000), (1000,)),
    "short-rows": ((300, 7), (300, 1)),
    "whole": ((6, 70), ()),
    "whole-1x1": ((6, 70), (1, 1)),
    "conv-channel": ((8, 5, 3, 3), (8, 1, 1, 1)),
    "conv-input": ((8, 5, 3, 3), (5, 1, 1)),
    "conv-kernel": ((8, 5, 3, 3), (3, 1)),
    "conv-outer-and-kernel": ((8, 5, 3, 3), (8, 1, 3, 3)),
    "vector": ((33,), (33,)),
    "scalar": ((), ()),
    "blocks": ((17, 1025), (17, 1)),
    "block-columns": ((17, 1025), (1025,)),
}


@pytest.mark.parametrize("memory", ("contiguous", "other"))
@pytest.mark.parametrize("mode", ("freeze", "grad"))
@pytest.mark.parametrize("kind", BROADCASTS)
def test_masks_broadcast(kind, mode, memory, backend):
    """Whatever its shape, a mask does what the same mask written out does; masked entries hold."""
    shape, mask_shape = BROADCASTS[kind]
    keep = torch.rand(mask_shape, generator=torch.Generator().manual_seed(3)) > 0.5
    p = parameters([shape])[0]
    if memory == "other" and p.dim():
        p = torch.nn.Parameter(p.detach().permute(*reversed(range(p.dim()))).contiguous().permute(*reversed(range(p.dim()))))
    q, start = like([p])[0], p.detach().clone()
    assert q.stride() == p.stride()
    rule = BY_NAME["adamw"]
    opt, full = rule.ours([p], backend=backend), rule.ours([q], backend=backend)
    opt.mask(p, keep, mode)
    full.mask(q, keep.expand(shape).clone(), mode)
    run(opt, [p]), run(full, [q])
    moments = ("exp_avg", "exp_avg_sq")
    assert_same_bits(p, q)
    for key in moments:
        assert_same_bits(opt.state[p][key], full.state[q][key], key)
        assert not opt.state[p][key][~keep.expand(shape)].any()
    changed = p != start
    if mode == "freeze":
        assert torch.equal(changed, keep.expand(shape))
    else:  # decay still moves them
        assert changed.all()


def test_masks_take_one_bit_an_element(backend):
    p, q = parameters([(100, 1000), (64, 8, 3, 3)])
    opt = BY_NAME["adam"].ours([p, q], backend=backend)
    for keep, most in ((element_mask(p), 100_000 / 8), (torch.arange(100)[:, None] > 3, 16), (torch.arange(1000) > 3, 128)):
        opt.mask(p, keep)
        assert opt.state[p]["mask_keep"].untyped_storage().nbytes() <= most
    opt.mask(q, torch.arange(64)[:, None, None, None] > 3)
    assert opt.state[q]["mask_keep"].untyped_storage().nbytes() == 8
    opt = BY_NAME["adam"].ours([p], prune=Prune(0.5), backend=backend)
    run(opt, [p], 1)
    assert opt.state[p]["prune_mask"].untyped_storage().nbytes() <= 100_000 / 8


def test_a_mask_can_be_replaced_and_removed(backend):
    p, q = parameters([(5, 7)])[0], parameters([(5, 7)])[0]
    opt, plain = (BY_NAME["sgd"].ours([x], backend=backend) for x in (p, q))
    opt.mask(p, torch.zeros(5, 7, dtype=torch.bool))
    run(opt, [p], 1)
    assert_same_bits(p, q)
    opt.mask(p, torch.tensor(True))
    assert not opt.state[p]
    run(opt, [p], 1), run(plain, [q], 1)
    assert_same_bits(p, q)


def test_masks_by_name(backend):
    model = torch.nn.Linear(3, 4)
    opt = fuseopt.SGD(model.named_parameters(), lr=0.1, backend=backend)
    before = model.bias.detach().clone()
    opt.mask("bias", torch.tensor([True, False, True, False]))
    run(opt, list(model.parameters()))
    assert torch.equal(model.bias != before, torch.tensor([True, False, True, False]))


@pytest.mark.parametrize("mode", ("freeze", "grad"))
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_infinite_and_nan_gradients_stop_at_a_mask(rule, dtype, mode, backend):
    """Select, never multiply: 0*inf is NaN. With clipping on, they must not reach the norm either."""
    for bad in (math.inf, -math.inf, math.nan):
        p = parameters([(3, 41)], dtype)[0]
        opt = rule.ours([p], max_grad_norm=1.0, l1=0.1, backend=backend)
        keep = element_mask(p)
        opt.mask(p, keep, mode)
        for t in (1, 2):
            p.grad = torch.where(keep, gradient(p, 0, t), bad)
            opt.step()
        for x in (p, *(opt.state[p][key] for key in opt.slots(opt.param_groups[0]))):
            assert x.isfinite().all()


def test_grad_mode_is_zeroing_the_gradient(backend):
    p, q = parameters([(40, 3)])[0], parameters([(40, 3)])[0]
    keep = element_mask(p)
    rule = BY_NAME["adamw-amsgrad-maximize"]
    opt, plain = rule.ours([p], backend=backend), rule.ours([q], backend=backend)
    run(opt, [p], 2), run(plain, [q], 2)  # with momentum in the buffers
    opt.mask(p, keep, "grad")
    for t in (3, 4):
        set_gradients([p, q], t)
        q.grad = p.grad.clone()
        q.grad[~keep] = 0
        opt.step(), plain.step()
    assert_same_bits(p, q)
    assert_same_state(opt, plain, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))


def test_a_mask_is_no_gradient_of_negative_zero(backend):
    """-3 * 0 is -0.0; a masked entry's first SGD momentum must be +0.0."""
    p = parameters([(40,)])[0]
    opt = fuseopt.SGD([p], lr=0.1, momentum=0.9, backend=backend)
    opt.mask(p, torch.arange(40) % 2 == 0, "grad")
    p.grad = torch.full((40,), -3.0)
    opt.step()
    assert not bits(opt.state[p]["momentum_buffer"])[1::2].any()


# ---- stage 4: clip -------------------------------------------------------------------------------


def test_clip_is_global_over_groups_and_dtypes(backend):
    """One norm over both groups; the group without max_grad_norm is in the norm and is not scaled."""
    a, b, c = parameters([(5, 7)], F32)[0], parameters([(33,)], F64)[0], parameters([(9,)], BF16)[0]
    opt = fuseopt.SGD(
        [{"params": [a], "max_grad_norm": 0.5}, {"params": [b]}, {"params": [c], "max_grad_norm": 2.0}], lr=1.0, backend=backend
    )
    params = [a, b, c]
    before = [p.detach().clone() for p in params]
    set_gradients(params, 1)
    norm = math.sqrt(sum(p.grad.double().square().sum() for p in params))
    opt.step()
    for p, old, most in zip(params, before, (0.5, math.inf, 2.0), strict=True):
        factor = min(1.0, most / (norm + 1e-6))
        bound = {F32: (1e-6, 1e-6), F64: (1e-14, 1e-14), BF16: (2**-8, 1e-6)}[p.dtype]
        assert_close(p, old.double() - factor * p.grad.double(), bound)


@pytest.mark.parametrize("held", ("freeze", "grad", "pruned", "threshold", "no-grad"))
def test_what_the_step_cannot_change_is_not_in_the_norm(held, backend):
    p, q = parameters([(6, 50), (6, 50)])
    keep = element_mask(p)
    options = {
        "pruned": {"prune": Prune(0.4)},
        "threshold": {"prune": Prune(threshold=0.5)},
    }.get(held, {})
    opt = fuseopt.SGD([p, q], lr=1.0, max_grad_norm=0.1, statistics=True, backend=backend, **options)
    if held in ("freeze", "grad"):
        opt.mask(p, keep, held)
    free = [torch.ones(6, 50, dtype=torch.bool) for _ in (p, q)]
    if held == "no-grad":
        free[0][:] = False
    elif held in ("freeze", "grad"):
        free[0] = keep
    else:
        run(opt, [p, q], 1)
        free = [~opt.prune_mask(x) for x in (p, q)]
        assert 0 < int(free[0].sum()) < 300
    before = [x.detach().clone() for x in (p, q)]
    set_gradients([p, q], 2)
    grads = [x.grad for x in (p, q)]
    if held == "no-grad":
        p.grad = None
    opt.step()
    norm = math.sqrt(sum(g[f].double().square().sum() for g, f in zip(grads, free, strict=True)))
    assert opt.statistics()["grad_norm"] == pytest.approx(norm, rel=1e-12)
    for x, old, g, f in zip((p, q), before, grads, free, strict=True):
        still = f & (x != 0)
        assert_close(x[still], (old - g * (0.1 / (norm + 1e-6)))[still], (1e-6, 1e-6))


@pytest.mark.parametrize("factor", (0.999, 1.001, 1e6, math.inf))
def test_a_norm_within_the_bound_changes_no_bit(factor, backend):
    p, q = parameters([(40,)])[0], parameters([(40,)])[0]
    norm = float(gradient(p, 0, 1).double().norm())
    run(fuseopt.SGD([p], lr=1.0, max_grad_norm=norm * factor, backend=backend), [p], 1)
    run(fuseopt.SGD([q], lr=1.0, backend=backend), [q], 1)
    assert torch.equal(p, q) == (factor > 1)


def test_clip_is_torchs(backend):
    p, q = parameters([(40, 5)], F64)[0], parameters([(40, 5)], F64)[0]
    opt, torchs = fuseopt.SGD([p], lr=1.0, max_grad_norm=0.3, backend=backend), torch.optim.SGD([q], lr=1.0)
    for t in (1, 2):
        set_gradients([p], t), set_gradients([q], t)
        torch.nn.utils.clip_grad_norm_([q], 0.3)
        opt.step(), torchs.step()
    assert_close(p, q, (1e-14, 1e-14))


# ---- stages 5, 6, 8: decay -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ("sgd", "adam", "adagrad", "nadam"))
def test_coupled_l1_joins_the_gradient(name, backend):
    rule = BY_NAME[name]
    p, q = parameters([(40,)], F64)[0], parameters([(40,)], F64)[0]
    p.data[:5] = q.data[:5] = 0.0  # sign(0) = 0
    opt, plain = rule.ours([p], l1=0.25, backend=backend), rule.ours([q], backend=backend)
    for t in (1, 2, 3):
        set_gradients([p, q], t)
        p.grad[:5] = 0
        q.grad = p.grad + 0.25 * torch.sign(q.detach())
        opt.step(), plain.step()
    assert_close(p, q, (1e-12, 1e-13))
    assert not p[:5].any() and not q[:5].any()


@pytest.mark.parametrize("name", ("adamw", "adam-decoupled-maximize", "sgd-decoupled", "adagrad-decoupled", "lion"))
def test_decoupled_l1_is_a_soft_threshold(name, backend):
    rule = BY_NAME[name]
    lr = 0.01
    p, q = parameters([(400,)], F64)[0], parameters([(400,)], F64)[0]
    opt = rule.ours([p], lr=lr, l1=20.0, backend=backend)
    plain = rule.ours([q], lr=lr, backend=backend)
    run(opt, [p], 1), run(plain, [q], 1)
    assert_close(p, torch.sign(q) * (q.abs() - lr * 20.0).clamp(min=0), (1e-14, 1e-14))
    assert 10 < int((p == 0).sum()) < 390


def test_decay_is_not_rounded_apart_in_bf16(backend):
    """lr*wd <= 1e-3 rounds to a factor of 1 in bf16; in fp32, before the one store, it counts."""
    p = torch.nn.Parameter(torch.full((64,), 1.0, dtype=BF16))
    opt = fuseopt.SGD([p], lr=1e-3, weight_decay=0.5, decoupled_weight_decay=True, backend=backend)
    p.grad = torch.full_like(p, 3.0)  # 1 - 5e-4 - 3e-3 is nearer to 1 - 2^-8 than to 1
    opt.step()
    assert (p == 1 - 2**-8).all()


def test_zero_gradients_are_not_missing_ones(backend):
    p, q = parameters([(4,), (4,)])
    before = p.detach().clone(), q.detach().clone()
    opt = fuseopt.AdamW([p, q], lr=0.1, weight_decay=0.5, backend=backend)
    p.grad = torch.zeros(4)
    opt.step()
    assert_close(p, before[0] * 0.95, (1e-6, 0))
    assert_same_bits(q, before[1])
    assert q not in opt.state


# ---- stage 10: prune -----------------------------------------------------------------------------


def ranked(params, count, free=None):
    """The mask of the `count` smallest by (|p|, parameter, row-major index), written out plainly."""
    entries = [
        (abs(value), k, i)
        for k, p in enumerate(params)
        for i, value in enumerate(p.detach().float().reshape(-1).tolist())
        if free is None or free[k].reshape(-1)[i]
    ]
    masks = [torch.zeros(p.numel(), dtype=torch.bool) for p in params]
    for _, k, i in sorted(entries)[:count]:
        masks[k][i] = True
    return [m.reshape(p.shape) for m, p in zip(masks, params, strict=True)]


def hold(params, backend, prune, **more):
    """SGD that changes nothing but by pruning."""
    opt = fuseopt.SGD(params, lr=0.0, prune=prune, backend=backend, **more)
    for p in params:
        p.grad = torch.ones_like(p)
    return opt


@pytest.mark.parametrize("scope", ("global", "tensor"))
@pytest.mark.parametrize("sparsity", (0.0, 0.001, 1 / 3, 0.5, 0.9, 0.999))
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_sparsity_is_exact(dtype, sparsity, scope, backend):
    """Exactly round(s*n), the smallest; ties (many in 16 bits) in the order of parameters and entries."""
    params = parameters([(40, 51), (3,), (7, 9, 11), (1, 33), (0, 4)], dtype)
    params[2].data.copy_(params[0].data.flatten()[:693].reshape(7, 9, 11))  # ties between tensors
    wide = [p for p in params if p.dim() >= 2]
    sets = [wide] if scope == "global" else [[p] for p in wide]
    expected = [m for part in sets for m in ranked(part, round(sparsity * sum(p.numel() for p in part)))]
    before = [p.detach().clone() for p in params]
    opt = hold(params, backend, Prune(sparsity, scope=scope))
    opt.step()
    assert opt.prune_mask(params[1]) is None
    assert_same_bits(params[1], before[1])
    for p, mask, old in zip(wide, expected, [b for b in before if b.dim() >= 2], strict=True):
        if p.numel():
            assert torch.equal(opt.prune_mask(p), mask)
        assert_same_bits(p, torch.where(mask, torch.zeros_like(old), old))


@pytest.mark.parametrize("count", (1, 31, 32, 33, 1024, 5000, 16384, 16385, 30000))
def test_ties_go_by_parameter_and_index(count, backend):
    """All entries equal but for their sign: the first `count` are pruned, however blocks are cut."""
    params = [torch.nn.Parameter(torch.full((n, 10), -0.5)) for n in (3, 1700, 1700)]
    n = sum(p.numel() for p in params)
    opt = hold(params, backend, Prune(count / n))
    opt.step()
    flat = torch.cat([opt.prune_mask(p).flatten() for p in params])
    assert torch.equal(flat, torch.arange(n) < count)
    assert not bits(torch.cat([p.flatten() for p in params])[:count]).any()


@pytest.mark.parametrize("dtype", (F32, F64), ids=ident)
def test_ranked_by_fp32_magnitude(dtype, backend):
    """Subnormals, zeros of both signs, infinities: ordered by |p|; -0.0 and +0.0 tie."""
    values = [1e-40, -0.0, 0.0, math.inf, -1e-39, 3e38, -math.inf, 1e-45, -1.0, 1.0]
    for count in range(1, 10):
        p = torch.nn.Parameter(torch.tensor([values], dtype=dtype))
        expected = ranked([p], count)[0]
        opt = hold([p], backend, Prune(count / 10))
        opt.step()
        assert torch.equal(opt.prune_mask(p), expected), count


@pytest.mark.parametrize("mode", ("freeze", "grad"))
def test_frozen_entries_are_never_pruned(mode, backend):
    params = parameters([(40, 5), (30, 10)])
    keep = [element_mask(p, k) for k, p in enumerate(params)]
    expected = ranked(params, round(0.5 * 500), keep if mode == "freeze" else None)
    before = [p.detach().clone() for p in params]
    opt = hold(params, backend, Prune(0.5))
    for p, k in zip(params, keep, strict=True):
        opt.mask(p, k, mode)
    opt.step()
    for p, old, mask in zip(params, before, expected, strict=True):
        assert torch.equal(opt.prune_mask(p), mask)
        assert_same_bits(p, torch.where(mask, 0.0, old))


def test_frozen_entries_are_not_pruned_by_a_threshold(backend):
    p = parameters([(40, 5)])[0]
    keep, old = element_mask(p), p.detach().clone()
    opt = hold([p], backend, Prune(threshold=0.7))
    opt.mask(p, keep)
    opt.step()
    assert torch.equal(opt.prune_mask(p), keep & (old.abs() < 0.7))
    assert_same_bits(p[~keep], old[~keep])


@pytest.mark.parametrize("scope", ("global", "tensor"))
def test_too_few_free_entries_are_refused_before_anything_changes(scope, backend):
    params = parameters([(10, 10), (10, 10)])
    opt = fuseopt.AdamW(
        [("stem.weight", params[0]), ("head.weight", params[1])], prune=Prune(0.9, begin=2, scope=scope), ema=EMA(0.9), backend=backend
    )
    opt.mask(params[0], torch.arange(10)[:, None] < 5)
    run(opt, params, 1)
    set_gradients(params, 2)
    before = Snapshot(opt)
    with pytest.raises(ValueError, match=r"(?s)0\.9.*(90|180) of .*freeze all but.*lower"):
        opt.step()
    before.assert_unchanged()


def test_pruned_entries_that_are_frozen_later_count_as_pruned(backend):
    """50 of 100 are pruned, then those and 30 more are frozen: 10 of the other 20 can still go."""
    p = torch.nn.Parameter(torch.arange(1.0, 101.0).reshape(10, 10))
    opt = hold([p], backend, Prune(0.5))
    opt.step()
    assert int(opt.prune_mask(p).sum()) == 50
    opt.mask(p, torch.arange(100).reshape(10, 10) >= 80)
    opt.param_groups[0]["prune"] = Prune(0.6, begin=2)
    opt.step()
    expected = (torch.arange(100) < 50) | ((torch.arange(100) >= 80) & (torch.arange(100) < 90))
    assert torch.equal(opt.prune_mask(p).flatten(), expected)


def test_masks_only_grow_when_pruned_entries_are_frozen(backend):
    p = parameters([(4, 10)])[0]
    opt = hold([p], backend, Prune(threshold=0.5))
    opt.step()
    pruned = opt.prune_mask(p)
    opt.mask(p, torch.arange(4)[:, None] > 1)
    opt.step()
    assert torch.equal(opt.prune_mask(p), pruned)
    opt.mask(p, torch.tensor(True))
    p.grad = torch.ones_like(p)
    opt.param_groups[0]["lr"] = 10.0
    opt.step()
    assert (p[pruned] == 0).all()


SCHEDULES = {
    "once": (Prune(0.8, begin=2, schedule="once"), {2: 0.8}),
    "no-end": (Prune(0.8, begin=3), {3: 0.8}),
    "linear": (Prune(0.8, begin=2, end=6, schedule="linear"), {2: 0.0, 3: 0.2, 4: 0.4, 5: 0.6, 6: 0.8}),
    "linear-every-2": (Prune(0.8, begin=2, end=6, every=2, schedule="linear"), {2: 0.0, 4: 0.4, 6: 0.8}),
    "cubic": (Prune(0.8, begin=1, end=5), {t: 0.8 - 0.8 * (1 - (t - 1) / 4) ** 3 for t in range(1, 6)}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, backend):
    """Acts at begin <= t <= end with (t - begin) % every == 0; skipped steps do not count."""
    prune, expected = SCHEDULES[name]
    p = parameters([(20, 50)])[0]
    opt = hold([p], backend, prune)
    now, last = 0.0, None
    for t in range(1, 9):
        opt.found_inf = torch.tensor(1.0)
        opt.step()
        del opt.found_inf
        opt.step()
        now = expected.get(t, now)
        mask = opt.prune_mask(p)
        assert (0 if mask is None else int(mask.sum())) == round(now * 1000), t
        if last is not None:
            assert (mask | ~last).all(), "a mask shrank"
        last = mask


def test_a_threshold_holds_from_begin_on(backend):
    p = parameters([(20, 50)])[0]
    opt = fuseopt.SGD([p], lr=0.3, prune=Prune(threshold=0.4, begin=3), backend=backend)
    run(opt, [p], 2)
    mask = opt.prune_mask(p)
    assert (mask is None or not mask.any()) and (p.detach().abs() < 0.4).any()
    counts = []
    for t in range(3, 6):
        run(opt, [p], 1, t)
        assert not ((p.detach().abs() < 0.4) & (p != 0)).any()
        assert torch.equal(opt.prune_mask(p), p == 0)
        counts.append(int((p == 0).sum()))
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("mode", ("freeze", "grad"))
def test_a_threshold_leaves_vectors_alone_masked_or_not(mode, backend):
    """Vectors are not prunable; a mask on one must not make it so."""
    p, q = parameters([(40,), (4, 10)])
    opt = hold([p, q], backend, Prune(threshold=0.5))
    opt.mask(p, torch.arange(40) % 2 == 0, mode)
    opt.step()
    assert (p != 0).all() and opt.prune_mask(p) is None
    assert (q == 0).any()


@pytest.mark.parametrize("prune", (Prune(0.5), Prune(threshold=0.5), Prune(0.5, scope="tensor")), ids=("global", "threshold", "tensor"))
def test_a_group_with_nothing_to_prune(prune, backend):
    p = parameters([(40,)])[0]
    run(fuseopt.SGD([p], lr=0.1, prune=prune, backend=backend), [p], 2)
    assert (p != 0).all()


@pytest.mark.parametrize("prune", (Prune(0.5, begin=2), Prune(threshold=0.6, begin=2)), ids=("sparsity", "threshold"))
@pytest.mark.parametrize("moments", ("zero", "keep"))
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_moments_of_pruned_entries(rule, moments, prune, backend):
    import dataclasses

    p = parameters([(20, 33)])[0]
    opt = rule.ours([p], prune=dataclasses.replace(prune, moments=moments), backend=backend)
    run(opt, [p], 4)
    pruned = opt.prune_mask(p)
    assert 0 < int(pruned.sum()) < p.numel()
    for key in opt.slots(opt.param_groups[0]):
        if moments == "zero":
            assert not bits(opt.state[p][key])[pruned].any()
        else:
            assert opt.state[p][key][pruned].ne(0).all()


def test_groups_prune_apart(backend):
    a, b, c = parameters([(10, 10), (10, 10), (10, 10)])
    b.data *= 0.01
    opt = fuseopt.SGD([{"params": [a]}, {"params": [b], "prune": None}, {"params": [c], "prune": Prune(0.2)}], lr=0.0,
                      prune=Prune(0.7), backend=backend)
    run(opt, [a, b, c], 1)
    assert [int((x == 0).sum()) for x in (a, b, c)] == [70, 0, 20]


@pytest.mark.parametrize("pattern", ("unstructured", "rows"))
def test_groups_with_equal_options_are_ranked_together(pattern, backend):
    """All of the smaller parameter goes, whichever group it is in; with scope="tensor" half of each."""
    for scope, gone in (("global", [0, 100]), ("tensor", [50, 50])):
        a, b = parameters([(10, 10), (10, 10)])
        a.data += torch.sign(a.data)
        b.data *= 0.01
        groups = [{"params": [x], "prune": Prune(0.5, pattern=pattern, scope=scope)} for x in (a, b)]
        run(fuseopt.SGD(groups, lr=0.0, backend=backend), [a, b], 1)
        assert [int((x == 0).sum()) for x in (a, b)] == gone


def test_parameters_without_gradient_are_pruned_too(backend):
    """Its sparsity is that of the model, whoever had a gradient at the pruning step."""
    a, b = parameters([(10, 10), (10, 10)])
    a.data += torch.sign(a.data)
    b.data *= 1e-3
    opt = fuseopt.AdamW([a, b], lr=0.0, prune=Prune(0.5), ema=EMA(0.5), backend=backend)
    a.grad = torch.ones_like(a)
    opt.step()
    assert (a != 0).all() and (b == 0).all()
    run(opt, [a, b], 2)
    assert (b == 0).all() and not opt.state[b]["ema_0"].any()


# ---- stage 11: EMA -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_averages_follow_the_stored_parameter(dtype, backend):
    params = parameters([(33, 5), (70,)], dtype)
    opt = fuseopt.SGD(params, lr=0.1, ema=[EMA(0.9), EMA(0.9, warmup="timm"), EMA(0.0), EMA(1.0)], backend=backend)
    kind = F64 if dtype == F64 else F32
    averages = {}
    for t in range(1, 40):
        run(opt, params, 1, t)
        warm = min(0.9, 1 - t ** (-2 / 3)) if t > 1 else 0.0
        for p in params:
            for k, d in enumerate((0.9, warm, 0.0, 1.0)):
                now = p.detach().to(F64, copy=True)
                averages[p, k] = now if t == 1 else averages[p, k] + (1 - d) * (now - averages[p, k])
                mine = opt.state[p][f"ema_{k}"]
                assert mine.dtype == kind
                assert_close(mine, averages[p, k], (2e-6, 2e-6) if kind == F32 else (1e-14, 1e-14), f"ema_{k} at {t}")


def test_timm_warmup_is_timms():
    from fuseopt.stages import ema

    for t in (1, 2, 3, 10, 1000, 10**6):
        assert 1 - ema.weight(asdict(EMA(0.999, warmup="timm")), t) == pytest.approx(timm(t), abs=1e-15)


def test_an_average_of_bf16_moves(backend):
    """Kept in bf16 at 0.99 it never would."""
    p = torch.nn.Parameter(torch.ones(50, dtype=BF16))
    opt = fuseopt.SGD([p], lr=2**-7, ema=EMA(0.99), backend=backend)
    p.grad = torch.zeros_like(p)
    opt.step()
    values = []
    for _ in range(5):
        p.grad = torch.ones_like(p)
        opt.step()
        values.append(float(opt.state[p]["ema_0"][0]))
    assert all(a > b for a, b in zip([1.0, *values], values, strict=False))


def test_a_late_parameter_is_copied_at_its_first_update(backend):
    p, q = parameters([(5,), (5,)])
    opt = fuseopt.SGD([p, q], lr=0.1, ema=EMA(0.999), backend=backend)
    run(opt, [p], 3)
    q.grad = torch.ones(5)
    opt.step()
    assert_same_bits(opt.state[q]["ema_0"], q.detach())
    assert (opt.state[p]["ema_0"] != p).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("prune", (Prune(0.5, begin=3), Prune(threshold=0.5)), ids=("sparsity", "threshold"))
def test_an_average_is_exactly_as_sparse_as_the_model(prune, dtype, backend):
    p = parameters([(30, 33)], dtype)[0]
    opt = fuseopt.AdamW([p], lr=0.05, ema=[EMA(0.9999), EMA(0.9, warmup="timm")], prune=prune, backend=backend)
    for t in range(1, 6):
        run(opt, [p], 1, t)
        pruned = opt.prune_mask(p)
        if pruned is not None and t > 2:
            assert 0 < int(pruned.sum()) < p.numel()
            for key in ("ema_0", "ema_1"):
                assert not bits(opt.state[p][key])[pruned].any()
                assert torch.equal(opt.state[p][key] == 0, pruned)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_swap_ema_gives_back_every_bit(dtype, backend):
    params = parameters([(5, 7), (3,)], dtype)
    params[0].data[0, 0] = -0.0
    opt = run(fuseopt.SGD(params, lr=0.1, ema=[EMA(0.5), EMA(0.9)], backend=backend), params)
    own = [p.detach().clone() for p in params]
    for k in (0, 1):
        with opt.swap_ema(k):
            for p in params:
                assert_same_bits(p, opt.state[p][f"ema_{k}"].to(dtype))
        for p, q in zip(params, own, strict=True):
            assert_same_bits(p, q)
    with pytest.raises(KeyError, match="body"), opt.swap_ema():
        raise KeyError("body")
    with opt.swap_ema(), pytest.raises(RuntimeError, match="leave"), opt.swap_ema():
        pass
    with opt.swap_ema(), pytest.raises(RuntimeError, match="swap_ema"):
        opt.step()
    for p, q in zip(params, own, strict=True):
        assert_same_bits(p, q)
    opt.step()


def test_copy_ema_to_another_model(backend):
    model, other = (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(2))
    opt = fuseopt.AdamW(model.named_parameters(), ema=[EMA(0.5), EMA(0.9)], backend=backend)
    run(opt, list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    opt.copy_ema_to(other, 1)
    for p, q, old in zip(model.parameters(), other.parameters(), before, strict=True):
        assert_same_bits(q, opt.state[p]["ema_1"])
        assert_same_bits(p, old)
    opt.copy_ema_to(model)
    for p in model.parameters():
        assert_same_bits(p, opt.state[p]["ema_0"])


# ---- stage 12: statistics ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("masks", (False, True), ids=("plain", "masked"))
def test_statistics_are_what_they_say(masks, dtype, backend):
    params = parameters([(33, 50), (17_000,), (0, 3), ()], dtype)
    params[0].data[0, :7] = 0.0
    opt = fuseopt.SGD(params, lr=2.0**-4, max_grad_norm=1.0, statistics=True, backend=backend)
    opt.grad_scale = torch.tensor(2.0)
    keep = [torch.ones(p.shape, dtype=torch.bool) for p in params]
    if masks:
        keep[:2] = [element_mask(p, k) for k, p in enumerate(params[:2])]
        opt.mask(params[0], keep[0]), opt.mask(params[1], keep[1], "grad")
    before = [p.detach().to(F64, copy=True) for p in params]
    set_gradients(params, 1)
    params[0].grad[0, :7] = 0
    opt.step()
    sums = opt.statistics()
    free = [p.grad.double()[k] / 2 for p, k in zip(params, keep, strict=True)]
    after = [p.detach().double() for p in params]
    norm = lambda xs: math.sqrt(sum(float(x.square().sum()) for x in xs))
    assert sums["grad_norm"] == pytest.approx(norm(free), rel=1e-12)
    assert sums["param_norm"] == pytest.approx(norm(after), rel=1e-12)
    assert sums["update_norm"] == pytest.approx(norm([a - b for a, b in zip(after, before, strict=True)]), rel=1e-12)
    assert sums["zeros"] == sum(int((a == 0).sum()) for a in after) and sums["zeros"] >= 7
    assert sums["nonfinite"] == 0


def test_statistics_count_what_is_not_finite(backend):
    p = parameters([(2000,)])[0]
    opt = fuseopt.SGD([p], lr=0.1, statistics=True, backend=backend)
    keep = torch.arange(2000) > 0
    opt.mask(p, keep)
    p.grad = torch.ones(2000)
    p.grad[[0, 5, 1999]] = torch.tensor([math.nan, math.inf, math.nan])
    opt.step()
    assert opt.statistics()["nonfinite"] == 2  # entry 0 is frozen


def test_statistics_cost_no_bit(backend):
    for rule in ONE_EACH:
        p, q = parameters([(33, 50)])[0], parameters([(33, 50)])[0]
        a, b = rule.ours([p], statistics=True, backend=backend), rule.ours([q], backend=backend)
        run(a, [p]), run(b, [q])
        assert_same_state(a, b)


# ---- options edited in param_groups ---------------------------------------------------------------


def test_options_edited_between_steps_count_from_the_next(backend):
    """Given as at construction; the result is that of an optimizer which had them all along."""
    params = parameters([(16, 8), (7,)])
    opt = run(BY_NAME["adamw"].ours(params, backend=backend), params, 2)
    group = opt.param_groups[0]
    group["prune"], group["ema"], group["max_grad_norm"], group["l1"] = Prune(0.5, begin=3), EMA(0.5), 0.5, 0.1
    opt.explain(), opt.state_dict()
    set_gradients(params, 3)
    opt.step()
    assert int((params[0] == 0).sum()) == 64 and torch.equal(opt.state[params[0]]["ema_0"], params[0])
    assert isinstance(group["prune"], dict) and isinstance(group["ema"], list)

    others = parameters([(16, 8), (7,)])
    other = run(BY_NAME["adamw"].ours(others, backend=backend), others, 2)
    second = BY_NAME["adamw"].ours(like(others), prune=Prune(0.5, begin=3), ema=EMA(0.5), max_grad_norm=0.5, l1=0.1, backend=backend)
    second.load_state_dict({"state": other.state_dict()["state"], "param_groups": [
        {**second.state_dict()["param_groups"][0], "steps": 2}]})
    run(second, second.param_groups[0]["params"], 1, 3)
    assert_same_state(opt, second)

    group["ema"].append({"decay": 0.75})
    group["prune"] = None
    run(opt, params, 1, 4)
    assert "ema_1" in opt.state[params[0]] and int((params[0] == 0).sum()) == 64  # what is pruned stays so


def test_a_threshold_set_between_steps(backend):
    p = parameters([(20, 50)])[0]
    opt = run(fuseopt.SGD([p], lr=0.1, backend=backend), [p], 2)
    opt.param_groups[0]["prune"] = {"threshold": 0.4}
    run(opt, [p], 1, 3)
    assert int((p == 0).sum()) > 0 and opt.prune_mask(p).any()
