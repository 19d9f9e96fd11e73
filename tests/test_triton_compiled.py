"""What the compiler makes of the Triton kernels, in a process that has not interpreted; it needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fuseopt
from fuseopt import triton_driver

pytestmark = pytest.mark.skipif(triton_driver.why_not() is not None, reason=str(triton_driver.why_not()))

BENCH = Path(__file__).resolve().parents[1] / "bench"

COMPILED = """
import torch, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature
from fuseopt.kernels import aot, rules, select, step

def variants(kernel, calls):
    bind = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))
    return len({str(bind(*call, **aot.options("float32", 32))[1]) for call in calls})

x, y = torch.zeros(9, dtype=torch.int64), torch.zeros(9)
z, constants = y.double(), (rules.RULES["adam"].update, 2, 0, 0, False, False, tl.float32)
calls = [(x[k:], n, y[k:], y[k:], z[k:], m, *constants) for k in (0, 1, 2) for n in (1, 16, 17) for m in (1, 16, 5)]
assert variants(step.step, calls) == 1, "a launch's values are compiled in"
calls = [(x[k:], n, x[k:], a, b, c, tl.float32) for k in (0, 1) for n in (1, 16) for a in (0, 1, 16) for b, c in ((0, 15), (15, 16))]
assert variants(select.histogram, calls) == 1, "a digit is compiled in"
"""


def test_values_are_not_compiled_in():
    """Another number of tensors, learning rate, digit or address makes no new variant of a kernel."""
    _compiled(COMPILED)


def _compiled(script: str) -> str:
    """What a script prints that runs without the interpreter."""
    paths = [os.path.dirname(fuseopt.__path__[0]), *sys.path]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(paths)
    }
    start = f"import fuseopt; fuseopt.__path__[:] = {list(fuseopt.__path__)!r}\n"
    done = subprocess.run([sys.executable, "-c", start + script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


EVERY_KERNEL = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from fuseopt.kernels import aot, reduce, select

def build(kernel, constants, **pointers):
    signature = {name: pointers.get(name, "*i64" if name == "table" else "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(kernel, signature, constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=aot.options("bfloat16", 32))

kind = {"DTYPE": tl.bfloat16}
every = {"SLOTS": 2, "AVERAGES": 2, "NARROW": 2, **kind}
build(reduce.grad_norm, {"MASKED": True, **kind}, scalars="*fp32", sums="*fp64")
build(reduce.clip, {}, sums="*fp64", bounds="*fp64", wide="*fp64", narrow="*fp32")
build(select.histogram, kind, counts="*i64")
build(select.ties, kind, counts="*i64")
build(select.prune_smallest, every, quotas="*i64")
build(select.mark_n_m, kind, marks="*i32")
build(select.prune_marked, every, marks="*i32")
aot.build("nadam", "float64", GPUTarget("cuda", 80, 32), averages=2, narrow=1, masked=True, statistics=True)
"""


NORM = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from fuseopt.kernels import aot, reduce
import machine_code

signature = {"table": "*i64", "tensors": "i32", "scalars": "*fp32", "sums": "*fp64"}
for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for dtype in ("float32", "bfloat16"):
        constants = {"MASKED": False, "DTYPE": getattr(tl, dtype)}
        source = triton.compiler.ASTSource(reduce.grad_norm, signature | dict.fromkeys(constants, "constexpr"), constants)
        built = triton.compile(source, target=target, options=aot.options(dtype, target.warp_size))
        amd = target.backend == "hip"
        facts = machine_code.of_amd(built.asm["amdgcn"]) if amd else machine_code.of_cubin(built.asm["cubin"], 90)
        assert facts["stack"] == facts["spills"] == 0 and facts["registers"] <= 64, (target.arch, dtype, facts)
"""


def test_the_norm_does_not_spill():
    """The sum of a block's lanes takes few registers."""
    _compiled(f"import sys; sys.path.insert(0, {str(BENCH)!r})\n" + NORM.lstrip())


def test_every_kernel_compiles():
    """What the interpreter runs the compiler may still refuse."""
    _compiled(EVERY_KERNEL)
