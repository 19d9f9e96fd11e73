"""A sweep over rule x dtype x options x shapes x steps, drawn by hypothesis, the same at every run."""

import math

import torch
from cases import (
    BACKENDS,
    BF16,
    F16,
    F32,
    F64,
    ONE_STEP,
    RULES,
    THRESHOLD,
    Snapshot,
    all_params,
    assert_close,
    assert_same_bits,
    bits,
    gradient,
    like,
    parameters,
    synchronise,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuseopt import EMA, Prune

dimensions = st.integers(0, 40)
shapes = st.one_of(
    st.tuples(), st.tuples(st.integers(0, 3000)), st.tuples(dimensions, dimensions), st.tuples(dimensions, st.integers(1, 3), dimensions)
)


def strong(g: torch.Tensor) -> torch.Tensor:
    """A gradient between 2 and 4: even clipped and unscaled it is above 0.75, and no decay can cancel it.

    Where one nearly does, Adam divides a rounding error by eps, and no tolerance is right.
    """
    return g / 2 + 2 * torch.sign(g)


LATE = [EMA(0.5, start=1, dtype="parameter"), EMA(warmup="swa", every=2)]


@st.composite
def cases(draw):
    """A rule, a dtype, shapes, options, masks, and which gradients are missing at which step."""
    dtype = draw(st.sampled_from((F32, F32, F64, BF16, F16)))
    prunes = [None, Prune(threshold=THRESHOLD[dtype], begin=draw(st.integers(1, 3)), moments=draw(st.sampled_from(("zero", "keep"))))]
    if dtype in (F32, F64):
        prunes.append(Prune(draw(st.floats(0, 0.6)), begin=draw(st.integers(1, 2)), end=3, schedule=draw(st.sampled_from(("linear", "cubic"))),
                            scope=draw(st.sampled_from(("global", "tensor")))))
    some = draw(st.lists(shapes, min_size=1, max_size=5))
    clips = math.sqrt(max(1, sum(math.prod(shape) for shape in some)))  # scales by 0.4 or more; see strong()
    options = {
        "max_grad_norm": draw(st.sampled_from((None, clips, 1e6))),
        "l1": draw(st.sampled_from((0.0, 0.25))),
        "ema": draw(st.sampled_from((None, EMA(0.75), [EMA(0.5), EMA(0.999, warmup="timm")], LATE))),
        "prune": draw(st.sampled_from(prunes)),
        "statistics": draw(st.booleans()),
    }
    return {
        "rule": draw(st.sampled_from(RULES)),
        "dtype": dtype,
        "shapes": some,
        "options": options,
        "masks": [draw(st.sampled_from((None, None, "freeze", "grad"))) for _ in some],
        "mask_dims": [draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in some],
        "scale": draw(st.sampled_from((None, 2.0, 1.5))),
        "missing": draw(st.sets(st.tuples(st.integers(1, 3), st.integers(0, 4)), max_size=4)),
        "skip": draw(st.sampled_from((None, 1, 2, 3))),
        "backend": draw(st.sampled_from(BACKENDS)),
        "moves": draw(st.booleans()),
    }


def masks_of(case):
    generator = torch.Generator().manual_seed(5)
    for shape, mode, dims in zip(case["shapes"], case["masks"], case["mask_dims"], strict=True):
        keep = torch.rand([n if full else 1 for n, full in zip(shape, dims, strict=True)], generator=generator) > 0.3
        yield (mode, keep) if mode and not (mode == "freeze" and case["options"]["prune"] and not keep.any()) else (None, keep)


def build(case, params, **more):
    opt = case["rule"].ours(params, **case["options"], **more)
    for p, (mode, keep) in zip(params, masks_of(case), strict=True):
        if mode:
            opt.mask(p, keep, mode)
    if case["scale"]:
        opt.grad_scale = torch.tensor(case["scale"])
    return opt


def too_few(case, params) -> bool:
    """Whether freezing may leave too few entries for the sparsity."""
    prune = case["options"]["prune"]
    return prune is not None and prune.sparsity is not None and any(
        mode == "freeze" for mode, _ in masks_of(case)
    )


@settings(max_examples=600, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(cases())
def test_any_combination_agrees_with_the_oracle_and_keeps_the_promises(case):
    dtype = case["dtype"]
    params = parameters(case["shapes"], dtype)
    copies = like(params, F64)
    if too_few(case, params):
        case["masks"] = ["grad" if m == "freeze" else m for m in case["masks"]]
    opt, oracle = build(case, params, backend=case["backend"]), build(case, copies, backend="torch")
    start = [p.detach().clone() for p in params]
    modes = list(masks_of(case))
    grown = {}
    for t in (1, 2, 3):
        synchronise(oracle, opt)
        for k, (p, q) in enumerate(zip(params, copies, strict=True)):
            p.grad = None if (t, k) in case["missing"] else strong(gradient(p, k, t))
            q.grad = None if p.grad is None else p.grad.double()
            if case["moves"]:
                p.data = p.data.clone()
        if case["skip"] == t:
            before = Snapshot(opt)
            opt.found_inf = torch.tensor(2.0)
            opt.step()
            del opt.found_inf
            before.assert_unchanged()
        before = Snapshot(opt)
        opt.step(), oracle.step()
        before.assert_gradients_unchanged()
        agree(opt, oracle, dtype)
        for k, p in enumerate(all_params(opt)):
            mode, keep = modes[k]
            pruned = opt.prune_mask(p)
            if mode == "freeze":
                held = ~keep.expand(p.shape)
                assert_same_bits(p.detach()[held], start[k][held])
            if pruned is not None:
                assert not bits(p)[pruned].any()
                assert not (grown.get(k, pruned) & ~pruned).any(), "a mask shrank"
                for key in opt.state[p]:
                    if key.startswith("ema_") and p not in opt._placeholders.get(key, ()):  # it has a value
                        assert not bits(opt.state[p][key])[pruned].any()
                grown[k] = pruned


def agree(opt, oracle, dtype) -> None:
    rtol, atol = ONE_STEP[dtype]
    for p, q in zip(all_params(opt), all_params(oracle), strict=True):
        assert_close(p, q, (rtol, atol), f"{tuple(p.shape)}")
        assert opt.state.get(p, {}).keys() == oracle.state.get(q, {}).keys()
        for key, value in opt.state.get(p, {}).items():
            if not isinstance(value, torch.Tensor) or value.dtype == torch.uint8:
                assert torch.equal(value, oracle.state[q][key]) if isinstance(value, torch.Tensor) else value == oracle.state[q][key]
            else:
                loose = 4 * rtol if key.startswith("ema_") else atol  # it follows the stored parameter
                if p in opt._placeholders.get(key, ()):  # no gradient yet: no value
                    assert q in oracle._placeholders[key]
                    continue
                assert_close(value, oracle.state[q][key], (rtol, max(atol, loose)), key)
