"""The CUDA and Triton backends on a GPU: FUSEOPT_TEST_DEVICE=cuda pytest tests/test_gpu.py, as bench/gpu_check.py does.

Without that the same code runs few cases on stand-ins, to see that it works; what needs a GPU is skipped.
"""

import os

import pytest
import torch
from cases import (
    BF16,
    BY_NAME,
    DTYPES,
    F32,
    ONE_EACH,
    STAGE,
    STAGES,
    assert_same_state,
    ident,
    like,
    parameters,
    run,
    set_gradients,
)

import fuseopt
from fuseopt import EMA, Prune

DEVICE = os.environ.get("FUSEOPT_TEST_DEVICE", "cpu")
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU; FUSEOPT_TEST_DEVICE is not set")
# Not "backend", of which conftest.py leaves most out for Triton.
backends = pytest.mark.parametrize("name", ("cuda", "triton"))
SHAPES = [(), (0, 3), (33, 31), (4099,), (5, 2, 2, 3), (200, 200)]
FULL = {"max_grad_norm": 0.7, "l1": 0.01, "ema": EMA(0.5), "prune": Prune(threshold=0.01), "statistics": True}

# (backend, rule, stage, dtype); Triton compiles a kernel for each, which takes a second.
CASES = [("cuda", rule, stage, dtype) for rule in ONE_EACH for stage in STAGES for dtype in DTYPES]
CASES += [("triton", BY_NAME["adamw-amsgrad-maximize"], stage, dtype) for stage in STAGES for dtype in (F32, BF16)]
CASES += [("triton", rule, STAGE["everything"], F32) for rule in ONE_EACH[1:]]
if DEVICE == "cpu":
    CASES = [("cuda", ONE_EACH[0], STAGE["everything"], F32), ("triton", ONE_EACH[0], STAGE["mask-freeze"], BF16)]


def on_device(params) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().to(DEVICE, copy=True)) for p in params]


def without_waiting(step, times: int = 1) -> None:
    """Run it; an error on a GPU if the host waits for it."""
    if DEVICE != "cpu":
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(times):
            step()
    finally:
        if DEVICE != "cpu":
            torch.cuda.set_sync_debug_mode("default")


def full(name, params, **more):
    """AdamW with every stage, masks included."""
    opt = fuseopt.AdamW(params, lr=0.01, backend=name, **FULL, **more)
    for k, p in enumerate(params):
        opt.mask(p, torch.rand(p.shape, generator=torch.Generator().manual_seed(k)).to(p.device) > 0.3)
    return opt


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(ident, case)))
def test_equals_the_cpu_bit_for_bit(case):
    """Three steps, saved and loaded after the first."""
    name, rule, stage, dtype = case
    cpus = parameters(SHAPES, dtype)
    ours = on_device(cpus)
    expected = run(stage.build(rule, cpus, dtype, backend="cpu"), cpus)
    first = run(stage.build(rule, ours, dtype, backend=name), ours, 1)
    copies = like(ours)
    second = stage.build(rule, copies, dtype, backend=name)
    second.load_state_dict(first.state_dict())
    run(second, copies, 2, 2)
    assert_same_state(second, expected)
    if second.defaults["statistics"]:
        assert second.statistics() == expected.statistics()


@backends
def test_lr_is_read_where_it_lies(name):
    lr = torch.tensor(0.01, device=DEVICE)
    ours, cpus = on_device(parameters(SHAPES)), parameters(SHAPES)
    opt, expected = (fuseopt.AdamW(x, lr=rate, backend=b) for x, rate, b in ((ours, lr, name), (cpus, 0.01, "cpu")))
    run(opt, ours, 1), run(expected, cpus, 1)
    lr.fill_(0.5)
    expected.param_groups[0]["lr"] = float(lr)
    run(opt, ours, 2, 2), run(expected, cpus, 2, 2)
    assert_same_state(opt, expected)


@backends
def test_a_scaler_skips_what_overflowed(name):
    ours, copies = on_device(parameters(SHAPES)), on_device(parameters(SHAPES))
    opt, expected = (full(name, x) for x in (ours, copies))
    for t, infinite in ((1, True), (2, False), (3, True), (4, False)):
        set_gradients(ours, t, 8.0)
        set_gradients(copies, t)
        ours[2].grad[3, 4] *= float("inf") if infinite else 1.0
        opt.grad_scale, opt.found_inf = (torch.tensor(x, device=DEVICE) for x in (8.0, 2.0 * infinite))
        opt.step()
        if not infinite:
            expected.step()
    assert_same_state(opt, expected)


@backends
def test_torchs_scaler(name):
    """Skips the first step and a later one, and halves its scale; a step of CUDA waits for nothing."""
    ours, copies = on_device(parameters(SHAPES)), on_device(parameters(SHAPES))
    opt, expected = (full(name, x) for x in (ours, copies))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=16.0)
    scaler.scale(torch.zeros((), device=DEVICE))  # makes the scale
    own = opt.step
    for t, overflows in ((1, True), (2, False), (3, True), (4, False)):
        set_gradients(ours, t, scaler.get_scale())
        set_gradients(copies, t)
        ours[2].grad[3, 4] *= float("inf") if overflows else 1.0
        opt.step = (lambda: without_waiting(own)) if name == "cuda" and t > 2 else own  # the first makes its memory
        scaler.step(opt)
        scaler.update()
        if not overflows:
            expected.step()
    assert scaler.get_scale() == 4.0
    assert_same_state(opt, expected)


# ---- what only a GPU has ------------------------------------------------------------------------------


@gpu
def test_a_graph_replays_the_same_bits():
    ours, copies = on_device(parameters(SHAPES)), on_device(parameters(SHAPES))
    opt, expected = (full("cuda", x, capturable=True) for x in (ours, copies))
    for p in ours:
        p.grad = torch.zeros_like(p)

    def feed(t):
        set_gradients(copies, t)
        for p, q in zip(ours, copies, strict=True):
            p.grad.copy_(q.grad)

    for t in (1, 2):
        feed(t), opt.step(), expected.step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        opt.step()
    for t in (3, 4, 5):
        feed(t), graph.replay(), expected.step()
    opt.state_dict()  # settles the count
    assert_same_state(opt, expected)


@gpu
@backends
def test_a_steady_step_waits_for_nothing(name):
    ours = on_device(parameters(SHAPES))
    opt = run(full(name, ours), ours)
    if name == "cuda":  # Triton's side asks for found_inf
        opt.grad_scale, opt.found_inf = (torch.tensor(x, device=DEVICE) for x in (1.0, 0.0))
    opt.step()
    without_waiting(opt.step, 3)


@gpu
def test_a_steady_step_allocates_nothing():
    ours = on_device(parameters(SHAPES))
    opt = run(full("cuda", ours), ours)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    opt.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@gpu
@backends
def test_on_another_stream(name):
    ours, cpus = on_device(parameters(SHAPES)), parameters(SHAPES)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        opt = run(fuseopt.AdamW(ours, backend=name), ours)
    stream.synchronize()
    assert_same_state(opt, run(fuseopt.AdamW(cpus, backend="cpu"), cpus))


@gpu
@backends
def test_more_than_2_to_the_31_elements(name):
    n = 2**31 + 4099
    p = torch.nn.Parameter(torch.ones(n, dtype=BF16, device=DEVICE))
    p.grad = torch.ones_like(p)
    fuseopt.SGD([p], lr=0.5, backend=name).step()
    assert all(bool((part == 0.5).all()) for part in p.detach().split(2**28))
