"""Averages: schedules, start and every, types, buffers, the state_dicts of other classes."""

import copy
import importlib.util
import io
import pickle
import warnings
from dataclasses import asdict
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch
from cases import (
    BACKENDS,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    Snapshot,
    assert_close,
    assert_same_bits,
    assert_same_state,
    bits,
    ident,
    parameters,
    run,
    set_gradients,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fuseopt
from fuseopt import EMA, Prune
from fuseopt.stages import ema

EDM2 = EMA(warmup="edm2", sigma_rel=0.1)
SCHEDULES = {
    "constant": EMA(0.9),
    "timm": EMA(0.95, warmup="timm"),
    "diffusers": EMA(0.5, warmup="diffusers"),
    "edm2": EDM2,
    "swa": EMA(warmup="swa"),
    "late": EMA(0.8, start=3, every=2),
    "late mean": EMA(warmup="swa", start=2, every=3),
}
# Many averages at once, one of them in the parameter's dtype and not first, one first.
MANY = [EMA(0.7, dtype="parameter"), EMA(warmup="swa", start=2, every=2), EMA(0.9, "timm", start=1), EMA(0.9, start=6, dtype="parameter")]


# The root of (g + 1) / ((g + 2)**2 * (g + 3)) = 0.1**2, found by bisection; the paper prints 6.94.
GAMMA_OF_A_TENTH = 6.937203937601806


def decay(one: EMA, u: int) -> float:
    """d of update u, in plain words."""
    s = u - 1
    if u == 1:
        return 0.0
    return {
        None: lambda: one.decay,
        "timm": lambda: min(one.decay, 1 - (1 + s) ** (-2 / 3)),
        "diffusers": lambda: min(one.decay, (1 + s) / (10 + s)),
        "swa": lambda: 1 - 1 / u,
        "edm2": lambda: (1 - 1 / u) ** (GAMMA_OF_A_TENTH + 1),
    }[one.warmup]()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train(model, opt, steps: range, after=lambda: None) -> None:
    for t in steps:
        opt.zero_grad()
        batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(t))
        model(batch.to(next(model.parameters()).dtype)).square().mean().backward()
        opt.step()
        after()


def through_disk(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- the schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_schedules(name, dtype, backend):
    """Every average beside the formula, in float64; before the first update it is the weights themselves."""
    one = SCHEDULES[name]
    p = parameters([(33, 31)], dtype)[0]
    opt = fuseopt.AdamW([p], lr=0.02, ema=[EMA(0.3), one], backend=backend)
    average = None
    for t in range(1, 14):
        run(opt, [p], 1, t)
        now, number = p.detach().to(F64, copy=True), (t - one.start) / one.every
        if number >= 1 and number == int(number):
            d = decay(one, int(number))
            average = now if number == 1 else d * average + (1 - d) * now
        with opt.swap_ema(1):
            if average is None:
                assert torch.equal(p, now.to(dtype))
            else:
                tight = 1e-12 if dtype == F64 else 3e-6
                assert_close(opt.state[p]["ema_1"], average, (tight, tight), f"at {t}")
        if number == 1:
            assert_same_bits(opt.state[p]["ema_1"], p.detach().to(opt.state[p]["ema_1"].dtype))


def test_edm2_is_the_power_function_average():
    """The weights of the average are those of integrating theta(t) t^gamma, and as wide as sigma_rel says."""
    for sigma_rel in (0.05, 0.1, 0.2, 12**-0.5):
        gamma = ema.gamma(sigma_rel)
        assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-9)
        n = 4000
        weight = torch.zeros(n, dtype=F64)
        for u in range(1, n + 1):
            w = ema.weight(asdict(EMA(warmup="edm2", sigma_rel=sigma_rel)), u)
            weight *= 1 - w
            weight[u - 1] = w
        edges = torch.arange(n + 1, dtype=F64) / n  # theta is constant between steps: the integral of t^gamma over each
        assert_close(weight, edges[1:] ** (gamma + 1) - edges[:-1] ** (gamma + 1), (1e-9, 1e-12))
        middle = (edges[1:] + edges[:-1]) / 2
        mean = (weight * middle).sum()
        assert float((weight * (middle - mean) ** 2).sum().sqrt()) == pytest.approx(sigma_rel, rel=1e-3)
    assert ema.gamma(0.1) == pytest.approx(6.94, abs=0.005)  # as the paper prints it
    assert ema.gamma(0.05) == pytest.approx(16.97, abs=0.005)


def test_the_first_update_of_a_schedule_copies():
    """Also where the average has a value, as after its `start` was moved."""
    for name, one in SCHEDULES.items():
        if one.warmup is not None:
            assert ema.weight(asdict(one), one.start + one.every) == 1, name


BAD = (
    ({}, "decay: None"), ({"decay": 1.5}, "decay"), ({"decay": 0.9, "warmup": "x"}, "warmup"),
    ({"decay": 0.9, "warmup": "swa"}, "takes none"), ({"decay": 0.9, "warmup": "edm2", "sigma_rel": 0.1}, "takes none"),
    ({"warmup": "edm2"}, "sigma_rel: None"), ({"warmup": "edm2", "sigma_rel": 0.3}, "sigma_rel: 0.3"),
    ({"decay": 0.9, "sigma_rel": 0.1}, "belongs to"), ({"decay": 0.9, "start": 1.5}, "start: 1.5"),
    ({"decay": 0.9, "every": 0}, "every: 0"), ({"decay": 0.9, "dtype": torch.bfloat16}, "dtype"),
)  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        EMA(**options)


def test_the_type_is_plain_data():
    assert EMA(0.9, dtype=torch.float32) == EMA(0.9)
    opt = fuseopt.AdamW(parameters([(3,)]), ema=EMA(0.9, dtype=torch.float32))
    assert opt.param_groups[0]["ema"] == [asdict(EMA(0.9))]


# ---- what a step touches ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("prune", [None, Prune(threshold=0.4), Prune(0.5, begin=2, end=9)], ids=["dense", "threshold", "sparsity"])
def test_an_average_is_left_alone_when_not_due(prune, dtype, backend):
    """Its bits are those of before; save pruned entries, which are +0.0 in every average after every step."""
    params = parameters([(40, 33), (1025,)], dtype)
    opt = fuseopt.AdamW(params, lr=0.05, ema=MANY, prune=prune, backend=backend)
    opt.mask(params[0], torch.rand(40, 33) > 0.3)
    for t in range(1, 10):
        before = [{key: x.clone() for key, x in opt.state[p].items() if key in ema.NAMES} for p in params]
        versions = [{key: opt.state[p][key]._version for key in old} for p, old in zip(params, before, strict=True)]
        run(opt, params, 1, t)
        for p, old, version in zip(params, before, versions, strict=True):
            pruned = opt.prune_mask(p)
            for k, one in enumerate(MANY):
                now, due = opt.state[p][f"ema_{k}"], t > one.start and (t - one.start) % one.every == 0
                if not due and t > 1:
                    kept = torch.ones(p.shape, dtype=torch.bool) if pruned is None else ~pruned
                    assert torch.equal(bits(now)[kept], bits(old[f"ema_{k}"])[kept]), (t, k)
                    if prune is None and backend == "cpu":
                        assert now._version == version[f"ema_{k}"]
                if t > one.start and pruned is not None and not now.isnan().any():
                    assert not bits(now)[pruned].any()
                if due:
                    assert not now.isnan().any()
    if prune:
        assert 0 < int(opt.prune_mask(params[0]).sum())
        assert not opt.state[params[0]]["ema_3"].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("averages", ([EMA(0.5)], [EMA(0.5, dtype="parameter")], [EMA(0.5), EMA(0.9), EMA(0.9, dtype="parameter")]), ids=("one", "narrow", "several"))
def test_frozen_entries_keep_the_bits_of_their_averages(averages, dtype, backend):
    """Also where the average differs from the weight, and where other weights of the tensor move."""
    params = parameters([(40, 33), (50, 64)], dtype)
    opt = run(fuseopt.AdamW(params, lr=0.05, ema=averages, backend=backend), params, 3)
    kept = (torch.rand(40, 33, generator=torch.Generator().manual_seed(1)) > 0.5, torch.zeros(50, 1, dtype=torch.bool))
    for p, keep in zip(params, kept, strict=True):
        opt.mask(p, keep)
    with torch.no_grad():
        opt.state[params[0]]["ema_0"][0, 0] = -0.0
    old = [{key: opt.state[p][key].clone() for key in ema.NAMES[: len(averages)]} for p in params]
    run(opt, params, 3, 4)
    for p, keep, was in zip(params, kept, old, strict=True):
        frozen = ~keep.expand(p.shape)
        for key, x in was.items():
            assert torch.equal(bits(opt.state[p][key])[frozen], bits(x)[frozen])
            assert torch.equal(bits(opt.state[p][key])[~frozen], bits(x)[~frozen]) == (not keep.any())
    late = fuseopt.AdamW(params, lr=0.05, ema=averages, backend=backend)
    late.mask(params[0], kept[0])
    run(late, params, 1)
    assert_same_bits(late.state[params[0]]["ema_0"], params[0].detach().to(late.state[params[0]]["ema_0"].dtype))


def in_part_frozen(n: int) -> torch.Tensor:
    """What is kept: some entries here and there, and no whole word of 32, run of 128 and tile of 1024, nor the last."""
    keep = torch.rand(n, generator=torch.Generator().manual_seed(1)) > 0.5
    keep[64:96], keep[256:384], keep[1024:2048], keep[-1] = False, False, False, False
    return keep


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_what_is_frozen_keeps_every_bit_and_changes_none_beside_it(dtype, native):
    """Whether alone or with all around it, and though its average is NaN; the last one of an odd number too."""
    keep = [in_part_frozen(2501), torch.zeros(1027, dtype=torch.bool)]
    averages = [EMA(0.5), EMA(0.9), EMA(0.9, dtype="parameter")]
    for isa in ("portable", "avx2", native.instruction_set()):
        if not native.set_instruction_set(isa):
            continue
        params, twins = parameters([(2501,), (1027,)], dtype), parameters([(2501,), (1027,)], dtype)
        opt = run(fuseopt.AdamW(params, lr=0.05, ema=averages, backend="cpu"), params, 2)
        free = run(fuseopt.AdamW(twins, lr=0.05, ema=averages, backend="cpu"), twins, 3)
        old = []
        for p, kept in zip(params, keep, strict=True):
            opt.mask(p, kept)
            state = {key: x for key, x in opt.state[p].items() if key.startswith(("ema_", "exp_avg"))}
            for key in ema.NAMES[:3]:
                state[key][~kept & (torch.arange(len(p)) % 3 == 0)] = torch.nan
            old.append([x.clone() for x in (p.detach(), *state.values())])
        run(opt, params, 1, 3)
        for p, twin, kept, was in zip(params, twins, keep, old, strict=True):
            pairs = [(p.detach(), twin.detach())]
            pairs += [(x, free.state[twin][key]) for key, x in opt.state[p].items() if key.startswith(("ema_", "exp_avg"))]
            for (now, unmasked), before in zip(pairs, was, strict=True):
                assert torch.equal(bits(now)[~kept], bits(before)[~kept]), isa
                assert torch.equal(bits(now)[kept], bits(unmasked)[kept]), isa


@pytest.mark.parametrize("dtype", (F32, BF16), ids=ident)
def test_a_late_average_begins_with_frozen_weights_too(dtype, backend):
    keep = [in_part_frozen(2501), torch.zeros(1027, dtype=torch.bool)]
    params = parameters([(2501,), (1027,)], dtype)
    averages = [EMA(0.5, start=2), EMA(0.9), EMA(0.9, start=2, dtype="parameter")]
    opt = fuseopt.AdamW(params, lr=0.05, ema=averages, backend=backend)
    for p, kept in zip(params, keep, strict=True):
        opt.mask(p, kept)
    run(opt, params, 3)
    for p, kept in zip(params, keep, strict=True):
        for key in ("ema_0", "ema_2"):
            assert_same_bits(opt.state[p][key], p.detach().to(opt.state[p][key].dtype))
        assert torch.equal(opt.state[p]["ema_1"][~kept], p.detach()[~kept].to(opt.state[p]["ema_1"].dtype))


def test_averages_in_the_parameters_dtype_are_rounded_once(backend):
    """To nearest even, from the fp32 result; an fp32 parameter's is the same either way."""
    for dtype in (BF16, F16, F32):
        p = parameters([(37, 41)], dtype)[0]
        opt = fuseopt.SGD([p], lr=0.1, ema=[EMA(0.75, dtype="parameter"), EMA(0.75)], backend=backend)
        average = None
        for t in range(1, 6):
            run(opt, [p], 1, t)
            w = p.detach().double()  # 0.25 * (p - e) + e: exact in double up to the one rounding to fp32
            average = w if t == 1 else ((0.25 * (w - average).float().double() + average).float()).to(dtype).double()
            assert opt.state[p]["ema_0"].dtype == dtype
            assert opt.state[p]["ema_1"].dtype == F32
            assert torch.equal(opt.state[p]["ema_0"].double(), average), (dtype, t)


def test_one_average_in_the_parameters_dtype_and_nothing_else(backend):
    p = parameters([(200, 100)], BF16)[0]
    opt = run(fuseopt.SGD([p], lr=0.1, ema=EMA(0.75, dtype="parameter"), backend=backend), [p], 1)
    first = p.detach().double()
    run(opt, [p], 1, 2)
    expected = (0.25 * (p.detach().double() - first) + first).float().to(BF16)
    assert_same_bits(opt.state[p]["ema_0"], expected)


def test_a_weight_of_zero_leaves_the_bits_alone(backend):
    """0 * inf is NaN, and -0 + 0 is +0."""
    p = torch.nn.Parameter(torch.linspace(1.0, 2.0, 2000).reshape(2, 1000))
    opt = fuseopt.SGD([p], lr=0.0, ema=[EMA(1.0), EMA(0.9, every=9)], prune=Prune(threshold=1.1), backend=backend)
    opt.state[p]["prune_mask"] = torch.zeros(252, dtype=torch.uint8)
    run(opt, [p], 1)
    with torch.no_grad():
        opt.state[p]["ema_0"][1, :4] = torch.tensor([-0.0, 3.0, -3.0, 1.0])
        p[1, :4] = torch.tensor([1.5, torch.inf, -torch.inf, 5.0])
    was = opt.state[p]["ema_0"].clone()
    run(opt, [p], 1, 2)
    assert_same_bits(opt.state[p]["ema_0"][1], was[1])


def test_every_backend_and_instruction_set_gives_the_same_bits(native):
    """And any number of threads, over sizes that span vectors, tiles and blocks."""
    def averages(isa, threads, dtype):
        assert native.set_instruction_set(isa)
        torch.set_num_threads(threads)
        params = parameters([(1,), (33, 31), (200, 200), (16385,)], dtype)
        opt = fuseopt.AdamW(params, lr=0.05, ema=MANY, prune=Prune(threshold=0.1), backend="cpu")
        opt.mask(params[1], torch.arange(33)[:, None] % 3 > 0)
        return run(opt, params, 6)

    best = native.instruction_set()
    for dtype in DTYPES:
        first = averages("portable", 1, dtype)
        for isa in {best, "avx2"} if best != "portable" else {best}:
            assert_same_state(first, averages(isa, 2, dtype))


def test_a_skipped_step_leaves_everything(backend):
    model = network()
    opt = fuseopt.AdamW(model.parameters(), ema=MANY, backend=backend)
    opt.average_buffers(model)
    for t in range(5):
        train(model, opt, range(t, t + 1))
        model(torch.randn(4, 6))  # moves the buffers
        opt.found_inf = torch.tensor(2.0)
        buffers = copy.deepcopy(opt.param_groups[0].pop("ema_buffers"))
        snapshot, own = Snapshot(opt), opt.param_groups[0]
        own["ema_buffers"] = copy.deepcopy(buffers)
        opt.step()
        assert same_buffers(own.pop("ema_buffers"), buffers)
        snapshot.assert_unchanged()
        own["ema_buffers"] = buffers
        opt.found_inf = None


def same_buffers(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[key]["begun"] == b[key]["begun"] and all(torch.equal(x, b[key]["values"][n]) for n, x in a[key]["values"].items())
        for key in a
    )


@pytest.mark.skipif("cpu" not in BACKENDS, reason="there is no compiled pass")
def test_steps_at_which_nothing_is_made_are_one_call(monkeypatch):
    """Also before an average has begun, with state made early, and with averages that are not due."""
    from fuseopt import backends

    slow = []
    update = backends.TABLE["cpu"][0]
    monkeypatch.setitem(backends.TABLE, "cpu", (lambda opt, step: slow.append(step.t) or update(opt, step), *backends.TABLE["cpu"][1:]))
    params = parameters([(8, 8), (5,)])
    opt = fuseopt.AdamW(params, ema=[EMA(0.9, start=4), EMA(0.9, every=3)])
    opt.mask(params[0], torch.zeros(8, 1, dtype=torch.bool))  # which makes all state
    run(opt, params, 9)
    assert slow == [1, 3, 5]  # the moments, and each first copy


# ---- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", [None, Prune(threshold=0.4), Prune(0.5, begin=2, end=8, every=3)], ids=["dense", "threshold", "sparsity"])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("at", range(0, 9))
def test_resuming_at_any_step_gives_the_same_bits(at, way, prune, backend):
    def make(dtype=BF16):
        params = parameters([(20, 11), (37,), (6, 7)], dtype)
        return params, fuseopt.AdamW(params, lr=0.05, ema=MANY, prune=prune, backend=backend)

    def steps(opt, params, first, last):
        for t in range(first, last + 1):
            set_gradients(params, t)
            if t < 4:
                params[2].grad = None  # late: its first gradient falls where others' averages have begun
            opt.step()

    params, opt = make()
    opt.mask(params[1], torch.ones(37, dtype=torch.bool))  # makes all state early
    steps(opt, params, 1, at)
    if way == "state_dict":
        again, second = make()
        with torch.no_grad():
            for p, q in zip(params, again, strict=True):
                q.copy_(p)
        second.load_state_dict(through_disk(opt.state_dict()))
    elif way == "deepcopy":
        again, second = copy.deepcopy((params, opt))
    else:
        again, second = pickle.loads(pickle.dumps((params, opt)))
    steps(opt, params, at + 1, 9)
    steps(second, again, at + 1, 9)
    assert_same_state(opt, second)
    assert all(not opt.state[p][f"ema_{k}"].isnan().any() for p in params for k in range(4))


def test_checkpoints_have_the_same_entries_before_and_after_an_average_begins(backend):
    """torch.distributed.checkpoint loads in place."""
    for cls in (fuseopt.AdamW, fuseopt.SGD):
        p = parameters([(3, 4)])[0]
        opt = cls([p], lr=0.1, ema=EMA(0.9, start=2), backend=backend)
        keys = []
        for t in range(1, 5):
            run(opt, [p], 1, t)
            keys.append(sorted(opt.state_dict()["state"][0]))
        assert keys[0] == keys[-1] and "ema_0" in keys[0]


def test_dcp_carries_averages_and_buffers(tmp_path, backend):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def make():
        model = network()
        opt = fuseopt.AdamW(model.parameters(), lr=0.05, ema=MANY, backend=backend)
        opt.average_buffers(model)
        return model, opt

    model, opt = make()
    train(model, opt, range(3))
    state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    other, second = make()
    state = dict(zip(("model", "optimizer"), get_state_dict(other, second), strict=True))
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, second, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert same_buffers(opt.param_groups[0]["ema_buffers"], second.param_groups[0]["ema_buffers"])
    train(model, opt, range(3, 8))
    train(other, second, range(3, 8))
    assert_same_state(opt, second)
    assert same_buffers(opt.param_groups[0]["ema_buffers"], second.param_groups[0]["ema_buffers"])


# ---- swapping and copying --------------------------------------------------------------------------


def test_an_average_without_an_update_is_the_weights(backend):
    model, other = network(), network(1)
    opt = fuseopt.AdamW(model.named_parameters(), ema=EMA(0.9, start=5), backend=backend)
    for _ in range(2):
        own = [p.detach().clone() for p in model.parameters()]
        with opt.swap_ema():
            assert all(map(torch.equal, model.parameters(), own))
        opt.copy_ema_to(other)
        assert all(map(torch.equal, other.parameters(), own))
        exported = opt.ema_state_dict(model)
        assert all(torch.equal(exported[name], p) for name, p in model.named_parameters())
        train(model, opt, range(2))


def test_an_average_that_is_not_configured(backend):
    model = network()
    opt = fuseopt.AdamW(model.parameters(), ema=[EMA(0.9), EMA(0.5)], backend=backend)
    for k in (2, -1, "0", None):
        for call in (lambda: opt.swap_ema(k).__enter__(), lambda: opt.copy_ema_to(model, k),
                     lambda: opt.ema_state_dict(model, k), lambda: opt.load_ema_state_dict(model.state_dict(), model, k)):  # fmt: skip
            with pytest.raises(ValueError, match="no average .*keeps 2"):
                call()


@pytest.mark.parametrize("buffers", [False, True])
def test_swapping_restores_every_bit_even_if_the_body_raises(buffers, backend):
    model = network()
    opt = fuseopt.AdamW(model.parameters(), ema=EMA(0.5), backend=backend)
    if buffers:
        opt.average_buffers(model)
    train(model, opt, range(4))
    own = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(KeyError, match="body"), opt.swap_ema():
        assert torch.equal(model[1].running_mean, own["1.running_mean"]) != buffers
        assert not torch.equal(model[0].weight, own["0.weight"])
        assert torch.equal(model[1].num_batches_tracked, own["1.num_batches_tracked"])
        raise KeyError("body")
    for name, x in model.state_dict().items():
        assert torch.equal(x, own[name]), name


# ---- buffers ---------------------------------------------------------------------------------------


def test_buffers_follow_each_average(backend):
    model = network().double()
    opt = fuseopt.AdamW(model.named_parameters(), ema=[EMA(0.9), EMA(warmup="swa", start=1, every=2)], backend=backend)
    opt.average_buffers(model)
    seen = []
    train(model, opt, range(7), lambda: seen.append(model[1].running_var.clone()))
    first, second = (opt.param_groups[0]["ema_buffers"][f"ema_{k}"]["values"]["1.running_var"] for k in (0, 1))
    average = seen[0]
    for x in seen[1:]:
        average = 0.9 * average + 0.1 * x
    assert_close(first, average, (1e-14, 1e-14))
    assert_close(second, torch.stack(seen[2::2]).mean(0), (1e-14, 1e-14))
    other = network(1).double()
    opt.copy_ema_to(other, 1)
    assert torch.equal(other[1].running_var, second)


def test_buffers_begin_with_their_average(backend):
    """Without a warm-up the first update is a copy all the same, and nothing is copied before it is due."""
    model = network().double()
    opt = fuseopt.AdamW(model.named_parameters(), ema=EMA(0.9, start=2, every=2), backend=backend)
    opt.average_buffers(model)
    seen = []
    for t in range(6):
        train(model, opt, range(t, t + 1), lambda: seen.append(model[1].running_var.clone()))
        assert opt.param_groups[0]["ema_buffers"]["ema_0"]["begun"] == (t >= 3)
    found = opt.param_groups[0]["ema_buffers"]["ema_0"]["values"]["1.running_var"]
    assert_close(found, 0.9 * seen[3] + 0.1 * seen[5], (1e-14, 1e-14))


def test_buffers_are_saved_with_the_optimizer(backend):
    model = network()
    opt = fuseopt.AdamW(model.parameters(), ema=MANY, backend=backend)
    opt.average_buffers(model)
    train(model, opt, range(3))
    saved = through_disk(opt.state_dict())
    copies = {}
    for when in ("before", "after"):
        other = copy.deepcopy(model)
        copies[when] = (other, fuseopt.AdamW(other.parameters(), ema=MANY, backend=backend))
        if when == "before":
            copies[when][1].average_buffers(other)
        copies[when][1].load_state_dict(copy.deepcopy(saved))
        if when == "after":
            copies[when][1].average_buffers(other)
    copies["deepcopy"] = copy.deepcopy((model, opt))
    copies["pickle"] = pickle.loads(pickle.dumps((model, opt)))
    for when in ("deepcopy", "pickle"):
        copies[when][1].average_buffers(copies[when][0])
    train(model, opt, range(3, 7))
    for other, second in copies.values():
        train(other, second, range(3, 7))
        assert same_buffers(opt.param_groups[0]["ema_buffers"], second.param_groups[0]["ema_buffers"])


def test_the_model_of_averaged_buffers_is_not_kept_alive(backend):
    import weakref

    model = network()
    params = list(model.parameters())
    opt = fuseopt.AdamW(params, ema=EMA(0.5), backend=backend)
    opt.average_buffers(model)
    train(model, opt, range(2))
    gone = weakref.ref(model)
    values = copy.deepcopy(opt.param_groups[0]["ema_buffers"])
    del model
    assert gone() is None
    with pytest.warns(UserWarning, match=r"stand still.*average_buffers\(model\)"):
        run(opt, params, 1)
    assert same_buffers(opt.param_groups[0]["ema_buffers"], values)


def test_resuming_without_the_model_of_averaged_buffers_warns(backend):
    """Else later exports would pair new averages of weights with old statistics."""
    model = network()
    opt = fuseopt.AdamW(model.parameters(), ema=EMA(0.5), backend=backend)
    opt.average_buffers(model)
    train(model, opt, range(2))
    other = copy.deepcopy(model)
    second = fuseopt.AdamW(other.parameters(), ema=EMA(0.5), backend=backend)
    second.load_state_dict(through_disk(opt.state_dict()))
    with pytest.warns(UserWarning, match="stand still"):
        train(other, second, range(2, 3))
    second.average_buffers(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, second, range(3, 4))


def test_wrong_buffers_change_nothing(backend):
    model = network()
    opt = fuseopt.AdamW(model.named_parameters(), ema=EMA(0.5), backend=backend)
    with pytest.raises(TypeError, match="list"):
        opt.average_buffers([model])
    with pytest.raises(ValueError, match="no average"):
        fuseopt.AdamW(model.parameters()).average_buffers(model)
    opt.average_buffers(model)
    train(model, opt, range(2))
    with pytest.raises(ValueError, match="1.running_mean"):
        opt.average_buffers(nn.Sequential(nn.Linear(3, 3)))
    wider = network()
    wider[1] = nn.BatchNorm1d(9)
    with pytest.raises(ValueError, match=r"\(9,\), its average \(8,\)"):
        opt.average_buffers(wider)
    with pytest.raises(ValueError, match="1.running"):
        opt.copy_ema_to(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)))
    model[1].running_mean = torch.zeros(9)
    entry = opt.param_groups[0].pop("ema_buffers")
    snapshot = Snapshot(opt)
    opt.param_groups[0]["ema_buffers"] = entry
    with pytest.raises(ValueError, match="running_mean"):
        opt.step()
    opt.param_groups[0].pop("ema_buffers")
    snapshot.assert_unchanged()


# ---- the classes of other libraries ----------------------------------------------------------------


class OfTorch:
    """Both kinds of AveragedModel."""

    def __init__(self, model, schedule, buffers):
        average = get_ema_multi_avg_fn(0.9) if schedule == "constant" else None
        self.theirs = AveragedModel(model, multi_avg_fn=average, use_buffers=buffers)
        self.update = lambda: self.theirs.update_parameters(model)


class OfTimm:
    def __init__(self, model, schedule, buffers):
        spec = PathFinder.find_spec("timm")
        file = Path(spec.submodule_search_locations[0]) / "utils" / "model_ema.py" if spec else None
        if not file or not file.exists():
            pytest.skip("needs timm (pip install --no-deps timm)")
        module_spec = importlib.util.spec_from_file_location("timms_model_ema", file)  # timm itself needs torchvision
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        self.theirs = module.ModelEmaV3(model, decay=0.95 if schedule == "timm" else 0.9, use_warmup=schedule == "timm", exclude_buffers=not buffers)
        self.t = 0
        self.model = model

    def update(self):
        self.t += 1
        self.theirs.update(self.model, step=self.t)


class OfDiffusers:
    def __init__(self, model, schedule, buffers):
        EMAModel = pytest.importorskip("diffusers.training_utils").EMAModel
        options = {"constant": {"decay": 0.9, "min_decay": 0.9}, "timm": {"decay": 0.95, "use_ema_warmup": True, "power": 2 / 3},
                   "diffusers": {"decay": 0.5}, "swa": {"decay": 1.0, "use_ema_warmup": True, "power": 1.0}}[schedule]  # fmt: skip
        self.model = model
        self.theirs = EMAModel(model.parameters(), **options)
        self.update = lambda: self.theirs.step(model.parameters())


CLASSES = [
    ("averaged_model", OfTorch, "constant", False), ("averaged_model", OfTorch, "constant", True),
    ("averaged_model", OfTorch, "swa", False), ("averaged_model", OfTorch, "swa", True),
    ("timm", OfTimm, "constant", True), ("timm", OfTimm, "timm", True),
    *(("diffusers", OfDiffusers, schedule, False) for schedule in ("constant", "timm", "diffusers", "swa")),
]  # fmt: skip


def assert_same_average(state_dict, theirs, what):
    """num_batches_tracked: AveragedModel(use_buffers=True) "averages" a whole number, so that it stays as it was."""
    assert state_dict.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith("num_batches_tracked"):
            continue
        ours = state_dict[name]
        if isinstance(value, list):
            for a, b in zip(ours, value, strict=True):
                assert_close(a, b, (2e-6, 1e-6), f"{what} {name}")
        elif isinstance(value, torch.Tensor):
            assert ours.dtype == value.dtype
            assert_close(ours, value, (2e-6, 1e-6), f"{what} {name}")
        else:
            assert ours == value, (what, name)


@pytest.mark.parametrize(("format", "make", "schedule", "buffers"), CLASSES, ids=[f"{c[1].__name__}-{c[2]}-{c[3]}" for c in CLASSES])
def test_the_same_as_another_class_and_on_from_its_state(format, make, schedule, buffers, backend):
    """Beside it step by step; loads into it strictly; and ours, begun late, goes on from what it saved."""
    model = network()
    opt = fuseopt.AdamW(model.named_parameters(), lr=0.05, ema=[EMA(0.5), SCHEDULES[schedule]], backend=backend)
    if buffers:
        opt.average_buffers(model)
    beside = make(model, schedule, buffers)
    train(model, opt, range(5), beside.update)
    assert_same_average(opt.ema_state_dict(model, 1, format), beside.theirs.state_dict(), "after 5")

    later = fuseopt.AdamW(model.named_parameters(), lr=0.05, ema=[EMA(0.5), SCHEDULES[schedule]], backend=backend)
    if buffers:
        later.average_buffers(model)
    saved = copy.deepcopy(beside.theirs.state_dict())
    later.load_ema_state_dict(saved, model, 1, updates=5 if format == "timm" else None)
    assert later.param_groups[0]["ema"][1]["start"] == -5
    assert_same_average(later.ema_state_dict(model, 1, format), saved, "read")
    back = make(network(2), schedule, buffers)
    back.theirs.load_state_dict(opt.ema_state_dict(model, 1, format))
    train(model, later, range(5, 9), beside.update)
    assert_same_average(later.ema_state_dict(model, 1, format), beside.theirs.state_dict(), "after 9")


def test_diffusers_models_that_begin_late(backend):
    EMAModel = pytest.importorskip("diffusers.training_utils").EMAModel
    model = network()
    theirs = EMAModel(model.parameters(), decay=0.5, update_after_step=2)
    train(model, fuseopt.AdamW(model.parameters(), lr=0.05), range(5), lambda: theirs.step(model.parameters()))
    opt = fuseopt.AdamW(model.parameters(), lr=0.05, ema=SCHEDULES["diffusers"], backend=backend)
    opt.load_ema_state_dict(copy.deepcopy(theirs.state_dict()), model)
    train(model, opt, range(5, 9), lambda: theirs.step(model.parameters()))
    for p, average in zip(model.parameters(), theirs.shadow_params, strict=True):
        assert_close(opt.state[p]["ema_0"], average, (2e-6, 1e-6))


def test_an_average_of_every_third_step_goes_on_where_the_file_ends(backend):
    """Its number of updates comes back, and the next one is made three steps later."""
    model, later = network(), network(1)
    one = EMA(0.5, warmup="diffusers", every=3)
    opt, second = (fuseopt.AdamW(m.named_parameters(), lr=0.05, ema=one, backend=backend) for m in (model, later))
    train(model, opt, range(6))
    later.load_state_dict(model.state_dict())
    train(later, second, range(6, 7))
    second.load_ema_state_dict(opt.ema_state_dict(model, format="diffusers"), later)
    assert second.param_groups[0]["ema"][0]["start"] == 1 - 2 * 3
    assert second.ema_state_dict(later, format="diffusers")["optimization_step"] == 2
    read = {p: second.state[p]["ema_0"].clone() for p in later.parameters()}
    for t in (7, 8, 9):
        assert all(torch.equal(second.state[p]["ema_0"], e) for p, e in read.items())
        train(later, second, range(t, t + 1))
    for p, e in read.items():  # the third update
        assert_close(second.state[p]["ema_0"], e + (1 - min(0.5, 3 / 12)) * (p.detach() - e), (2e-6, 1e-6))


def test_what_is_read_is_as_sparse_as_the_model(backend):
    model = network()
    opt = fuseopt.AdamW(model.parameters(), ema=EMA(0.9), prune=Prune(0.5), backend=backend)
    train(model, opt, range(2))
    opt.load_ema_state_dict(network(3).state_dict(), model)
    for p in model.parameters():
        if p.dim() > 1:
            average, pruned = opt.state[p]["ema_0"], opt.prune_mask(p)
            assert pruned.any() and (average != 0).any() and not bits(average)[pruned].any()


def test_diffusers_cannot_tell_edm2():
    model = network()
    opt = fuseopt.AdamW(model.parameters(), ema=EDM2)
    with pytest.raises(ValueError, match="edm2.*averaged_model"):
        opt.ema_state_dict(model, format="diffusers")


@pytest.mark.parametrize("format", ["model", "averaged_model", "timm", "diffusers"])
@pytest.mark.parametrize("prune", [None, Prune(threshold=0.1)], ids=["dense", "pruned"])
def test_formats_round_trip(format, prune, backend):
    """Into another model's optimizer, by names; the same bits, and the same after more steps."""
    model, other = network(), network()
    ours = [fuseopt.AdamW(m.named_parameters(), lr=0.05, ema=SCHEDULES["timm"], prune=prune, backend=backend) for m in (model, other)]
    opt, second = ours
    for m, o in zip((model, other), ours, strict=True):
        train(m, o, range(3))
        train(m, o, range(3, 5))
    with torch.no_grad():
        for p in other.parameters():
            second.state[p]["ema_0"].mul_(2)
    exported = opt.ema_state_dict(model, format=format)
    reads_count = format in ("averaged_model", "diffusers")
    second.load_ema_state_dict(through_disk(exported), model, updates=None if reads_count else 5)
    train(model, opt, range(5, 8))
    train(other, second, range(5, 8))
    assert_same_state(opt, second)
    assert exported is not opt.ema_state_dict(model, format=format)


def test_an_export_is_a_snapshot(backend):
    model = network()
    opt = fuseopt.AdamW(model.parameters(), ema=EMA(0.5), backend=backend)
    train(model, opt, range(2))
    for format in ("model", "averaged_model", "timm", "diffusers"):
        exported = opt.ema_state_dict(model, format=format)
        was = copy.deepcopy(exported)
        train(model, opt, range(2, 4))
        assert_same_average(exported, was, format)


def test_tied_weights_and_parameters_that_are_not_trained(backend):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.still = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.still.requires_grad_(False)

        def forward(self, x):
            return self.second(self.first(x)) + self.still(x)

    torch.manual_seed(0)
    model = Tied()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    opt = fuseopt.AdamW(trained, lr=0.1, ema=EMA(0.5), backend=backend)
    for t in range(3):
        opt.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        opt.step()
    exported = opt.ema_state_dict(model)
    assert exported.keys() == model.state_dict().keys()
    assert torch.equal(exported["first.weight"], opt.state[model.first.weight]["ema_0"])
    assert torch.equal(exported["second.weight"], exported["first.weight"])
    assert torch.equal(exported["still.weight"], model.still.weight)
    diffusers = opt.ema_state_dict(model, format="diffusers")["shadow_params"]
    assert len(diffusers) == len(list(model.parameters()))
    for format in ("model", "diffusers"):
        second = fuseopt.AdamW(trained, lr=0.1, ema=EMA(0.5), backend=backend)
        second.load_ema_state_dict(opt.ema_state_dict(model, format=format), model)
        for _, p in trained:
            assert_same_bits(second.state[p]["ema_0"], opt.state[p]["ema_0"])


def test_an_optimizer_of_two_models_of_which_one_is_averaged(backend):
    """As diffusers' scripts train a denoiser and a text encoder together, with an average of the first alone."""
    torch.manual_seed(0)
    averaged, other = nn.Linear(4, 4), nn.Linear(4, 4)
    for named in (False, True):
        first = list(averaged.named_parameters() if named else averaged.parameters())
        second = [(f"other.{n}", p) for n, p in other.named_parameters()] if named else list(other.parameters())
        groups = [{"params": first, "ema": EMA(0.5)}, {"params": second}]
        opt = fuseopt.AdamW(groups, lr=0.1, backend=backend)
        for _ in range(3):
            opt.zero_grad()
            averaged(other(torch.randn(5, 4))).square().sum().backward()
            opt.step()
        exported = opt.ema_state_dict(averaged)
        assert torch.equal(exported["weight"], opt.state[averaged.weight]["ema_0"])
        opt.load_ema_state_dict({name: torch.ones_like(x) for name, x in exported.items()}, averaged)
        assert bool((opt.state[averaged.weight]["ema_0"] == 1).all())
        with pytest.raises(ValueError, match="does not hold|no parameter 'weight'"):
            opt.ema_state_dict(nn.Sequential(nn.Linear(4, 4)))
    target = nn.Linear(4, 4)
    opt.copy_ema_to(target)
    assert bool((target.weight == 1).all())


def test_what_cannot_be_read_changes_nothing(backend):
    model = network()
    opt = fuseopt.AdamW(model.named_parameters(), ema=SCHEDULES["timm"], backend=backend)
    train(model, opt, range(2))
    good = opt.ema_state_dict(model)
    diffusers = opt.ema_state_dict(model, format="diffusers")
    cases = [
        ([good], {}, TypeError, "not a dict"),
        ({k: v for k, v in good.items() if k != "3.bias"}, {}, ValueError, "missing '3.bias', unexpected none"),
        (good | {"x": good["3.bias"]}, {}, ValueError, "unexpected 'x'"),
        (good | {"3.bias": torch.zeros(4)}, {}, ValueError, r"'3.bias' is \(4,\), the parameter \(3,\)"),
        (good | {"3.bias": "x"}, {}, ValueError, "'3.bias' is str"),
        (good | {"1.running_var": torch.zeros(3)}, {}, ValueError, "1.running_var"),
        (good, {"updates": -1}, ValueError, "updates: -1"),
        (good, {"updates": 1.5}, ValueError, "updates: 1.5"),
        (diffusers, {"updates": 7}, ValueError, "updates=7.*had 2"),
        (diffusers | {"shadow_params": diffusers["shadow_params"][1:]}, {}, ValueError, "5 entries, the model 6"),
    ]
    snapshot = Snapshot(opt)
    for state_dict, options, error, message in cases:
        with pytest.raises(error, match=message):
            opt.load_ema_state_dict(state_dict, model, **options)
        snapshot.assert_unchanged()
    with pytest.raises(ValueError, match="'x'; use one of 'model'"):
        opt.ema_state_dict(model, format="x")
    fresh = fuseopt.AdamW(model.named_parameters(), ema=SCHEDULES["timm"], backend=backend)
    with pytest.raises(ValueError, match="pass updates="):
        fresh.load_ema_state_dict(good, model)
    assert not fresh.state
    fresh.load_ema_state_dict(good, model, updates=0)  # no update yet: the first one copies
    train(model, fresh, range(1))
    assert_same_bits(fresh.state[model[0].weight]["ema_0"], model[0].weight.detach())


# ---- explain and verify ----------------------------------------------------------------------------


def test_explain_counts_their_bytes():
    p = parameters([(64, 64)], BF16)[0]
    opt = fuseopt.AdamW([p], ema=[EMA(0.9), EMA(0.9, dtype="parameter"), EMA(0.9, every=4)])
    assert opt.explain().rows[0]["ema"] == 64 * 64 * (8 + 4 + 2)
    opt = fuseopt.AdamW([p], ema=EMA(0.9, every=4), prune=Prune(threshold=0.1))
    assert opt.explain().rows[0]["ema"] == 64 * 64 * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("averages", [MANY, [SCHEDULES["edm2"], SCHEDULES["diffusers"]], [SCHEDULES["late mean"]]], ids=["many", "edm2", "late"])
def test_verify_knows_them(averages, dtype, backend):
    params = parameters([(30, 20), (50,)], dtype)
    opt = fuseopt.AdamW(params, lr=0.02, ema=averages, prune=Prune(threshold=0.05), backend=backend)
    checker = fuseopt.verify.attach(opt)
    run(opt, params, 3)
    opt.mask(params[0], torch.rand(30, 20) > 0.5)
    run(opt, params, 6, 4)
    report = checker.report()
    assert report.passed, str(report)
