"""How the kernels are compiled: the options of a launch, and the update kernel built ahead of time, for which no GPU
need be in reach.

    kernels.aot.build("adam", "bfloat16", GPUTarget("cuda", 90, 32), averages=1).asm["cubin"]
    kernels.aot.build("adam", "float32", GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]

That needs a process in which triton has not interpreted.
"""

import triton
import triton.language as tl

from .rules import RULES
from .step import step

DTYPES = ("float32", "float64", "bfloat16", "float16")


def warps(dtype: str, size: int, statistics: bool = False) -> int:
    """How many warps of `size` threads a program has: so many that each takes 16 bytes of a tile of 1024 elements at
    once, of fp64 twice. With four fp32 a thread AdamW takes 64 registers, with eight of them 128; statistics of eight
    would not fit."""
    return (128 if dtype.endswith("16") and not statistics else 256) // size


def options(dtype: str, size: int | None = None, statistics: bool = False) -> dict:
    """Of a launch or a compilation. Products and sums are not fused: the kernels say where they want an fma."""
    if size is None and triton.knobs.runtime.interpret:
        size = 32
    elif size is None:
        size = triton.runtime.driver.active.get_current_target().warp_size
    return {"num_warps": warps(dtype, size, statistics), "enable_fp_fusion": False}


def build(
    rule: str, dtype: str, target, averages: int = 0, narrow: int = 0, masked: bool = False, statistics: bool = False
) -> "triton.compiler.CompiledKernel":
    """The update of tensors of one dtype by a rule of rules.RULES, compiled for a triton GPUTarget.

    averages, narrow, masked, statistics: as AVERAGES, NARROW, MASKED and STATISTICS of step.step.
    """
    number = "*fp64" if dtype == "float64" else "*fp32"
    signature = {"table": "*i64", "tensors": "i32", "scalars": number, "clip": number, "sums": "*fp64", "blocks": "i32"}
    constants = {"update": RULES[rule].update, "SLOTS": RULES[rule].slots, "AVERAGES": averages, "NARROW": narrow}
    constants |= {"MASKED": masked, "STATISTICS": statistics, "DTYPE": getattr(tl, dtype)}
    source = triton.compiler.ASTSource(step, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    return triton.compile(source, target=target, options=options(dtype, target.warp_size, statistics))
