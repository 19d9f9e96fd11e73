"""The CUDA kernels of a step, run on the CPU (tests/emulation), against the compiled CPU step: bit for bit."""

import emulated
import pytest
import torch
from cases import (
    BF16,
    BY_NAME,
    DTYPES,
    F16,
    F32,
    F64,
    ONE_EACH,
    STAGE,
    THRESHOLD,
    Snapshot,
    assert_same_bits,
    assert_same_state,
    gradient,
    ident,
    like,
    parameters,
    run,
    set_gradients,
)
from torch.nn import Parameter

from fuseopt import EMA, Prune, cpu

pytestmark = pytest.mark.skipif(bool(emulated.why_not or cpu.native_error()), reason="needs both compiled modules")

# Vectors have 2, 4 or 8 elements, a round of the threads 1024, a block 4096.
BORDERS = tuple(n + d for n in (8, 1024, 4096, 8192) for d in (-1, 0, 1)) + (1, 3)
EVERYTHING = {
    "max_grad_norm": 0.7,
    "l1": 0.2,
    "statistics": True,
    "ema": [EMA(0.5), EMA(0.9, warmup="timm", dtype="parameter"), EMA(warmup="swa", every=2, start=1)],
}


def pair(build, params, step):
    """Optimizers of both backends on equal parameters, each stepped by `step`; they must agree in every bit."""
    made = []
    for backend in ("cpu", "cuda"):
        mine = like(params)
        made.append(build(mine, backend=backend))
        step(made[-1], mine)
    assert_same_state(*made)
    if made[0].defaults["statistics"]:
        assert made[0].statistics() == made[1].statistics()
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_every_stage_at_every_border(rule, dtype):
    options = {**EVERYTHING, "prune": Prune(threshold=THRESHOLD[dtype])}

    def build(params, **more):
        opt = rule.ours(params, **options, **more)
        for k, p in enumerate(params[::2]):
            opt.mask(p, torch.rand(p.shape, generator=torch.Generator().manual_seed(k)) > 0.3)
        opt.grad_scale = torch.tensor(4.0)
        return opt

    pair(build, parameters([(n, 1) for n in BORDERS], dtype), run)


# (shape, shape of the mask): runs shorter and longer than a vector, a word and a block; bits that start anew within
# a vector and within a block; several blocks of rows.
MASKS = [
    ((300, 33), (300, 1)), ((3, 5000), (3, 1)), ((1300, 7), (1, 7)), ((1000, 3), (1, 3)), ((5, 4100), (1, 4100)),
    ((3, 50, 40), (1, 50, 1)), ((2, 3, 4099), (1, 3, 1)), ((70, 70), (70, 70)), ((4, 8192), (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", (F32, F64, BF16), ids=ident)
@pytest.mark.parametrize("mode", ("freeze", "grad"))
def test_masks_of_every_kind(mode, dtype):
    def build(params, **more):
        opt = BY_NAME["adam"].ours(params, **EVERYTHING, **more)
        for k, (p, (_, shape)) in enumerate(zip(params, MASKS, strict=True)):
            opt.mask(p, torch.rand(shape, generator=torch.Generator().manual_seed(k)) > 0.5, mode)
        return opt

    made = pair(build, parameters([shape for shape, _ in MASKS], dtype), run)
    assert {state.get("mask_period") for state in made[1].state.values()} >= {3, 7, 300, 4900}  # stored unexpanded


def test_rows_without_a_free_entry_are_not_read():
    """Their moments may hold anything."""

    def build(params, **more):
        opt = BY_NAME["adamw"].ours(params, ema=EMA(0.9), **more)
        opt.mask(params[0], torch.arange(64)[:, None] % 4 == 0)
        return opt

    def step(opt, params):
        run(opt, params, 1)
        frozen = torch.arange(64) % 4 != 0
        for key, value in opt.state[params[0]].items():
            if key.startswith("exp_avg"):
                value[frozen] = torch.nan
        run(opt, params, 2, first=2)

    pair(build, parameters([(64, 64)]), step)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("offset", (1, 2, 3))
def test_streams_that_are_not_aligned(offset, dtype):
    """Gradients that are views into a bucket, and parameters too."""

    def step(opt, params):
        for t in (1, 2, 3):
            set_gradients(params, t)
            for p in params:
                p.grad = shifted(p.grad, offset)
            opt.step()

    def build(params, **more):
        params[1].data = shifted(params[1].data, offset)
        return BY_NAME["adam"].ours(params, **EVERYTHING, **more)

    pair(build, parameters([(1500,), (4099,), (7,)], dtype), step)


def shifted(x, offset):
    out = torch.empty(x.numel() + offset, dtype=x.dtype)[offset:].view(x.shape)
    assert out.data_ptr() % 16 == offset * x.element_size() % 16
    return out.copy_(x)


@pytest.mark.parametrize("count", (571, 572, 1500))
def test_more_tensors_and_groups_than_a_launch_takes(count):
    """t counts a step once, however many launches prepare it: the averages' weights would tell."""

    def build(params, **more):
        groups = [
            {"params": params[k::20], "lr": 0.01 * (k + 1), "weight_decay": 0.02 * k, "betas": (0.9, 0.9 + k / 400),
             "amsgrad": k % 2 == 1, "max_grad_norm": k % 3 or None}
            for k in range(20)
        ]  # fmt: skip
        return BY_NAME["adamw"].ours(groups, ema=EMA(0.9, warmup="timm", every=2), **more)

    shapes = [(k % 5,) for k in range(count)]
    shapes[-1] = (5000,)
    pair(build, parameters(shapes), run)


def test_dtypes_and_rules_side_by_side():
    def build(params, **more):
        groups = [{"params": params[:6], "momentum": 0.9}, {"params": params[6:], "momentum": 0.0}]
        return BY_NAME["sgd"].ours(groups, **EVERYTHING, **more)

    params = [parameters([(1030,)], DTYPES[k % 4], seed=k)[0] for k in range(12)]
    pair(build, params, run)


def test_norm_over_more_blocks_than_lanes():
    def build(params, **more):
        return BY_NAME["sgd"].ours(params, max_grad_norm=1.0, **more)

    pair(build, parameters([(1025 * 4096 + 5,), (3,)]), lambda opt, params: run(opt, params, 1))


@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
@pytest.mark.parametrize("found", (1.0, 2.0, float("inf")))
def test_skipped_steps_change_nothing(found, rule):
    """The first step is skipped, when moments are new, and one later."""

    def step(opt, params):
        run_if(opt, params, 1, found)
        run_if(opt, params, 2, 0.0)
        before = Snapshot(opt)
        run_if(opt, params, 3, found, before)
        run(opt, params, 2, first=4)

    def run_if(opt, params, t, found, before=None):
        start = like(params)
        set_gradients(params, t, float("inf") if found else 1.0)
        opt.found_inf, opt.grad_scale = torch.tensor(found), torch.tensor(2.0)
        opt.step()
        if found:
            for p, q in zip(params, start, strict=True):
                assert_same_bits(p, q, "a skipped step")
        if before:
            for p, saved in before.state.items():
                for key, value in saved.items():
                    assert_same_bits(opt.state[p][key], value, key)
        del opt.found_inf, opt.grad_scale

    options = {**EVERYTHING, "prune": Prune(threshold=0.1, begin=2), "statistics": False}
    pair(lambda params, **more: rule.ours(params, **options, **more), parameters([(1030,), (5, 3)]), step)


@pytest.mark.parametrize("name", ("adamw", "sgd-decoupled", "adagrad", "nadam", "lion"))
@pytest.mark.parametrize("dtype", (F32, F64), ids=ident)
def test_lr_as_tensor(dtype, name):
    """It is read at each step, and decoupled decay follows it."""

    def step(opt, params):
        for t in (1, 2, 3):
            opt.param_groups[0]["lr"].fill_(0.1 / t)
            run(opt, params, 1, first=t)

    rule = BY_NAME[name]
    options = {**rule.options, "lr": None, "l1": 0.1}

    def build(params, **more):
        return rule.cls(params, **{**options, "lr": torch.tensor(0.5, dtype=dtype)}, **more)

    pair(build, parameters([(1030,)]), step)


@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_parameters_that_share_memory_follow_each_other(rule):
    made = []
    for backend in ("cpu", "cuda"):
        memory = parameters([(9000,)])[0].detach()
        params = [Parameter(memory[:6000]), Parameter(memory[100:9000]), Parameter(memory[50:60])]
        opt = rule.ours(params, max_grad_norm=0.5, backend=backend)
        for t in (1, 2):
            for k, p in enumerate(params):
                p.grad = gradient(p, k, t)
            opt.step()
        made.append((opt, memory))
    assert_same_bits(made[0][1], made[1][1])
    assert_same_state(made[0][0], made[1][0])


def test_infinite_and_missing_numbers():
    """In gradients and parameters, with clipping, masks and statistics."""

    def step(opt, params):
        for t in (1, 2):
            set_gradients(params, t)
            params[0].grad[3], params[0].grad[5], params[1].grad[0] = torch.inf, torch.nan, -torch.inf
            opt.step()

    params = parameters([(1030,), (40,)], F16)
    with torch.no_grad():
        params[0][7], params[1][1], params[1][2] = torch.nan, -torch.inf, -0.0
    for options in ({"statistics": True, "l1": 0.1}, {"max_grad_norm": 1.0, "ema": EMA(0.5)}):
        made = []
        for backend in ("cpu", "cuda"):
            mine = like(params)
            made.append(STAGE["mask-freeze"].build(BY_NAME["adam"], mine, F16, backend=backend, **options))
            step(made[-1], mine)
        assert_same_state(*made)
        if "statistics" in options:
            assert made[0].statistics()["nonfinite"] == made[1].statistics()["nonfinite"] > 0


def test_rules_that_share_memory_run_in_the_order_of_the_table():
    """Launches are made rule by rule otherwise, plain SGD first."""
    made = []
    for backend in ("cpu", "cuda"):
        memory = parameters([(900,)])[0].detach()
        params = [Parameter(memory[:600]), Parameter(memory[100:])]
        groups = [{"params": params[:1], "momentum": 0.9}, {"params": params[1:], "momentum": 0.0}]
        run(BY_NAME["sgd-decoupled"].ours(groups, backend=backend), params, 2)
        made.append(memory)
    assert_same_bits(*made)
