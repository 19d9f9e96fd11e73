"""Which weights pruning zeroes, and zeroing them: csrc/cpu/select.h and pattern.h in Triton.

Magnitudes are |p| as fp32, as integers of the same order (NaN last). A candidate is neither frozen nor pruned.
"""

import triton
import triton.language as tl

from .table import (
    EMA,
    FREEZE,
    IN_SUMS,
    INNER,
    KEEP,
    PERIOD,
    PRUNED,
    SLOT,
    TILE,
    P,
    alive,
    bits,
    column,
    find,
    kept,
    load,
    set_bits,
    stream,
    tiles,
)


@triton.jit
def magnitude(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def candidates(row, at, live, DTYPE: tl.constexpr):
    """(magnitudes, which are candidates) of a tile."""
    pruned = bits(stream(row, PRUNED, tl.int32), at, live)
    frozen = ~kept(row, at) & (column(row, FREEZE) != 0)
    return magnitude(load(stream(row, P, DTYPE), at, live)), live & ~pruned & ~frozen


@triton.jit(do_not_specialize=["table", "tensors", "counts", "prefix", "shift", "width"])
def histogram(table, tensors, counts, prefix, shift, width, DTYPE: tl.constexpr):
    """Adds to `counts` the candidates by digit: of those m with m >> (shift + width) == prefix, m >> shift."""
    row, number = find(table, tensors)
    begin, _, count = tiles(row, number)
    for t in range(0, count):
        at = begin + t * TILE
        key, free = candidates(row, at, alive(row, at), DTYPE)
        wide = key.to(tl.int64)  # as a shift may be by 31
        digit = (wide >> shift) & ((1 << width) - 1)
        tl.atomic_add(counts + digit, 1, mask=free & (wide >> (shift + width) == prefix), sem="relaxed")


@triton.jit(do_not_specialize=["table", "tensors", "counts", "kth"])
def ties(table, tensors, counts, kth, DTYPE: tl.constexpr):
    """The number of candidates equal to kth of each block."""
    row, number = find(table, tensors)
    begin, _, count = tiles(row, number)
    equal = tl.zeros([TILE], tl.int32)
    for t in range(0, count):
        at = begin + t * TILE
        key, free = candidates(row, at, alive(row, at), DTYPE)
        equal += (free & (key == kth)).to(tl.int32)
    tl.store(counts + column(row, IN_SUMS) + number, tl.sum(equal).to(tl.int64))


@triton.jit
def zero_stream(base, at, chosen):
    tl.store(base + at + tl.arange(0, TILE), tl.zeros([TILE], base.dtype.element_ty), mask=chosen)


@triton.jit
def prune_tile(
    row, at, live, chosen,
    SLOTS: tl.constexpr, AVERAGES: tl.constexpr, NARROW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Sets the bits of what was chosen, and zeroes p, the moments and averages whose addresses the table has.

    Averages without a value stay so.
    """
    set_bits(stream(row, PRUNED, tl.int32), at, live, chosen)
    zero_stream(stream(row, P, DTYPE), at, chosen)
    for c in tl.static_range(SLOTS):
        if column(row, SLOT + c) != 0:
            zero_stream(stream(row, SLOT + c, DTYPE), at, chosen)
    for c in tl.static_range(AVERAGES):
        T = tl.float64 if DTYPE == tl.float64 else tl.float32
        ema = stream(row, EMA + c, DTYPE if NARROW >> c & 1 else T)
        if column(row, EMA + c) != 0:
            old = load(ema, at, live).to(T)
            zero_stream(ema, at, chosen & (old == old))


@triton.jit(do_not_specialize=["table", "tensors", "kth", "quotas"])
def prune_smallest(
    table, tensors, kth, quotas,
    SLOTS: tl.constexpr, AVERAGES: tl.constexpr, NARROW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Prunes the candidates below kth, and of those equal to it the first quotas[b] of block b."""
    row, number = find(table, tensors)
    begin, _, count = tiles(row, number)
    left = tl.load(quotas + column(row, IN_SUMS) + number).to(tl.int32)
    for t in range(0, count):
        at = begin + t * TILE
        live = alive(row, at)
        key, free = candidates(row, at, live, DTYPE)
        equal = (free & (key == kth)).to(tl.int32)
        first = (equal != 0) & (tl.cumsum(equal) <= left)
        left -= tl.sum(equal)
        prune_tile(row, at, live, free & (key < kth) | first, SLOTS, AVERAGES, NARROW, DTYPE)


# ---- n of every m ------------------------------------------------------------------------------------


@triton.jit
def order_in_group(row, i, there, DTYPE: tl.constexpr):
    """Keys that say who stays, of elements i: by magnitude, below all what is pruned and above all what is frozen."""
    key = magnitude(tl.load(stream(row, P, DTYPE) + i, mask=there, other=0)).to(tl.int64)
    bit = i // column(row, INNER) % column(row, PERIOD)
    words, masked = stream(row, KEEP, tl.int32), column(row, KEEP) != 0
    held = tl.load(words + (bit >> 5), mask=there & masked, other=-1) >> (bit & 31).to(tl.int32) & 1 == 0
    key = tl.where(held & (column(row, FREEZE) != 0), 1 << 32, key)
    gone = tl.load(stream(row, PRUNED, tl.int32) + (i >> 5), mask=there, other=0)
    return tl.where(gone >> (i & 31).to(tl.int32) & 1 != 0, -1, key)


@triton.jit(do_not_specialize=["table", "marks", "n", "m", "channels", "stride"])
def mark_n_m(table, marks, n, m, channels, stride, DTYPE: tl.constexpr):
    """Sets a bit of `marks` where n entries of an entry's group of m along a dimension come before it: larger ones,
    and equal ones of lower index. The tensor is the only one of the table."""
    row = (table, 1, 0)
    begin, _, count = tiles(row, tl.program_id(0).to(tl.int64))
    for t in range(0, count):
        at = begin + t * TILE
        live = alive(row, at)
        i = at + tl.arange(0, TILE)
        c = i // stride % channels
        own, before = order_in_group(row, i, live, DTYPE), tl.zeros([TILE], tl.int32)
        for q in range(0, m):
            other = c - c % m + q
            there = live & (other < channels)
            key = order_in_group(row, i + (other - c) * stride, there, DTYPE)
            ahead = (key > own) | (key == own) & (other < c)
            before += (there & ahead).to(tl.int32)
        set_bits(marks, at, live, (before >= n) & (own >= 0))


@triton.jit(do_not_specialize=["table", "marks"])
def prune_marked(
    table, marks,
    SLOTS: tl.constexpr, AVERAGES: tl.constexpr, NARROW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Prunes what `mark_n_m` marked, once all is marked: who is pruned may not change the order of others."""
    row = (table, 1, 0)
    begin, _, count = tiles(row, tl.program_id(0).to(tl.int64))
    for t in range(0, count):
        at = begin + t * TILE
        live = alive(row, at)
        prune_tile(row, at, live, bits(marks, at, live), SLOTS, AVERAGES, NARROW, DTYPE)
