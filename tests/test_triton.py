"""The Triton kernels, interpreted: bit for bit what the compiled pass for the CPU makes.

A tile has 1024 elements, a block 4096, a word of bits 32. An interpreted program takes milliseconds, so that shapes
are few; what does not touch kernels is tested through `backend` elsewhere.
"""

import io

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
    STAGES,
    assert_same_bits,
    assert_same_state,
    element_mask,
    ident,
    like,
    parameters,
    run,
    set_gradients,
)
from torch.nn import Parameter

import fuseopt
from fuseopt import EMA, Prune, triton_driver

pytestmark = pytest.mark.skipif(triton_driver.why_not() is not None, reason=str(triton_driver.why_not()))

SHAPES = [(33, 31), (0, 3), (1029,), (5, 2, 2, 3)]
CASES = [(rule, stage, F32) for rule in ONE_EACH for stage in STAGES]
CASES += [(rule, STAGE["everything"], dtype) for rule in ONE_EACH for dtype in (F64, BF16, F16)]
CASES += [
    (BY_NAME["adam"], STAGE[name], dtype) for name in ("everything-sparsity", "sparsity-n-m") for dtype in DTYPES[1:]
]


def both(build, params):
    """[(optimizer, its parameters)] of the Triton and the CPU backend, equal in all else; build(params, backend)."""
    copies = like(params)
    return [(build(x, backend), x) for x, backend in ((params, "triton"), (copies, "cpu"))]


def assert_moved(params, before) -> None:
    """Every element; nothing masks or prunes."""
    for p, old in zip(params, before, strict=True):
        assert (p != old).all(), f"{int((p == old).sum())} elements of {tuple(p.shape)} did not move"


@pytest.mark.parametrize(("rule", "stage", "dtype"), CASES, ids=ident)
def test_equals_the_cpu_bit_for_bit(rule, stage, dtype, native):
    """Three steps, saved and loaded after the first."""
    (ours, params), (cpus, copies) = both(
        lambda x, name: stage.build(rule, x, dtype, backend=name), parameters(SHAPES, dtype)
    )
    run(ours, params, 1), run(cpus, copies, 1)
    assert_same_state(ours, cpus)
    saved = io.BytesIO()
    torch.save(ours.state_dict(), saved)
    again = like(params)
    ours = stage.build(rule, again, dtype, backend="triton")
    saved.seek(0)
    ours.load_state_dict(torch.load(saved, weights_only=True))
    run(ours, again, 2, 2), run(cpus, copies, 2, 2)
    assert_same_state(ours, cpus)
    if ours.defaults["statistics"]:
        assert ours.statistics() == cpus.statistics()


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("aligned", (True, False), ids=("aligned", "unaligned"))
def test_sizes_and_alignments(dtype, aligned, native):
    """One launch over many tensors: tiles and blocks that are whole, or are not; every element moves."""
    sizes = (1, 16, 1023, 1024, 1025, 4096, 4097, 8192)
    generator = torch.Generator().manual_seed(0)
    params = []
    for n in sizes:
        memory = torch.randn(n + 1, generator=generator).to(dtype)
        params.append(Parameter(memory[:-1] if aligned else memory[1:]))
    params[0] = Parameter(params[0].detach()[0])
    (ours, params), (cpus, copies) = both(
        lambda x, name: BY_NAME["sgd"].ours(x, lr=0.5, max_grad_norm=5.0, backend=name), params
    )
    for k, (p, q) in enumerate(zip(params, copies, strict=True)):
        assert (p.data_ptr() % 16 == 0) == aligned
        p.grad = torch.full_like(p, k % 3 - 1.5)
        q.grad = p.grad.clone()
    before = [p.detach().clone() for p in params]
    ours.step(), cpus.step()
    assert_same_state(ours, cpus)
    if dtype in (F32, F64):
        assert_moved(params, before)


@pytest.mark.parametrize("shape", ((3000,), (3, 1500), (100, 70), (7, 600), (2, 3, 1100)), ids=str)
def test_masks_of_every_period(shape, native):
    """Rows longer and shorter than a tile, and columns: the bits of a mask repeat."""
    for dims in ((0,), (len(shape) - 1,), tuple(range(len(shape)))):
        generator = torch.Generator().manual_seed(3)
        keep = torch.rand([n if d in dims else 1 for d, n in enumerate(shape)], generator=generator) > 0.4
        (ours, params), (cpus, copies) = both(
            lambda x, name: fuseopt.SGD(x, lr=0.1, momentum=0.9, max_grad_norm=1.0, backend=name), parameters([shape])
        )
        for opt, p in ((ours, params[0]), (cpus, copies[0])):
            opt.mask(p, keep)
            run(opt, [p], 2)
        assert_same_state(ours, cpus)


@pytest.mark.parametrize(
    "kind", ("gaps", "gaps-shared", "twice", "views", "transposed", "two-dtypes", "no-gradient", "all-frozen")
)
def test_tensors_of_every_kind(kind, native):
    """Gaps in memory, memory that is shared, other orders of dimensions."""

    def build(_, backend):
        memory = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
        params = {
            "gaps": lambda: [memory[:, :30]],
            "gaps-shared": lambda: [memory[:, :30], memory[:, 10:], memory[2]],
            "twice": lambda: [memory[:3], memory[1:5]],
            "views": lambda: [memory[0], memory[1], memory[2:]],
            "transposed": lambda: [memory.t()],
            "two-dtypes": lambda: [memory, memory.double()],
            "no-gradient": lambda: [memory[:3], memory[3:]],
            "all-frozen": lambda: [memory[0], memory[1:]],
        }[kind]()
        params = [Parameter(x) for x in params]
        opt = fuseopt.AdamW(params, max_grad_norm=0.5, ema=EMA(0.9), prune=Prune(0.5, begin=2), backend=backend)
        opt.mask(params[0], torch.tensor(False) if kind == "all-frozen" else element_mask(params[0]))
        for t in range(1, 4):
            set_gradients(params, t)
            if kind == "no-gradient":
                params[t % 2].grad = None
            opt.step()
        return opt

    (ours, _), (cpus, _) = both(build, [])
    assert_same_state(ours, cpus)


def test_what_is_wholly_frozen_keeps_its_place_in_the_norm(native):
    """The order in which blocks are added up, which fp64 shows, does not depend on what is frozen."""

    def build(_, backend):
        params = [Parameter(p.detach().double()) for p in parameters([(n,) for n in (70, 50, 33, 20, 90)])]
        opt = fuseopt.SGD(params, lr=1.0, max_grad_norm=0.5, backend=backend)
        opt.mask(params[1], torch.tensor(False))
        return run(opt, params, 12)

    (ours, _), (cpus, _) = both(build, [])
    assert_same_state(ours, cpus)


def test_what_changes_between_steps_is_seen(native):
    """Storage, gradients, state, masks and options that were replaced count from the next step on."""

    def build(params, backend):
        opt = fuseopt.AdamW(params, ema=EMA(0.9, every=2), statistics=True, backend=backend)
        run(opt, params, 2)
        params[0].data = params[0].data.clone()
        run(opt, params, 1, 3)
        opt.state[params[0]]["exp_avg"] = opt.state[params[0]]["exp_avg"] * 2
        opt.param_groups[0]["lr"] = 0.25
        run(opt, params, 1, 4)
        opt.mask(params[1], torch.tensor(False))
        opt.param_groups[0]["max_grad_norm"] = 0.5
        run(opt, params, 1, 5)
        params[0].data = params[0].data.t()
        run(opt, params, 1, 6)
        opt.mask(params[1], torch.tensor(True))
        opt.param_groups[0]["prune"] = Prune(threshold=0.3)
        run(opt, params, 2, 7)
        return opt

    (ours, _), (cpus, _) = both(build, parameters([(8, 8), (40,)]))
    assert_same_state(ours, cpus)
    assert ours.statistics() == cpus.statistics()


def test_ties_across_blocks(native):
    """Equal magnitudes in three tensors and five blocks: those pruned are the CPU's."""

    def build(_, backend):
        params = [Parameter(torch.ones(shape)) for shape in ((2, 4100), (3, 5), (1, 1500))]
        opt = fuseopt.SGD(params, lr=0.0, prune=Prune(0.9, schedule="once"), backend=backend)
        return run(opt, params, 1)

    (ours, _), (cpus, _) = both(build, [])
    assert_same_state(ours, cpus)


def test_nothing_is_refused_late():
    """Where Triton is told to step what it cannot reach, nothing changes; see test_promises for the rest."""
    p = parameters([(3,)])[0]
    opt = fuseopt.SGD([("w", p)], lr=0.1, backend="triton")
    why_not = triton_driver.why_not
    try:
        triton_driver.why_not = lambda device=None: "it drives no cpu"
        p.grad = torch.ones(3)
        before = p.detach().clone()
        with pytest.raises(ValueError, match="'w' is on cpu.*drives no cpu"):
            opt.step()
    finally:
        triton_driver.why_not = why_not
    assert_same_bits(p, before)
