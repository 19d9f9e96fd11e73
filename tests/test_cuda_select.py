"""Selection and n:m by the CUDA kernels, on the CPU (tests/emulation), against the CPU's bit for bit."""

import emulated
import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, assert_same_bits, ident
from torch.nn import Parameter

import fuseopt
from fuseopt import EMA, Prune, cpu, cpu_ranker, cuda_ranker, plan, select
from fuseopt.stages import mask

pytestmark = pytest.mark.skipif(bool(cpu.native_error() or emulated.why_not), reason="needs both compiled modules")

# Over a block's border by one, many blocks, less than a vector, a tail of every kind, nothing.
SHAPES = ((17, 241), (3, 4099), (1, 3), (64, 64), (5, 7, 3, 3), (0, 4), (129, 40))


def special(p: torch.Tensor) -> None:
    """Many equal values, both zeros, infinities and NaN among others."""
    p.copy_(torch.where(torch.rand(p.shape) < 0.3, (p * 4).round() / 4, p))
    for value in (0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan):
        p[torch.rand(p.shape) < 0.01] = value


def made(shapes, dtype, held, moments="zero", aligned=True):
    """(optimizer, members): one step taken, some entries pruned and frozen before the ranking. The same each time."""
    torch.manual_seed(0)
    storage = [torch.randn(torch.Size(shape).numel() + 1).to(dtype) for shape in shapes]
    params = [
        Parameter(x[not aligned :][: torch.Size(s).numel()].view(s)) for x, s in zip(storage, shapes, strict=True)
    ]
    averages = [EMA(0.9), EMA(0.99, dtype="parameter"), EMA(0.9, start=10)]  # the last holds no value yet
    groups = [{"params": params[::2]}, {"params": params[1::2], "prune": Prune(0.5, begin=9, moments=moments)}]
    opt = fuseopt.AdamW(groups, amsgrad=True, ema=averages, prune=Prune(0.5, begin=9), backend="cpu")
    for k, p in enumerate(params):
        keep = {"all": torch.rand(p.shape) < 0.8, "rows": torch.rand(len(p), *[1] * (p.dim() - 1)) < 0.8}
        keep["columns"] = torch.rand(1, *p.shape[1:]) < 0.8
        if held != "none":
            opt.mask(p, keep[held], mode="grad" if k == 3 else "freeze")
        p.grad = torch.randn(p.shape).to(dtype)
    opt.step()
    step = plan.Step(opt, 9, 1.0)
    members = [(gs, p) for gs in step.groups for p in gs.group["params"]]
    with torch.no_grad():
        for _, p in members:
            special(p)
            opt.state[p]["prune_mask"] = torch.zeros(-(-p.numel() // 32) * 4, dtype=torch.uint8)
            if held != "none" and p.numel():
                mask.set_pruned(opt.state[p], p, torch.rand(p.shape) < 0.1)
    return opt, members


def pair(*args, **more):
    """The rankers of the CPU and of the kernels, each with members of its own."""
    return [kind(*made(*args, **more)) for kind in (cpu_ranker.Ranker, cuda_ranker.Ranker)]


def assert_same(a, b) -> None:
    for k, ((_, p), (_, q)) in enumerate(zip(a.members, b.members, strict=True)):
        assert_same_bits(p, q, f"parameter {k}")
        ours, theirs = a.opt.state[p], b.opt.state[q]
        assert ours.keys() == theirs.keys()
        for key in (key for key, x in ours.items() if isinstance(x, torch.Tensor)):
            assert_same_bits(ours[key], theirs[key], f"{key} of parameter {k}")


HELD = ("none", "all", "rows", "columns")


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_digits_and_ties(dtype, held):
    a, b = pair(SHAPES, dtype, held, aligned=held != "all")
    for prefix, shift, width in ((0, 20, 11), (0x3F800000 >> 20, 10, 10), (0x3F800000 >> 10, 0, 10)):
        counts = a.histogram(prefix, shift, width)
        assert counts.sum() > 0 and torch.equal(counts, b.histogram(prefix, shift, width))
    for value in (0.25, 0.5, 1.0, 0.0, torch.inf):
        kth = int(select.magnitudes(torch.tensor(value)))
        assert a.ties(kth).sum() > 0 and torch.equal(a.ties(kth), b.ties(kth))


@pytest.mark.parametrize("moments", ("zero", "keep"))
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_the_same_go(dtype, held, moments):
    for value in (0.75, 0.0, torch.inf):
        kth = int(select.magnitudes(torch.tensor(value)))
        ties = pair(SHAPES, dtype, held)[0].ties(kth)
        for quotas in (torch.tensor([0]), ties.sum()[None], ties.sum()[None] // 3, ties // 2, ties * (ties > 20)):
            a, b = pair(SHAPES, dtype, held, moments=moments, aligned=value != 0.75)
            for ranker in (a, b):
                ranker.prune(kth, quotas.clone())
            assert_same(a, b)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=ident)
def test_more_tensors_than_a_launch_takes(dtype):
    shapes = [(2, 1 + k % 37) for k in range(700)]
    a, b = pair(shapes, dtype, "none")
    kth = int(select.magnitudes(torch.tensor(0.5)))
    assert torch.equal(a.ties(kth), b.ties(kth))
    for ranker in (a, b):
        ranker.prune(kth, torch.tensor([57]))
    assert_same(a, b)


PATTERNS = ((1, 2), (2, 4), (1, 4), (4, 8), (3, 5), (3, 40))
LAYOUTS = ((33, 64), (7, 41), (130, 37), (5, 12, 3, 3), (4, 9, 2, 5), (1, 3))


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("n_m", PATTERNS, ids=lambda n_m: f"{n_m[0]}:{n_m[1]}")
@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_patterns(shape, n_m, held):
    for dtype, aligned in ((F32, True), (F32, False), (BF16, True), (F16, False), (F64, True)):
        a, b = pair([shape], dtype, held, aligned=aligned)
        before = a.members[0][1].detach().clone()
        for ranker in (a, b):
            ranker.prune_n_m(*n_m)
        assert_same(a, b)
        assert shape[1] <= n_m[0] or not torch.equal(before, a.members[0][1])


@pytest.mark.parametrize("dtype", (F32, BF16), ids=ident)
def test_channels_last(dtype):
    def last(ranker):
        ((gs, p),) = ranker.members
        p.data = p.data.to(memory_format=torch.channels_last)
        for key in (*gs.slots, *gs.emas):
            ranker.opt.state[p][key] = ranker.opt.state[p][key].to(memory_format=torch.channels_last)
        return type(ranker)(ranker.opt, ranker.members)

    a, b = map(last, pair([(6, 10, 3, 5)], dtype, "all"))
    for ranker in (a, b):
        ranker.prune_n_m(2, 4)
        ranker.prune(int(select.magnitudes(torch.tensor(0.5))), torch.tensor([9]))
    assert_same(a, b)


@pytest.mark.parametrize("pattern", ("unstructured", "2:4"))
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_whole_steps(dtype, pattern):
    def trained(backend):
        torch.manual_seed(0)
        params = [Parameter(torch.randn(shape).to(dtype)) for shape in ((67, 61), (128, 64), (9, 4, 3, 3))]
        sparse = Prune(0.7, begin=1, end=3) if pattern == "unstructured" else Prune(pattern=pattern)
        opt = fuseopt.AdamW(params, ema=EMA(0.9), prune=sparse, backend=backend)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            opt.step()
        return opt, params

    (a, ours), (b, theirs) = trained("cpu"), trained("cuda")
    for p, q in zip(ours, theirs, strict=True):
        assert (p == 0).any()
        assert_same_bits(p, q)
        assert_same_bits(a.state[p]["ema_0"], b.state[q]["ema_0"])
