"""Whether Triton is there and drives a device; asks without importing it."""

import functools
import os
from importlib import util

from torch import Tensor

from .checks import name_of


@functools.cache
def why_not(device: str | None = None) -> str | None:
    """Why Triton cannot drive devices of this type, None if it can; without a type, why there is no Triton."""
    if util.find_spec("triton") is None:
        return "the package triton is missing; pip install triton"
    if device is None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device == "cpu":
        return "Triton drives no CPU; move it to a GPU, or leave backend out"
    from triton.runtime import driver

    try:
        drives = driver.active.get_active_torch_device().type
    except RuntimeError as error:
        return f"Triton finds no device that it can drive ({error})"
    return None if drives == device else f"Triton drives {drives} here; move it there, or leave backend out"


def check_device(opt) -> None:
    """Raise ValueError unless the first parameter lies where Triton reaches it; checks.py sees to the others."""
    p = next((p for group in opt.param_groups for p in group["params"] if isinstance(p, Tensor)), None)
    why = None if p is None else why_not(p.device.type)
    if why:
        raise ValueError(f"{name_of(opt, p)} is on {p.device}, and backend='triton' was asked for: {why}")
