"""Sums, formed as csrc/sums.h says: in double, over fixed blocks in a fixed order."""

import triton
import triton.language as tl

from .pipeline import effective_grad
from .table import IN_SUMS, PRUNED, SCALARS, TILE, WIDTH, G, alive, bits, column, find, kept, load, stream, tiles


@triton.jit
def add_lanes(lanes):
    """The sum of TILE lanes by halving, two at a time: tl.sum leaves the order of more open."""
    for _ in tl.static_range(10):
        lanes = tl.sum(tl.reshape(lanes, [2, lanes.shape[0] // 2]), axis=0)
    return tl.sum(lanes)


@triton.jit
def square(x):
    x = x.to(tl.float64)
    return x * x


@triton.jit
def squares_of_tile(lanes, row, at, live, s, g, MASKED: tl.constexpr):
    keep = None
    if MASKED:  # what is pruned the step cannot change either
        there = column(row, PRUNED) != 0
        pruned = bits(stream(row, PRUNED, tl.int32), at, alive(row, at) & there)
        keep = kept(row, at) & ~pruned
    return lanes + square(effective_grad(load(g, at, live).to(s[0].dtype), keep, s))


@triton.jit(do_not_specialize=["table", "tensors", "scalars", "sums"])
def grad_norm(table, tensors, scalars, sums, MASKED: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of squares of each block's gradient, as far as the step may change its entries."""
    row, number = find(table, tensors)
    begin, whole, count = tiles(row, number)
    own = scalars + column(row, SCALARS) * WIDTH
    s = (tl.load(own), tl.load(own + 1), tl.load(own + 2))
    g = stream(row, G, DTYPE)
    lanes = tl.zeros([TILE], tl.float64)
    for t in range(0, whole):
        lanes = squares_of_tile(lanes, row, begin + t * TILE, None, s, g, MASKED)
    for t in range(whole, count):
        at = begin + t * TILE
        lanes = squares_of_tile(lanes, row, at, alive(row, at), s, g, MASKED)
    tl.store(sums + column(row, IN_SUMS) + number, add_lanes(lanes))


@triton.jit
def add_blocks(sums, blocks):
    lanes = tl.zeros([TILE], tl.float64)
    for b in tl.range(0, blocks, TILE, loop_unroll_factor=4):
        place = b + tl.arange(0, TILE)
        lanes += tl.load(sums + place, mask=place < blocks, other=0.0)
    return add_lanes(lanes)


@triton.jit(do_not_specialize=["sums", "blocks", "bounds", "groups", "wide", "narrow"])
def clip(sums, blocks, bounds, groups, wide, narrow):
    """Each group's factor min(1, max_grad_norm / (norm + 1e-6)), in fp64 and fp32, from the sums of all blocks.

    bounds: max_grad_norm of each group, 0 where it does not clip. One program.
    """
    norm = tl.sqrt(add_blocks(sums, blocks))
    for group in range(0, groups):
        bound = tl.load(bounds + group)
        factor = bound / (norm + 1e-6)
        factor = tl.where((bound > 0) & ((factor < 1) | (factor != factor)), factor, 1.0)
        tl.store(wide + group, factor)
        tl.store(narrow + group, factor.to(tl.float32))
