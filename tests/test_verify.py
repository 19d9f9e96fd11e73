"""verify passes what is right, on every backend, whatever happens around a step. See also test_verify_planted.py."""

import copy
import math

import pytest
import torch

import fuseopt
from fuseopt import cpu, verify

BACKENDS = ["torch"] + (["cpu"] if cpu.native_error() is None else [])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(33, 17), (17,), (4, 3, 3, 3), ()]
LR = 1e-2
DECOUPLED = {"decoupled_weight_decay": True}

# Every hyper-parameter away from its neutral value.
RULES = {
    "AdamW": (fuseopt.AdamW, {"weight_decay": 0.1}),
    "AdamW amsgrad": (fuseopt.AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "Adam": (fuseopt.Adam, {"weight_decay": 0.1, "maximize": True}),
    "SGD": (fuseopt.SGD, {"weight_decay": 0.1}),
    "SGD nesterov": (fuseopt.SGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD decoupled": (fuseopt.SGD, {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.3, **DECOUPLED}),
    "NAdam": (fuseopt.NAdam, {"weight_decay": 0.1, "maximize": True}),
    "NAdam decoupled": (fuseopt.NAdam, {"weight_decay": 0.1, **DECOUPLED}),
    "Adagrad": (fuseopt.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "Adagrad decoupled": (fuseopt.Adagrad, {"weight_decay": 0.1, **DECOUPLED}),
    "Lion": (fuseopt.Lion, {"weight_decay": 0.1}),
    "Lion maximize": (fuseopt.Lion, {"weight_decay": 0.1, "maximize": True}),
}
AVERAGES = [fuseopt.EMA(0.99), fuseopt.EMA(0.999, warmup="timm")]
SPARSITY = {"max_grad_norm": 1.0, "l1": 1e-3, "ema": AVERAGES, "prune": fuseopt.Prune(0.5, begin=2, end=5)}
THRESHOLD = {"ema": AVERAGES[1], "prune": fuseopt.Prune(threshold=0.03, begin=2, moments="keep")}
STAGES = {
    "none": {},
    "sparsity": {**SPARSITY, "statistics": True},
    "threshold": {**THRESHOLD, "max_grad_norm": 5.0, "statistics": True},
    "2:4": {"ema": AVERAGES, "prune": fuseopt.Prune(pattern="2:4", end=5, every=2, regrow=True), "max_grad_norm": 5.0},
    "rows": {**SPARSITY, "prune": fuseopt.Prune(0.4, pattern="rows", end=5, regrow=True, moments="keep")},
    "regrow": {**SPARSITY, "prune": fuseopt.Prune(0.6, end=5, every=2, regrow=True), "statistics": True},
}
UNMASKED = ("none", "2:4")  # a frozen row leaves nothing to prune of its groups



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
        opt, params = make(cls, dtype, masked=stages not in UNMASKED, backend=backend, **options, **STAGES[stages])
        checker = verify.attach(opt)
        train(opt, params, 5)
        check_passes(checker, 5)


# ---- what happens around a step ------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_closures_schedulers_new_groups_and_missing_gradients(backend):
    options = {"ema": AVERAGES[0], "max_grad_norm": 1.0, "prune": fuseopt.Prune(0.5, begin=3)}
    opt, params = make(fuseopt.AdamW, backend=backend, **options)
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
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_groups_and_dtypes_that_prune_together(scope, backend):
    torch.manual_seed(0)
    dtypes = torch.float32, torch.bfloat16, torch.float64
    params = [torch.nn.Parameter(torch.randn(9, 7).to(dtype)) for dtype in dtypes]
    with torch.no_grad():
        params[2].mul_(1e-12).add_(0.5)  # equal once rounded to fp32, in which they are ranked
    options = fuseopt.Prune(0.6, begin=2, end=4, scope=scope, schedule="linear")
    groups = {"params": params[:1]}, {"params": params[1:], "lr": 1e-4}
    opt = fuseopt.SGD(groups, lr=LR, prune=options, backend=backend)
    checker = verify.attach(opt)
    train(opt, params[:2], 5)
    check_passes(checker, 5)


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
    opt.register_step_post_hook(lambda *_: opt.state[params[0]]["exp_avg"].add_(1e-3))
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
    opt.register_step_post_hook(lambda *_: params[1].data.mul_(1 + 1e-5))
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
    saved = copy.deepcopy(opt.state_dict())
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
    opt, params = make(fuseopt.AdamW, **STAGES["sparsity"])
    checker = verify.attach(opt)
    assert not checker.report().passed  # nothing checked yet
    train(opt, params, 3)
    report = check_passes(checker, 3)
    keys = {
        "check",
        "parameter",
        "stream",
        "max_abs",
        "max_ulp",
        "allowed_ulp",
        "differences",
        "at_step",
        "passed",
    }
    assert all(keys <= row.keys() for row in report.rows)
    streams = {
        row["stream"] for row in report.rows if row["check"] == "trajectory" and row["parameter"] == "w0"
    }
    assert {"p", "exp_avg", "exp_avg_sq", "ema_0", "ema_1", "pruned"} <= streams
    assert "worst parameter" in str(report) and "grad_norm" in str(report)


def test_nothing_of_the_optimizer_changes():
    results = []
    for watched in (False, True):
        opt, params = make(fuseopt.AdamW, **STAGES["sparsity"])
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
