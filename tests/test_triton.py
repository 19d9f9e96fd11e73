"""The Triton kernels, interpreted: bit for bit what the compiled pass for the CPU makes."""

import io

import pytest
import torch
from cases import (
    DTYPES,
    F32,
    ONE_EACH,
    STAGES,
    assert_same_bits,
    assert_same_state,
    ident,
    like,
    parameters,
    run,
)

# A tile has 1024 elements, a block 4096, a word of bits 32; a program takes 3 ms or more.
SHAPES = [(), (0, 3), (33, 31), (4099,), (5, 2, 2, 3)]


def pair(rule, stage, dtype, shapes=SHAPES, **more):
    """(ours, the CPU's) with equal parameters, and these parameters."""
    params = parameters(shapes, dtype)
    copies = like(params)
    return [(stage.build(rule, x, dtype, backend=name, **more), x) for name, x in (("triton", params), ("cpu", copies))]


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("stage", STAGES, ids=ident)
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_equals_the_cpu_bit_for_bit(rule, stage, dtype, native):
    """Three steps, saved and loaded after the first; every element of fp32 and fp64 tensors that may move does."""
    (ours, params), (cpus, copies) = pair(rule, stage, dtype)
    run(ours, params, 1), run(cpus, copies, 1)
    saved = io.BytesIO()
    torch.save(ours.state_dict(), saved)
    (ours, again), _ = pair(rule, stage, dtype)
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q)
    saved.seek(0)
    ours.load_state_dict(torch.load(saved, weights_only=True))
    run(ours, again, 2, 2), run(cpus, copies, 2, 2)
    assert_same_state(ours, cpus)
    if ours.defaults["statistics"]:
        assert ours.statistics() == cpus.statistics()
