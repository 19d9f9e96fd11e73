"""The order of the stages: csrc/pipeline.h in Triton, on tiles in place of elements.

`s` holds the scalars of the stages in the order of StageScalars. Where a tile has no masks, keep, frozen and pruned
are None and their selects are not compiled.
"""

import triton
import triton.language as tl

INV_GRAD_SCALE, DIRECTION, CLIP, L2, L1, DECAY, SOFT_THRESHOLD, PRUNE_BELOW, KEEP_MOMENTS = map(tl.constexpr, range(9))


@triton.jit
def copysign(x, y):
    if y.dtype == tl.float64:
        magnitude = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        return (magnitude | (y.to(tl.int64, bitcast=True) & -0x8000000000000000)).to(tl.float64, bitcast=True)
    else:
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return (magnitude | (y.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def effective_grad(g, keep, s):
    """Stages 1 to 4: the gradient that the rule and the sums see. Selected, never multiplied: 0 * inf is NaN."""
    g = g * (s[INV_GRAD_SCALE] * s[DIRECTION])
    if keep is not None:
        g = tl.where(keep, g, 0.0)
    return g * s[CLIP]


@triton.jit
def update_element(update, p, g, slot, s, r):
    """Stages 5 to 8."""
    g = tl.where(s[L2] != 0, tl.fma(s[L2], p, g), g)  # 0 * inf would be NaN
    g = tl.where((p == 0) | (s[L1] == 0), g, g + copysign(s[L1], p))  # -0 + 0 would be +0
    p = p * s[DECAY]
    p, slot = update(p, g, slot, r)
    magnitude = tl.abs(p) - s[SOFT_THRESHOLD]
    return copysign(tl.where(magnitude < 0, 0.0, magnitude), p), slot


@triton.jit
def step_element(update, p, g, slot, keep, frozen, pruned, s, r):
    """Stages 1 to 10: (p, slot, what is pruned). p, g and slot are as they lie in memory; stages 9 (freeze) and 10
    (prune) select among those raw values, so that frozen entries keep their very bits."""
    T = s[CLIP].dtype
    moment = [x.to(T) for x in slot]
    weight, moment = update_element(update, p.to(T), effective_grad(g.to(T), keep, s), moment, s, r)
    stored = weight.to(p.dtype)
    after = [x.to(p.dtype) for x in moment]
    if keep is None:
        return stored, after, None
    else:
        zero = tl.zeros_like(p)
        prune = ~frozen & (pruned | (tl.abs(stored.to(T)) < s[PRUNE_BELOW]))
        clear = prune & (s[KEEP_MOMENTS] == 0)
        stored = tl.where(frozen, p, tl.where(prune, zero, stored))
        # A comprehension walks one list, so over the places in both.
        held = [tl.where(frozen, slot[k], tl.where(clear, zero, after[k])) for k in (0, 1, 2)[: len(slot)]]
        return stored, held, prune | pruned


@triton.jit
def ema_element(ema, p, weight, pruned, frozen):
    """Stage 11: a moving average of the stored parameter p, in the average's dtype; exactly as sparse as the model.

    With weight 0, and where frozen, it keeps its very bits. NaN is no value yet: the first update copies the
    parameter, and nothing else writes there.
    """
    old = ema.to(p.dtype)
    empty, due = old != old, weight != 0
    moved = tl.where(empty, p, tl.fma(weight, p - old, old)).to(ema.dtype)
    if pruned is None:
        return tl.where(due, moved, ema)
    else:
        kept = tl.where(due & (empty | ~frozen), moved, ema)
        return tl.where(pruned & (due | ~empty), tl.zeros_like(ema), kept)
