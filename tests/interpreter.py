"""Triton's interpreter, mended where triton 3.7 differs from what the compiled kernels do.

Fused multiply-adds multiply and then add; bf16 is truncated, not rounded to nearest even; what comes of comparing
two scalars is no longer boolean once it is spread over a tile. tests/test_interpreter.py shows each.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Mend the interpreter of this process."""
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.interpreter_builder.options.__dict__["sanitize_overflow"] = False  # as compiled kernels; and slow
    builder = interpreter.InterpreterBuilder
    builder.create_fma = lambda self, x, y, z: interpreter.TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)
    splat = builder.create_splat

    def create_splat(self, kind, x):
        if x.data.dtype == np.bool_:
            return interpreter.TensorHandle(np.full(kind.shape, x.data), tl.int1)
        return splat(self, kind, x)

    builder.create_splat = create_splat
    convert = interpreter._convert_float

    def convert_float(x, of, to, rounding):
        if (of, to) == (tl.float32, tl.bfloat16):
            return to_bf16(x)
        if (of, to) == (tl.bfloat16, tl.float32):
            return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return convert(x, of, to, rounding)

    interpreter._convert_float = convert_float


def _call(self, *args, **kwargs):
    """A call within a launch: makes the language the interpreter's only once; at each call, that takes half the time."""
    languages = [x for x in self.fn.__globals__.values() if x is tl or x is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 as the bits of bf16, rounded to nearest even."""
    u = x.view(np.uint32)
    rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def two_sum(a, b):
    """(a + b rounded, the rest), Knuth's."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a, b):
    """(a * b rounded, the rest), Dekker's, of doubles that do not overflow when multiplied by 2^27 + 1."""
    p, parts = a * b, []
    for x in (a, b):
        high = x * 134217729.0
        high = high - (high - x)
        parts += [high, x - high]
    ah, al, bh, bl = parts
    return p, al * bl - (((p - ah * bh) - al * bh) - ah * bl)


def odd_sum(a, b):
    """a + b rounded to odd: where it is not exact, to the neighbour whose last bit is set."""
    s, rest = two_sum(a, b)
    even = (s.view(np.int64) & 1) == 0
    towards = np.where(rest > 0, np.inf, -np.inf)
    return np.where((rest != 0) & np.isfinite(rest) & even, np.nextafter(s, towards), s)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z rounded once (Boldo and Melquiond, "Emulation of FMA", 2008); fp32 through doubles."""
    with np.errstate(all="ignore"):
        plain = x * y + z
        a, b, c = (np.asarray(v, dtype=np.float64) for v in np.broadcast_arrays(x, y, z))
        if plain.dtype == np.float32:  # the product is exact
            exact = odd_sum(a * b, c).astype(np.float32)
        else:
            high, low = two_product(a, b)
            upper, lower = two_sum(c, low)
            top, middle = two_sum(high, upper)
            exact = top + odd_sum(lower, middle)
    return np.where(np.isfinite(plain) & np.isfinite(exact) & (exact != 0), exact, plain)
