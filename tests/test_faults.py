"""Faults: exceptions around a step, interrupts within it, threads, forks, memory that is stepped twice.

A step is whole or not at all: whatever happens, parameters, state, averages, masks and counts are those
before the step or those after it, and training goes on from there.
"""

import copy
import multiprocessing
import threading
import weakref

import pytest
import torch
from cases import (
    BY_NAME,
    F32,
    F64,
    ONE_EACH,
    Snapshot,
    Stage,
    assert_close,
    assert_same_bits,
    assert_same_state,
    ident,
    like,
    parameters,
    run,
    set_gradients,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from workers import Data, train_in_child

import fuseopt
from fuseopt import EMA, Prune, cpu

SHAPES = [(33, 31), (7,), (64, 32)]
FULL = {"max_grad_norm": 0.5, "ema": [EMA(0.9), EMA(0.99, warmup="timm")], "statistics": True}
# Steps that select at 2, 4, 6; steps that mark what is below a threshold; and steps that are the pass alone.
PRUNING = {
    "plain": {},
    "sparsity": {"prune": Prune(0.6, begin=2, end=6, every=2)},
    "threshold": {"prune": Prune(threshold=0.3, begin=3)},
}


class Fault(Exception):
    """What goes wrong in these tests."""


def raises(*_):
    raise Fault


# ---- exceptions around the step ---------------------------------------------------------------------

AROUND = {
    "closure": lambda opt: opt.step(raises),
    "pre-hook": lambda opt: hooked(opt.register_step_pre_hook(raises), opt),
    "post-hook": lambda opt: hooked(opt.register_step_post_hook(raises), opt),
    "global-pre-hook": lambda opt: hooked(register_optimizer_step_pre_hook(raises), opt),
    "global-post-hook": lambda opt: hooked(register_optimizer_step_post_hook(raises), opt),
}


def hooked(handle, opt) -> None:
    try:
        opt.step()
    finally:
        handle.remove()


@pytest.mark.parametrize("when", (1, 3))
@pytest.mark.parametrize("where", AROUND)
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_training_goes_on_after_an_exception(rule, where, when, backend):
    """Before the pass, nothing has happened; after it, the step has. Either way the rest is as without it."""
    params = parameters(SHAPES)
    twins = like(params)
    a, b = (Stage("", {**FULL, **PRUNING["sparsity"]}, "freeze").build(rule, x, F32, backend=backend) for x in (params, twins))
    run(a, params, when - 1), run(b, twins, when - 1)
    set_gradients(params, when)
    before = Snapshot(a)
    with pytest.raises(Fault):
        AROUND[where](a)
    if "post" in where:
        run(b, twins, 1, when)
    else:
        before.assert_unchanged()
    first = when + ("post" in where)
    run(a, params, 3, first), run(b, twins, 3, first)
    assert_same_state(a, b)
    assert a.statistics() == b.statistics()


def test_a_fault_between_steps_and_in_backward(backend):
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    twin = copy.deepcopy(model)
    a, b = (fuseopt.AdamW(m.parameters(), ema=EMA(0.9), backend=backend) for m in (model, twin))
    x = torch.randn(8, 5)

    def train(m, opt, fault=False):
        opt.zero_grad()
        out = m(x)
        if fault:
            out.register_hook(raises)
        out.square().mean().backward()
        opt.step()

    for t in range(4):
        if t % 2:
            with pytest.raises(Fault):
                train(model, a, fault=True)
        train(model, a), train(twin, b)
    assert_same_state(a, b)


# ---- threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruning", PRUNING)
def test_threads_that_step_two_optimizers_at_once(pruning, backend):
    """Each ends as it does alone."""
    shapes = [(300, 200), (1000,), (50, 70)]

    def make(seed):
        params = parameters(shapes, seed=seed)
        return params, Stage("", {**FULL, **PRUNING[pruning]}, "freeze").build(BY_NAME["adam"], params, F32, backend=backend)

    alone, together = [make(seed) for seed in range(3)], [make(seed) for seed in range(3)]
    for params, opt in alone:
        run(opt, params, 8)
    gate, errors = threading.Barrier(3), []

    def work(params, opt):
        try:
            gate.wait()
            run(opt, params, 8)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=made) for made in together]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not errors
    for (_, a), (_, b) in zip(alone, together, strict=True):
        assert_same_state(a, b)
        assert a.statistics() == b.statistics()


# ---- forked and spawned workers ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("steps", (False, True), ids=("rows", "steps"))
@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_data_loader_workers(method, steps):
    """Forked after the thread pool has run, or spawned; they may step optimizers of their own."""
    params = parameters([(500, 500)])
    opt = run(fuseopt.AdamW(params), params, 2)
    loader = torch.utils.data.DataLoader(Data(steps), batch_size=2, num_workers=2, multiprocessing_context=method, timeout=60)
    rows = []
    for batch in loader:
        rows.append(batch)
        run(opt, params, 1)
    assert torch.equal(torch.cat(rows), torch.stack([Data(steps)[k] for k in range(8)]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_an_optimizer_goes_on_in_a_child_process(method, native):
    """With state, in the child of a process whose thread pool has run: as it does in the parent. No tensor is so
    large that torch's own operations would use threads, on which they hang in a forked child."""
    torch.set_num_threads(2)
    params = parameters([(30_000,)] * 4 + [(7,)])
    opt = run(fuseopt.AdamW(params, ema=EMA(0.9), max_grad_norm=1.0, backend="cpu"), params, 2)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=train_in_child, args=(copy.deepcopy(opt), queue))  # spawn shares what it pickles
    child.start()
    try:
        found = [torch.from_numpy(x) for x in queue.get(timeout=60)]
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
    run(opt, params, 2, first=3)
    for p, q in zip(params, found, strict=True):
        assert_same_bits(p, q)


def test_threads_that_step_one_optimizer(backend):
    """As with torch's, the order of their writes is left open; nothing crashes, and every entry is a number."""
    params = parameters([(200, 100)] * 50)
    opt = fuseopt.AdamW(params, lr=1e-3, backend=backend)
    set_gradients(params, 1)
    opt.step()
    steps = 600 if backend == "cpu" else 3

    def work():
        for _ in range(steps):
            opt.step()

    threads = [threading.Thread(target=work) for _ in range(3)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.isfinite(p).all() and float(opt.state[p]["step"]) > 1 for p in params)


@pytest.mark.parametrize("options", ({}, {"statistics": True}), ids=("steady", "statistics"))
def test_a_step_that_fails_holds_no_gradients(options, monkeypatch):
    """The memory of a gradient that the user drops after an error is free at once."""
    (p,) = parameters([(30,)])
    opt = fuseopt.AdamW([p], lr=0.1, backend="cpu", **options)
    run(opt, [p], 2)
    monkeypatch.setattr(cpu, "norm", raises)
    grad = weakref.ref(p.grad)
    with pytest.raises(Fault):
        opt.step()
    p.grad = None
    assert grad() is None


# ---- memory that is stepped twice -------------------------------------------------------------------


def twice(how: str) -> tuple[list, list]:
    """A list of parameters some of which share memory, and all tensors whose bits tell the outcome."""
    (p, q) = parameters([(400, 1000), (40,)], F64)
    if how == "duplicate":
        return [p, q, p], [p, q]
    if how == "tied":  # a second parameter on the same storage
        return [p, q, torch.nn.Parameter(p.detach())], [p, q]
    if how == "overlapping slices":
        return [torch.nn.Parameter(p.detach()[:, k : k + 600]) for k in (0, 400)] + [q], [p, q]
    if how == "slice":
        return [torch.nn.Parameter(p.detach()[:, ::2]), q, p], [p, q]
    return [p, q, torch.nn.Parameter(p.detach().flatten()[100_000:300_000])], [p, q]


@pytest.mark.parametrize("name", ("adamw-amsgrad-maximize", "sgd-momentum", "sgd", "nadam", "adagrad"))
@pytest.mark.parametrize("how", ("duplicate", "tied", "overlapping", "overlapping slices", "slice"))
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_shared_memory_is_stepped_in_order_as_torch_does(how, name, backend):
    """Not by two threads at once: torch's loop is what it must agree with, on every run alike."""
    rule = BY_NAME[name]
    (ours, shown), (again, second), (torchs, expected) = (twice(how) for _ in range(3))
    a, b = (rule.ours(x, backend=backend) for x in (ours, again))
    c = rule.torchs(torchs, fused=False, foreach=False) if rule.fused else rule.torchs(torchs, foreach=False)
    for t in (1, 2, 3):
        for params, opt in ((ours, a), (again, b), (torchs, c)):
            set_gradients(params, t)
            opt.step()
    for x, y, z in zip(shown, second, expected, strict=True):
        assert_same_bits(x, y)
        assert_close(x, z, (1e-11, 1e-11))  # fp64: a lost step would be off by 1e-2
    if how == "duplicate" and "step" in c.state[torchs[0]]:
        assert a.state[ours[0]]["step"] == c.state[torchs[0]]["step"] == 6


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_duplicate_is_pruned_once(backend):
    (p,) = parameters([(10, 10)])
    opt = fuseopt.SGD([p, p], lr=0.1, momentum=0.9, prune=Prune(0.5), ema=EMA(0.5), backend=backend)
    run(opt, [p], 1)
    assert int((p == 0).sum()) == 50
    assert ((opt.state[p]["ema_0"] == 0) == (p == 0)).all()
    if backend != "cuda":  # there the average is updated twice too, from the first step on
        assert_same_bits(opt.state[p]["ema_0"], p.detach())


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_norm_counts_a_duplicate_as_often_as_it_is_listed(backend):
    """As torch.nn.utils.clip_grad_norm_ does, on every backend."""
    (p,) = parameters([(10, 10)], F64)
    opt = fuseopt.SGD([p, p], lr=0.1, max_grad_norm=0.1, statistics=True, backend=backend)
    run(opt, [p], 1)
    norm = torch.nn.utils.get_total_norm([p.grad, p.grad])
    assert_close(torch.tensor(opt.statistics()["grad_norm"], dtype=F64), norm, (1e-12, 0))


def test_views_of_one_storage_that_do_not_overlap(backend):
    """A flat buffer cut into parameters, as DDP's buckets and FSDP's flat parameters are."""
    flat = parameters([(1000,)])[0].detach()
    views = [torch.nn.Parameter(flat[a:b].view(shape)) for a, b, shape in ((0, 600, (20, 30)), (600, 601, ()), (601, 1000, (399,)))]
    apart = like(views)
    run(BY_NAME["adamw"].ours(views, backend=backend), views)
    run(BY_NAME["adamw"].ours(apart, backend=backend), apart)
    assert_same_bits(flat, torch.cat([p.detach().flatten() for p in apart]))
