"""Each of a list of mistakes, planted in the torch backend, makes verify fail at the stream it is in."""

import pytest
import torch

import fuseopt
from fuseopt import patterns, reference, rules, select, verify
from fuseopt.stages import clip, decay, ema, prune

LR = 1e-2


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: waking a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the mistakes --------------------------------------------------------------------------------


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


def ema_update_counted_from_zero(patch):
    updates = ema.updates
    patch.setattr(ema, "updates", lambda options, t: max(1, updates(options, t) - 1))


def ema_updated_when_not_due(patch):
    patch.setattr(ema, "is_due", lambda options, t: t > options["start"])


def ema_a_step_late(patch):
    is_due = ema.is_due
    patch.setattr(ema, "is_due", lambda options, t: is_due(options, t - 1))


def ema_of_frozen_entries_moves(patch):
    update = ema.update
    patch.setattr(ema, "update", lambda e, p, w, pruned, frozen: update(e, p, w, pruned, None))


def ema_of_pruned_entries_fades(patch):
    update = ema.update
    patch.setattr(ema, "update", lambda e, p, w, pruned, frozen: update(e, p, w, None, frozen))


def sign_of_zero_is_minus_one(patch):
    patch.setattr(decay, "coupled", lambda g, p, l2, l1: g + l2 * p + torch.where(p > 0, l1, -l1))


def l1_before_the_threshold_shrinks_twice(patch):
    shrink = decay.soft_threshold
    patch.setattr(decay, "soft_threshold", lambda p, t: shrink(p, 2 * t))


def norm_over_masked_entries(patch):
    square, gradient = clip.square, reference.gradient
    raw = []

    def remember(p, grad, keep, gs):
        raw.append(gradient(p, grad, None, gs))
        return gradient(p, grad, keep, gs)

    patch.setattr(reference, "gradient", remember)
    patch.setattr(clip, "square", lambda free: square(raw.pop(0)))


def clip_without_the_epsilon_of_torch(patch):
    patch.setattr(clip, "factor", lambda limit, norm: min(1.0, limit / (norm + 1e-3)) if limit else 1.0)


def ties_from_the_end(patch):
    right = select.TorchRanker.prune

    def wrong(ranker, kth, quotas):
        for key, free, quota in zip(ranker.keys, ranker.free, quotas.tolist(), strict=True):
            tied = free & (key == kth)
            free[tied & (tied.flatten().cumsum(0).reshape(tied.shape) <= tied.sum() - quota)] = False
        right(ranker, kth, quotas)

    patch.setattr(select.TorchRanker, "prune", wrong)


def prunes_the_largest(patch):
    magnitudes = select.magnitudes
    patch.setattr(select, "magnitudes", lambda p: magnitudes(1 / p.detach().abs()))


def prunes_one_too_few(patch):
    kth_smallest = select.kth_smallest
    patch.setattr(select, "kth_smallest", lambda count, *rest: kth_smallest(count - 1, *rest))


def one_group_keeps_the_wrong_entry(patch):
    beyond = patterns._beyond

    def wrong(*args):
        out = beyond(*args)
        out[9, 12:] = ~out[9, 12:]  # of four free entries, no two of them equal
        return out

    patch.setattr(patterns, "_beyond", wrong)


def one_group_keeps_too_many(patch):
    beyond = patterns._beyond

    def wrong(*args):
        out = beyond(*args)
        out[9, 12:] = False
        return out

    patch.setattr(patterns, "_beyond", wrong)


def ties_of_a_group_from_the_front(patch):
    beyond = patterns._beyond
    patch.setattr(patterns, "_beyond", lambda *a: beyond(*(x.flip(1) for x in a[:3]), *a[3:]).flip(1))


def one_row_for_another(patch):
    keys = patterns._keys

    def wrong(p):
        out = keys(p)
        free = out.nonzero().flatten()
        order = free[out[free].argsort()]
        least, most = order[0].item(), order[-1].item()
        out[[least, most]] = out[[most, least]]
        return out

    patch.setattr(patterns, "_keys", wrong)


def half_a_row(patch):
    zero = select.zero

    def wrong(state, gs, p, new):
        new = new.clone()
        new[:, 8:] = False
        zero(state, gs, p, new)

    patch.setattr(select, "zero", wrong)


def nothing_is_let_go(patch):
    patch.setattr(patterns, "let_go", lambda opt, step: None)


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


AVERAGES = [fuseopt.EMA(0.99), fuseopt.EMA(0.999, warmup="timm")]
THRESHOLD = {"ema": AVERAGES, "prune": fuseopt.Prune(threshold=0.03, begin=2)}
FULL = {
    "max_grad_norm": 1.0,
    "l1": 1e-3,
    "ema": AVERAGES,
    "prune": fuseopt.Prune(0.5, begin=2, end=5),
    "statistics": True,
}
N_M = {"ema": AVERAGES, "prune": fuseopt.Prune(pattern="2:4", begin=2), "columns": True}
N_M_REGROW = {"prune": fuseopt.Prune(pattern="2:4", end=3, regrow=True), "columns": True}
ROWS = {"ema": AVERAGES, "prune": fuseopt.Prune(0.4, pattern="rows", begin=2, end=4, schedule="linear")}
ROWS_REGROW = {"statistics": True, "prune": fuseopt.Prune(0.4, pattern="rows", end=4, regrow=True)}
# mistake, class, options, the stream that must fail
PLANTS = [
    (decay_after_the_update, fuseopt.AdamW, {}, "p"),
    (bias_corrections_in_float, fuseopt.AdamW, {}, "p"),
    (one_minus_beta2_in_float, fuseopt.AdamW, {}, "exp_avg_sq"),
    (ema_one_step_ahead, fuseopt.AdamW, {"ema": AVERAGES}, "ema_1"),
    (ema_update_counted_from_zero, fuseopt.AdamW, {"ema": fuseopt.EMA(warmup="swa")}, "ema_0"),
    (ema_update_counted_from_zero, fuseopt.AdamW, {"ema": fuseopt.EMA(warmup="edm2", sigma_rel=0.1)}, "ema_0"),
    (ema_updated_when_not_due, fuseopt.AdamW, {"ema": fuseopt.EMA(0.9, every=2)}, "ema_0"),
    (ema_a_step_late, fuseopt.AdamW, {"ema": fuseopt.EMA(0.9, start=1, every=2)}, "ema_0"),
    (ema_of_frozen_entries_moves, fuseopt.AdamW, {"ema": fuseopt.EMA(0.9)}, "frozen"),
    (ema_of_pruned_entries_fades, fuseopt.AdamW, THRESHOLD, "pruned"),
    (sign_of_zero_is_minus_one, fuseopt.Adam, {"l1": 1e-3}, "exp_avg"),
    (l1_before_the_threshold_shrinks_twice, fuseopt.AdamW, {"l1": 1e-3}, "p"),
    (norm_over_masked_entries, fuseopt.AdamW, {"max_grad_norm": 1.0}, "exp_avg"),
    (clip_without_the_epsilon_of_torch, fuseopt.AdamW, {"max_grad_norm": 1.0}, "exp_avg"),
    (ties_from_the_end, fuseopt.AdamW, {"prune": fuseopt.Prune(0.5)}, "prune_mask"),
    (prunes_the_largest, fuseopt.AdamW, FULL, "prune_mask"),
    (prunes_one_too_few, fuseopt.AdamW, FULL, "prune_count"),
    (one_group_keeps_the_wrong_entry, fuseopt.AdamW, N_M, "prune_mask"),
    (one_group_keeps_too_many, fuseopt.AdamW, N_M, "prune_count"),
    (ties_of_a_group_from_the_front, fuseopt.AdamW, N_M, "prune_mask"),
    (one_row_for_another, fuseopt.AdamW, ROWS, "prune_mask"),
    (half_a_row, fuseopt.AdamW, ROWS, "prune_mask"),
    (nothing_is_let_go, fuseopt.AdamW, N_M_REGROW, "prune_count"),
    (nothing_is_let_go, fuseopt.AdamW, ROWS_REGROW, "grad_norm"),
    (linear_for_cubic, fuseopt.AdamW, FULL, "prune_count"),
    (threshold_a_step_late, fuseopt.AdamW, THRESHOLD, "prune_mask"),
    (negative_zero_where_pruned, fuseopt.AdamW, FULL, "pruned"),
    (frozen_moments_move, fuseopt.AdamW, {}, "frozen"),
    (frozen_weights_lose_the_sign_of_zero, fuseopt.AdamW, {}, "frozen"),
    (one_weight_is_16_ulp_off, fuseopt.AdamW, {}, "p"),
    (the_step_count_runs_ahead, fuseopt.AdamW, {}, "counters"),
]
HOOKED = (
    frozen_moments_move,
    frozen_weights_lose_the_sign_of_zero,
    one_weight_is_16_ulp_off,
    the_step_count_runs_ahead,
)


def make(cls, options):
    """An optimizer over a masked matrix of zeros, negative zeros and equal magnitudes, and a masked vector."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) * 0.1) for shape in ((32, 16), (16,))]
    with torch.no_grad():
        params[0][:, :3] = 0.0
        params[0][:, 3:6] = -0.0
        params[0][:, 6:] = params[0][:, 6:].sign() * 0.25
    options = dict(options)
    columns = options.pop("columns", False)  # of every four one is frozen, where rows would leave none to prune
    opt = cls(params, lr=LR, weight_decay=0.1, backend="torch", **options)
    opt.mask(params[0], torch.arange(16) % 4 > 0 if columns else torch.rand(32, 1) > 0.3)
    opt.mask(params[1], torch.rand(16) > 0.3, mode="grad")
    return opt, params


@pytest.mark.parametrize(
    ("plant", "cls", "options", "stream"), PLANTS, ids=[plant[0].__name__ for plant in PLANTS]
)
def test_a_planted_mistake_fails(plant, cls, options, stream, monkeypatch):
    """The report fails, at the stream that the mistake is in; without the mistake it passes."""
    for planted in (False, True):
        opt, params = make(cls, options)
        if planted and plant in HOOKED:
            after_every_step(plant)(opt, params)
        elif planted:
            plant(monkeypatch)
        checker = verify.attach(opt)
        train(opt, params)
        report = checker.report()
        assert report.passed != planted, str(report)
    assert stream in {row["stream"] for row in report.rows if not row["passed"]}, str(report)
    assert str(report).splitlines()[-1].startswith("FAIL")


def train(opt, params):
    """The first parameter's gradient is 0 in half of its columns: its equal weights stay equal."""
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        params[0].grad[:, 4:12] = 0.0
        opt.step()
