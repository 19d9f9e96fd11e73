"""backend="cuda" without a GPU: the kernels compiled by g++ (tests/emulation), CPU tensors in the GPU's place.

FUSEOPT_TEST_DEVICE=cuda leaves all as it is, for the tests that a GPU runs.
"""

import os

from fuseopt import cpu, cuda, torch_abi, torch_layout


def install() -> str | None:
    """Put the emulated module in the place of fuseopt._CUDA for this process; returns why it cannot be built."""
    if os.environ.get("FUSEOPT_TEST_DEVICE"):
        return cuda.unavailable()
    from emulation import build

    try:
        module = build.load()
    except (ImportError, RuntimeError) as error:
        return str(error)
    put_in_place(module)
    return None


def put_in_place(module) -> None:
    cpu.connect(module, *torch_abi.find(), torch_layout.find())
    cuda.native, cuda.why_not, cuda.DEVICE = module, None, "cpu"
    cuda.unavailable = lambda: None
    cuda.unfit = lambda device: None
    cuda.capturing = lambda: False
    cuda.stream = lambda device: 0


REAL = {name: getattr(cuda, name) for name in ("unavailable", "unfit", "capturing", "stream")}
why_not = install()
