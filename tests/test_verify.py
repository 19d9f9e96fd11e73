"""verify passes what is right, on every backend, and fails each of a list of planted mistakes."""

import math

import pytest
import torch

import fuseopt
from fuseopt import backends, reference, rules, verify
from fuseopt.stages import clip, decay, ema, prune

BACKENDS = ["torch"] + (["cpu"] if backends.native_error() is None else [])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(33, 17), (17,), (4, 3, 3, 3), ()]
LR = 1e-2

# Every hyper-parameter away from its neutral value.
RULES = {
    "AdamW": (fuseopt.AdamW, {"weight_decay": 0.1}),
    "AdamW amsgrad": (fuseopt.AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "Adam": (fuseopt.Adam, {"weight_decay": 0.1, "maximize": True}),
    "SGD": (fuseopt.SGD, {"weight_decay": 0.1}),
    "SGD nesterov": (fuseopt.SGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD decoupled": (
        fuseopt.SGD,
        {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.3, "decoupled_weight_decay": True},
    ),
    "NAdam": (fuseopt.NAdam, {"weight_decay": 0.1, "maximize": True}),
    "NAdam decoupled": (fuseopt.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Adagrad": (fuseopt.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "Adagrad decoupled": (fuseopt.Adagrad, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "Lion": (fuseopt.Lion, {"weight_decay": 0.1}),
    "Lion maximize": (fuseopt.Lion, {"weight_decay": 0.1, "maximize": True}),
}
AVERAGES = [fuseopt.EMA(0.99), fuseopt.EMA(0.999, warmup="timm")]
STAGES = {
    "none": {},
    "sparsity": {
        "max_grad_norm": 1.0,
        "l1": 1e-3,
        "ema": AVERAGES,
        "prune": fuseopt.Prune(0.5, begin=2, end=5),
        "statistics": True,
    },
    "threshold": {
        "max_grad_norm": 5.0,
        "ema": AVERAGES[1],
        "prune": fuseopt.Prune(threshold=0.03, begin=2, moments="keep"),
        "statistics": True,
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: waking a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(cls, dtype=torch.float32, masked=True, shapes=SHAPES, **options):
    """A new optimizer over random parameters, one of them channels-last, and its checker."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in shapes]
    for p in params:
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    opt = cls([(f"w{k}", p) for k, p in enumerate(params)], **{"lr": LR, **options})
    if masked:
        opt.mask(params[0], torch.rand(params[0].shape[0], *[1] * (params[0].dim() - 1)) > 0.3)
        opt.mask(params[1], torch.rand(params[1].shape) > 0.3, mode="grad")
    return opt, params


def train(opt, params, steps=6, scale=1.0):
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p) * scale
        opt.step()


def check_passes(checker, steps):
    report = checker.report()
    assert report.passed, str(report)
    assert report.steps == steps
    assert "PASS" in str(report).splitlines()[-1]
    return report


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("rule", RULES)
def test_passes(rule, stages, backend):
    cls, options = RULES[rule]
    for dtype in DTYPES:
        opt, params = make(cls, dtype, masked=stages != "none", backend=backend, **options, **STAGES[stages])
        checker = verify.attach(opt)
        train(opt, params, 5)
        check_passes(checker, 5)


# ---- planted mistakes ----------------------------------------------------------------------------


def decay_after_the_update(patch):
    update = rules.AdamW.update
    patch.setattr(decay, "decoupled", lambda p, d: p)
    patch.setattr(rules.AdamW, "update", staticmethod(lambda *a: update(*a) * (1 - LR * 0.1)))


def bias_corrections_in_float(patch):
    def update(p, g, slot, counter, hyper):
        lr, beta1, beta2, eps = hyper
        t = counter["step"] = counter["step"] + 1
        slot["exp_avg"] = m = torch.lerp(slot["exp_avg"], g, 1 - beta1)
        slot["exp_avg_sq"] = v = beta2 * slot["exp_avg_sq"] + (1 - beta2) * g * g
        correction = 1 - torch.tensor(beta2) ** t  # 1.3e-5 off at t = 1
        return p - lr / (1 - beta1**t) * m / (v.sqrt() / correction.sqrt() + eps)

    patch.setattr(rules.AdamW, "update", staticmethod(update))


def one_minus_beta2_in_float(patch):
    update = rules.AdamW.update

    def wrong(p, g, slot, counter, hyper):
        out = update(p, g, slot, counter, hyper)
        slot["exp_avg_sq"] = slot["exp_avg_sq"] * (1 + 1.3e-5)
        return out

    patch.setattr(rules.AdamW, "update", staticmethod(wrong))


def ema_one_step_ahead(patch):
    weight = ema.weight
    patch.setattr(ema, "weight", lambda options, t: weight(options, t + 1))


def ema_of_pruned_entries_fades(patch):
    update = ema.update
    patch.setattr(ema, "update", lambda e, p, w, pruned: update(e, p, w, None))


def sign_of_zero_is_minus_one(patch):
    patch.setattr(decay, "coupled", lambda g, p, l2, l1: g + l2 * p + torch.where(p > 0, l1, -l1))


def l1_before_the_threshold_shrinks_twice(patch):
    shrink = decay.soft_threshold
    patch.setattr(decay, "soft_threshold", lambda p, t: shrink(p, 2 * t))


def norm_over_masked_entries(patch):
    norm, gradient = clip.norm, reference.gradient
    raw = []

    def remember(p, grad, keep, gs):
        raw.append(gradient(p, grad, None, gs))
        return gradient(p, grad, keep, gs)

    def wrong(gradients):
        list(gradients)
        total = norm(raw)
        raw.clear()
        return total

    patch.setattr(reference, "gradient", remember)
    patch.setattr(clip, "norm", wrong)


def clip_without_the_epsilon_of_torch(patch):
    patch.setattr(clip, "factor", lambda limit, norm: min(1.0, limit / (norm + 1e-3)) if limit else 1.0)


def ties_from_the_end(patch):
    smallest = prune.smallest

    def wrong(weights, candidates, count):
        flipped = smallest([w.flip(0) for w in weights], [c.flip(0) for c in candidates], count)
        return [m.flip(0) for m in flipped]

    patch.setattr(prune, "smallest", wrong)


def prunes_the_largest(patch):
    smallest = prune.smallest
    patch.setattr(prune, "smallest", lambda w, c, n: smallest([1 / x.double().abs() for x in w], c, n))


def prunes_one_too_few(patch):
    smallest = prune.smallest
    patch.setattr(prune, "smallest", lambda w, c, n: smallest(w, c, max(n - 1, 0)))


def linear_for_cubic(patch):
    at = prune.sparsity_at
    patch.setattr(prune, "sparsity_at", lambda o, t: at(o and {**o, "schedule": "linear"}, t))


def threshold_a_step_late(patch):
    at = prune.threshold_at
    patch.setattr(prune, "threshold_at", lambda options, t: at(options, t - 1))


def negative_zero_where_pruned(patch):
    patch.setattr(prune, "apply", lambda x, pruned: torch.where(pruned, -0.0, x))


def after_every_step(change):
    """A mistake made by a hook that runs before the checker's."""
    return lambda opt, params: opt.register_step_post_hook(lambda *_: change(opt, params))


def frozen_moments_move(opt, params):
    opt.state[params[0]]["exp_avg"].add_(1e-3)


def frozen_weights_lose_the_sign_of_zero(opt, params):
    p = params[0].data
    p[p == 0] = 0.0


def one_weight_is_16_ulp_off(opt, params):
    p = params[1].data
    p[5] *= 1 + 2e-6


def the_step_count_runs_ahead(opt, params):
    opt.param_groups[0]["steps"] += 1


FULL = STAGES["sparsity"]
PLANTS = [
    (decay_after_the_update, "AdamW", {}, "p"),
    (bias_corrections_in_float, "AdamW", {}, "p"),
    (one_minus_beta2_in_float, "AdamW", {}, "exp_avg_sq"),
    (ema_one_step_ahead, "AdamW", {"ema": AVERAGES}, "ema_1"),
    (ema_of_pruned_entries_fades, "AdamW", {"ema": AVERAGES, "prune": STAGES["threshold"]["prune"]}, "pruned"),
    (sign_of_zero_is_minus_one, "Adam", {"l1": 1e-3}, "exp_avg"),
    (l1_before_the_threshold_shrinks_twice, "AdamW", {"l1": 1e-3}, "p"),
    (norm_over_masked_entries, "AdamW", {"max_grad_norm": 1.0}, "exp_avg"),
    (clip_without_the_epsilon_of_torch, "AdamW", {"max_grad_norm": 1.0}, "exp_avg"),
    (ties_from_the_end, "AdamW", {"prune": fuseopt.Prune(0.5)}, "prune_mask"),
    (prunes_the_largest, "AdamW", FULL, "prune_mask"),
    (prunes_one_too_few, "AdamW", FULL, "prune_count"),
    (linear_for_cubic, "AdamW", FULL, "prune_count"),
    (threshold_a_step_late, "AdamW", STAGES["threshold"], "prune_mask"),
    (negative_zero_where_pruned, "AdamW", FULL, "pruned"),
    (frozen_moments_move, "AdamW", {}, "frozen"),
    (frozen_weights_lose_the_sign_of_zero, "AdamW", {}, "frozen"),
    (one_weight_is_16_ulp_off, "AdamW", {}, "p"),
    (the_step_count_runs_ahead, "AdamW", {}, "counters"),
]
HOOKED = (frozen_moments_move, frozen_weights_lose_the_sign_of_zero, one_weight_is_16_ulp_off, the_step_count_runs_ahead)


def plant_values(params):
    """Zeros, negative zeros among the frozen entries, and equal magnitudes that the masked rows keep equal."""
    with torch.no_grad():
        params[0][:, :3] = 0.0
        params[0][:, 3:6] = -0.0
        params[0][:, 6:] = params[0][:, 6:].sign() * 0.25


@pytest.mark.parametrize(("plant", "rule", "stages", "stream"), PLANTS, ids=[plant[0].__name__ for plant in PLANTS])
def test_a_planted_mistake_fails(plant, rule, stages, stream, monkeypatch):
    """The report fails, at the stream that the mistake is in; without the mistake it passes."""
    cls, options = RULES[rule]
    for planted in (False, True):
        opt, params = make(cls, shapes=[(32, 16), (16,)], backend="torch", **options, **stages)
        plant_values(params)
        if planted and plant in HOOKED:
            after_every_step(plant)(opt, params)
        elif planted:
            plant(monkeypatch)
        checker = verify.attach(opt)
        train_with_ties(opt, params)
        report = checker.report()
        assert report.passed != planted, str(report)
    assert stream in {row["stream"] for row in report.rows if not row["passed"]}, str(report)
    assert str(report).splitlines()[-1].startswith("FAIL")


def train_with_ties(opt, params):
    """The first parameter's gradient is 0 in half of its columns: its equal weights stay equal."""
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        params[0].grad[:, 4:12] = 0.0
        opt.step()


# ---- what happens around a step ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_closures_schedulers_new_groups_and_missing_gradients(backend):
    opt, params = make(fuseopt.AdamW, backend=backend, ema=AVERAGES[0], max_grad_norm=1.0, prune=fuseopt.Prune(0.5, begin=3))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    checker = verify.attach(opt)

    def closure():
        opt.zero_grad()
        sum((p.square() * torch.randn_like(p)).sum() for p in params).backward()

    opt.step(closure)
    scheduler.step()
    params[1].grad = None
    opt.step()
    late = torch.nn.Parameter(torch.randn(5, 5))
    opt.add_param_group({"params": [("late", late)], "lr": torch.tensor(0.1), "ema": AVERAGES})
    opt.step()  # the late one has no gradient, but is pruned
    late.grad = torch.randn(5, 5)
    opt.step()
    report = check_passes(checker, 4)
    assert {row["parameter"] for row in report.rows} >= {"late", "w0", "w1", "w2"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_and_scaled_steps(backend):
    opt, params = make(fuseopt.AdamW, backend=backend, ema=AVERAGES[1], max_grad_norm=1.0)
    checker = verify.attach(opt)
    for found_inf in (1.0, 0.0, 2.0, 0.0):
        opt.grad_scale, opt.found_inf = torch.tensor(1000.0), torch.tensor(found_inf)
        train(opt, params, 1, scale=1000.0)
    assert checker.report().trajectory_steps == 2
    assert "2 steps were skipped" in str(check_passes(checker, 4))


def test_a_skipped_step_that_is_not_skipped_fails():
    opt, params = make(fuseopt.AdamW)
    train(opt, params, 1)
    after_every_step(frozen_moments_move)(opt, params)
    checker = verify.attach(opt)
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    train(opt, params, 1)
    assert not checker.report().passed


def test_every_nth_step_and_detach():
    opt, params = make(fuseopt.SGD)
    checker = verify.attach(opt, every=3)
    train(opt, params, 7)
    assert check_passes(checker, 3).trajectory_steps == 7
    checker.detach()
    train(opt, params, 1)
    assert checker.report().trajectory_steps == 7
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


def test_only_the_trajectory_sees_a_mistake_between_checked_steps():
    opt, params = make(fuseopt.SGD)
    checker = verify.attach(opt, every=100)
    train(opt, params, 1)
    after_every_step(lambda *_: params[1].data.mul_(1 + 1e-5))(opt, params)
    opt._optimizer_step_post_hooks.move_to_end(next(reversed(opt._optimizer_step_post_hooks)), last=False)
    train(opt, params, 2)
    failed = [row for row in checker.report().rows if not row["passed"]]
    assert {row["check"] for row in failed} == {"trajectory"}


def test_averages_may_be_swapped_in_and_weights_written_between_steps():
    opt, params = make(fuseopt.AdamW, ema=AVERAGES[0])
    checker = verify.attach(opt)
    train(opt, params, 2)
    with opt.swap_ema():
        pass
    train(opt, params, 1)
    assert not check_passes(checker, 3).notes
    with torch.no_grad():
        params[0].mul_(2)
    train(opt, params, 1)
    assert "written to before step 4" in str(check_passes(checker, 4))


def test_a_loaded_state_restarts_the_trajectory():
    opt, params = make(fuseopt.NAdam, ema=AVERAGES[1], prune=fuseopt.Prune(0.5, begin=3))
    checker = verify.attach(opt)
    train(opt, params, 2)
    saved = opt.state_dict()
    saved = {**saved, "state": {k: {n: v.clone() if torch.is_tensor(v) else v for n, v in s.items()} for k, s in saved["state"].items()}}
    train(opt, params, 2)
    opt.load_state_dict(saved)
    train(opt, params, 2)
    assert "a state was loaded after step 4" in str(check_passes(checker, 6))


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("rule", ["AdamW", "AdamW amsgrad", "Adam", "SGD nesterov", "NAdam", "Adagrad"])
def test_plain_torch_optimizers(rule, dtype, fused):
    ours, options = RULES[rule]
    cls = next(base for base in ours.__mro__ if base.__module__.startswith("torch.optim."))
    if fused and cls is torch.optim.NAdam:
        pytest.skip("torch has no fused NAdam")
    if fused and cls is torch.optim.SGD and dtype == torch.bfloat16:
        pytest.skip("torch up to 2.13 does not update whole vectors: pytorch/pytorch issue 191763")
    more = {"fused": fused} if fused else {}
    opt, params = make(cls, dtype, masked=False, **options, **more)
    checker = verify.attach(opt)
    for step in range(4):
        if fused:  # torch unscales p.grad in place here
            opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(float(step == 2))
        train(opt, params, 1)
    check_passes(checker, 4)


def test_nan_gradients_and_infinite_masked_ones():
    opt, params = make(fuseopt.AdamW, max_grad_norm=1.0, statistics=True)
    checker = verify.attach(opt)
    train(opt, params, 1)
    frozen = opt.state[params[0]]["exp_avg"] == 0
    params[0].grad[frozen] = math.inf
    opt.step()
    params[2].grad.fill_(math.nan)
    opt.step()
    check_passes(checker, 3)


def test_an_exact_cancellation_in_lion_is_undecided():
    """b1*m + (1-b1)*g is 0 or a rounding error: its sign is anyone's, and so is the step's direction."""
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    opt = fuseopt.Lion([p], lr=0.1)
    checker = verify.attach(opt)
    train(opt, [p], 1)
    p.grad = -9 * opt.state[p]["exp_avg"]
    opt.step()
    check_passes(checker, 2)


# ---- the checker itself --------------------------------------------------------------------------


def test_rows_and_table():
    opt, params = make(fuseopt.AdamW, **FULL)
    checker = verify.attach(opt)
    assert not checker.report().passed  # nothing checked yet
    train(opt, params, 3)
    report = check_passes(checker, 3)
    keys = {"check", "parameter", "stream", "max_abs", "max_ulp", "allowed_ulp", "differences", "at_step", "passed"}
    assert all(keys <= row.keys() for row in report.rows)
    streams = {row["stream"] for row in report.rows if row["check"] == "trajectory" and row["parameter"] == "w0"}
    assert {"p", "exp_avg", "exp_avg_sq", "ema_0", "ema_1", "pruned"} <= streams
    assert "worst parameter" in str(report) and "grad_norm" in str(report)


def test_the_bounds_are_stated_with_their_reasons():
    assert all(len(entry) == 2 and all(entry) for entry in verify.BOUNDS.values())


def test_nothing_of_the_optimizer_changes():
    results = []
    for watched in (False, True):
        opt, params = make(fuseopt.AdamW, **FULL)
        if watched:
            verify.attach(opt)
        train(opt, params)
        results.append([p.detach().clone() for p in params] + [p.grad for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_refusals():
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="no recipe for RMSprop"):
        verify.attach(torch.optim.RMSprop([p]))
    with pytest.raises(ValueError, match="every: 0"):
        verify.attach(fuseopt.SGD([p]), every=0)
    z = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    opt = torch.optim.SGD([z], lr=0.1)
    verify.attach(opt)
    with pytest.raises(ValueError, match="complex64"):
        opt.step()
