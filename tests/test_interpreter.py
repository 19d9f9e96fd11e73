"""Each mend of Triton's interpreter is right, and still needed: without it the same kernels give other results."""

import inspect
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from cases import BF16, assert_same_bits

import fuseopt
from fuseopt import triton_driver

pytestmark = pytest.mark.skipif(triton_driver.why_not() is not None, reason=str(triton_driver.why_not()))


def results() -> dict[str, bool]:
    """Whether the interpreter of this process does each thing right."""
    import probes

    square = torch.tensor([1 + 2.0**-12])
    fused = torch.empty(4)
    probes.fma[(1,)](square, square, torch.tensor([-1 - 2.0**-11]), fused)
    halves = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-7.5, float("inf")])
    stored = torch.empty(4, dtype=torch.bfloat16)
    probes.store[(1,)](halves, stored)
    negated = torch.empty(4, dtype=torch.int32)
    try:
        probes.negate[(1,)](torch.ones(1), negated)
    except Exception:  # numpy knows no `and` of numbers
        negated.fill_(1)
    return {
        "fma": fused.tolist() == [2.0**-24] * 4,
        "bf16": torch.equal(stored, halves.to(torch.bfloat16)),
        "boolean": negated.tolist() == [0] * 4,
    }


def test_the_mended_interpreter_is_right():
    assert results() == {"fma": True, "bf16": True, "boolean": True}


def test_each_mend_is_needed():
    """If this fails, triton has mended something: drop ours from interpreter.py."""
    script = "import torch\n" + inspect.getsource(results) + "print(results())"
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str({"fma": False, "bf16": False, "boolean": False}), done.stderr


def test_fma_of_doubles_is_exact():
    import interpreter

    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 4000, dtype=torch.float64, generator=generator)
    z = torch.where(torch.arange(4000) % 2 == 0, z, -x * y * (1 + 2.0**-50 * z))  # half of them cancel
    z[::7] *= 2.0**-60
    found = interpreter.fma(x.numpy(), y.numpy(), z.numpy()).tolist()
    expected = [
        float(Fraction(a) * Fraction(b) + Fraction(c)) for a, b, c in zip(*(v.tolist() for v in (x, y, z)), strict=True)
    ]
    assert found == expected
    assert (x * y + z).tolist() != expected


def test_fma_of_floats_is_that_of_the_processor(native):
    """SGD's p - lr*g, on every sum that lies near the middle between two floats too."""
    import interpreter

    generator = torch.Generator().manual_seed(0)
    g = torch.randn(100_000, generator=generator)
    p = torch.randn(100_000, generator=generator) * 2.0 ** torch.randint(-30, 30, (100_000,), generator=generator)
    lr = 1 + 2.0**-23
    found = torch.from_numpy(interpreter.fma((-torch.tensor([lr])).numpy(), g.numpy(), p.numpy()))
    q = torch.nn.Parameter(p.clone())
    q.grad = g
    fuseopt.SGD([q], lr=lr, backend="cpu").step()
    assert_same_bits(q, found)


def test_bf16_is_rounded_to_nearest_even():
    import interpreter

    patterns = torch.arange(0, 2**32, 4001, dtype=torch.int64)
    middles = torch.arange(0, 2**32, 65536, dtype=torch.int64) + 0x8000
    x = torch.cat([patterns, middles, middles - 1, middles + 1]).to(torch.int32).view(torch.float32)
    found = torch.from_numpy(interpreter.to_bf16(x.numpy()).view("int16")).view(BF16)
    real = ~x.isnan()
    assert_same_bits(found[real], x.to(BF16)[real])
    assert found[~real].isnan().all()
