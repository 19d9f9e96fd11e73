"""Kernels on which test_interpreter.py tries the interpreter."""

import triton
import triton.language as tl


@triton.jit
def fma(x, y, z, out):
    tl.store(out + tl.arange(0, 4), tl.fma(tl.load(x), tl.load(y), tl.load(z)) + tl.zeros([4], tl.float32))


@triton.jit
def store(x, out):
    tl.store(out + tl.arange(0, 4), tl.load(x + tl.arange(0, 4)).to(tl.bfloat16))


@triton.jit
def negate(x, out):
    tile = tl.arange(0, 4) >= 0
    tl.store(out + tl.arange(0, 4), (~(tile & (tl.load(x) == 1))).to(tl.int32))
