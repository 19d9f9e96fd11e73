"""Fixtures: nothing that a test sets in the process outlives it."""

import os
import sys

if not os.environ.get("FUSEOPT_TEST_DEVICE"):
    sys.modules["fuseopt._CUDA"] = None  # beside the real module the emulated one (emulated.py) would run its code
    os.environ["TRITON_INTERPRET"] = "1"  # before triton, which the construction of any torch optimizer imports
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve a shared machine

import pytest
import torch

import emulated  # noqa: F401  installs itself

import fuseopt
from fuseopt import cpu, torch_abi, torch_layout, triton_driver

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.join(ROOT, "fuseopt") in fuseopt.__path__:  # not installed: kernels/ lies beside fuseopt/
    fuseopt.__path__.append(ROOT)
if triton_driver.why_not() is None and os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.mend()


@pytest.fixture(params=("cpu", "torch"))
def backend(request):
    """Each backend in turn."""
    if request.param == "cpu" and cpu.native_error():
        pytest.skip(cpu.native_error())
    return request.param


@pytest.fixture
def native():
    """The compiled module; its instruction set, its reader and torch's threads are put back afterwards."""
    if cpu.native_error():
        pytest.skip(cpu.native_error())
    from fuseopt import _C

    chosen, threads = _C.instruction_set(), torch.get_num_threads()
    yield _C
    _C.set_instruction_set(chosen)
    cpu.connect(_C, *torch_abi.find(), torch_layout.find())
    torch.set_num_threads(threads)


@pytest.fixture
def accelerate_afresh():
    """accelerate keeps one state for the process, which the first Accelerator settles; none outlives the test."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
