"""How the kernels are compiled: launch options, and what triton.compile takes to build one with no GPU in reach."""

import triton
import triton.language as tl

from . import reduce, rules, step
from .table import BLOCK

def warps(dtype: str, warp_size: int) -> int:
    """Threads that take 16 bytes of a tile at once, or of fp64 twice 16; in warps. 16-bit tensors: eight elements."""
    return (128 if dtype.endswith("16") else 256) // warp_size


def options(dtype: str) -> dict:
    """Of a launch, for tensors of a dtype. No fusing of products and sums: the kernels say where they want an fma."""
    size = 32 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().warp_size
    return {"num_warps": warps(dtype, size), "enable_fp_fusion": False}
