"""The update of many tensors in one launch: stages 1 to 12 on each block."""

import triton
import triton.language as tl

from .pipeline import PRUNE_BELOW, effective_grad, ema_element, step_element
from .reduce import add_lanes, square
from .table import (
    EMA,
    FREEZE,
    GROUP,
    IN_SUMS,
    PRUNED,
    RULE,
    SCALARS,
    SLOT,
    TILE,
    WEIGHTS,
    WIDTH,
    G,
    P,
    alive,
    bits,
    column,
    find,
    kept,
    load,
    set_bits,
    store,
    stream,
    tiles,
)


@triton.jit
def masks(row, at):
    """(kept, frozen, pruned, words of what is pruned, whether there are any) of a tile."""
    there = column(row, PRUNED) != 0
    words = stream(row, PRUNED, tl.int32)
    keep = kept(row, at)
    frozen = ~keep & (column(row, FREEZE) != 0)
    return keep, frozen, bits(words, at, alive(row, at) & there), words, there


@triton.jit
def gather_statistics(lanes, g, before, after, keep, pruned, live, s):
    """Stage 12: lane sums of squares (gradient, weight, change) and two counts (zeros, not finite)."""
    T = s[0].dtype
    if keep is not None:
        keep = keep & ~pruned
    x = effective_grad(g.to(T), keep, (s[0], s[1], tl.full((), 1.0, T)))  # before clipping
    w, x = after.to(T).to(tl.float64), x.to(tl.float64)
    zero, nonfinite = w == 0, ~(x - x == 0)
    if live is not None:
        zero, nonfinite = zero & live, nonfinite & live
    sums = lanes[0] + square(x), lanes[1] + square(w), lanes[2] + square(w - before.to(T).to(tl.float64))
    counts = lanes[3] + tl.sum(zero.to(tl.int32)), lanes[4] + tl.sum(nonfinite.to(tl.int32))
    return sums[0], sums[1], sums[2], counts[0], counts[1]


@triton.jit
def step_tile(
    lanes, update, row, at, live, s, r, weights,
    SLOTS: tl.constexpr, AVERAGES: tl.constexpr, NARROW: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    T = s[0].dtype
    p = stream(row, P, DTYPE)
    moments = [stream(row, SLOT + c, DTYPE) for c in (0, 1, 2)[:SLOTS]]
    before, g = load(p, at, live), load(stream(row, G, DTYPE), at, live)
    slot = [load(x, at, live) for x in moments]
    keep, frozen, pruned = None, None, None
    if MASKED:
        keep, frozen, pruned, words, there = masks(row, at)
    after, slot, gone = step_element(update, before, g, slot, keep, frozen, pruned, s, r)
    store(p, at, live, after)
    for c in tl.static_range(SLOTS):
        store(moments[c], at, live, slot[c])
    if MASKED:
        if there & (s[PRUNE_BELOW] > 0):  # a threshold marks what it pruned
            set_bits(words, at, alive(row, at), gone)
    for c in tl.static_range(AVERAGES):
        ema = stream(row, EMA + c, DTYPE if NARROW >> c & 1 else T)
        if column(row, EMA + c) != 0:
            store(ema, at, live, ema_element(load(ema, at, live), after.to(T), weights[c], gone, frozen))
    if len(lanes) > 0:
        return gather_statistics(lanes, g, before, after, keep, pruned, live, s)
    else:
        return lanes


@triton.jit(do_not_specialize=["table", "tensors", "scalars", "clip", "sums", "blocks"])
def step(
    table, tensors, scalars, clip, sums, blocks,
    update: tl.constexpr, SLOTS: tl.constexpr, AVERAGES: tl.constexpr, NARROW: tl.constexpr,
    MASKED: tl.constexpr, STATISTICS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Steps the tensors of a table, a block a program.

    table, tensors: see table.py. scalars, clip: rows of scalars and the groups' clip factors, in the type of the
    arithmetic. update: of the rule. SLOTS, AVERAGES: how many the rule and the group have. NARROW: a bit for each
    average that is kept in the parameter's dtype, DTYPE. MASKED: whether some tensor has a mask or pruned entries.
    STATISTICS: whether to write each block's sums to `sums`, five columns of `blocks` doubles.
    """
    row, number = find(table, tensors)
    begin, whole, count = tiles(row, number)
    own = scalars + column(row, SCALARS) * WIDTH
    s = [tl.load(own + c) for c in (0, 1, 2, 3, 4, 5, 6, 7, 8)]
    below = tl.where(column(row, PRUNED) != 0, s[7], 0.0)  # the threshold is for prunable tensors alone
    s = (s[0], s[1], tl.load(clip + column(row, GROUP)), s[3], s[4], s[5], s[6], below, s[8])
    r = [tl.load(own + RULE + c) for c in (0, 1, 2, 3, 4, 5, 6, 7)]
    weights = [tl.load(own + WEIGHTS + c) for c in (0, 1, 2, 3, 4, 5, 6, 7)[:AVERAGES]]
    lanes = ()
    if STATISTICS:
        zeros, none = tl.zeros([TILE], tl.float64), tl.zeros([], tl.int32)
        lanes = (zeros, zeros, zeros, none, none)
    for t in range(0, whole):
        at = begin + t * TILE
        lanes = step_tile(lanes, update, row, at, None, s, r, weights, SLOTS, AVERAGES, NARROW, MASKED, DTYPE)
    for t in range(whole, count):
        at = begin + t * TILE
        live = alive(row, at)
        lanes = step_tile(lanes, update, row, at, live, s, r, weights, SLOTS, AVERAGES, NARROW, MASKED, DTYPE)
    if STATISTICS:
        place = sums + column(row, IN_SUMS) + number
        for c in tl.static_range(3):
            tl.store(place + c * blocks, add_lanes(lanes[c]))
        for c in tl.static_range(3, 5):
            tl.store(place + c * blocks, lanes[c].to(tl.float64))
