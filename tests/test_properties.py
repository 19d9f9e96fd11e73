"""A sweep over rule x decay x mask x prune x averages x clip x dtype x shapes x steps, drawn by hypothesis, the same
at every run: each step against the float64 oracle, SPEC's promises bit for bit, saved and loaded on the way."""

import io
import math

import torch
from cases import (
    BACKENDS,
    BF16,
    COUNTERS,
    F16,
    F32,
    F64,
    ONE_STEP,
    RULES,
    THRESHOLD,
    Snapshot,
    assert_close,
    assert_same_bits,
    assert_same_state,
    bits,
    gradient,
    like,
    parameters,
    synchronise,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuseopt import EMA, Prune, cuda_memory, masks
from fuseopt.plan import is_placeholder
from fuseopt.stages import mask as stored

STEPS = 5
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
dimensions = st.integers(0, 40)
shapes = st.one_of(
    st.tuples(),
    st.tuples(st.integers(0, 3000)),
    st.tuples(dimensions, dimensions),
    st.tuples(dimensions, st.integers(1, 3), dimensions),
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
)
averages = st.one_of(
    st.builds(
        EMA,
        st.sampled_from((0.5, 0.999)),
        warmup=st.sampled_from((None, "timm", "diffusers")),
        start=st.integers(0, 3),
        every=st.integers(1, 3),
        dtype=st.sampled_from(("float32", "parameter")),
    ),
    st.builds(EMA, warmup=st.just("swa"), start=st.integers(0, 2), every=st.integers(1, 2)),
    st.builds(EMA, warmup=st.just("edm2"), sigma_rel=st.sampled_from((0.05, 0.2)), every=st.integers(1, 2)),
)


def strong(g: torch.Tensor) -> torch.Tensor:
    """A gradient between 2 and 4: even clipped and unscaled it is above 0.75, and no decay can cancel it.

    Where one nearly does, Adam divides a rounding error by eps, and no tolerance is right.
    """
    return g / 2 + 2 * torch.sign(g)


@st.composite
def prunes(draw, dtype):
    """Prune options, or None. What ranks 16-bit weights is left out: ties abound, and the oracle has none."""
    moments = draw(st.sampled_from(("zero", "keep")))
    begin = draw(st.integers(1, 3))
    kinds = ("none", "threshold") if dtype in (BF16, F16) else ("none", "threshold", "unstructured", "rows", "n:m")
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return None
    if kind == "threshold":
        return Prune(threshold=THRESHOLD[dtype], begin=begin, moments=moments)
    every = draw(st.integers(1, 2))
    when = {"begin": begin, "end": begin + every * draw(st.integers(0, 2)), "every": every}
    common = {**when, "moments": moments, "regrow": draw(st.booleans())}
    if kind == "n:m":
        return Prune(pattern=draw(st.sampled_from(("2:4", "1:2", "3:5"))), **common)
    return Prune(
        draw(st.floats(0, 0.6)),
        pattern=kind,
        schedule=draw(st.sampled_from(("linear", "cubic"))),
        scope=draw(st.sampled_from(("global", "tensor"))),
        **common,
    )


@st.composite
def cases(draw):
    """A rule, a dtype, shapes, options, masks, and what happens at which step."""
    dtype = draw(st.sampled_from((F32, F32, F64, BF16, F16)))
    some = draw(st.lists(shapes, min_size=1, max_size=5))
    clips = math.sqrt(max(1, sum(math.prod(shape) for shape in some)))  # scales by 0.4 or more; see strong()
    prune = draw(prunes(dtype))
    modes = ("freeze", "grad")
    return {
        "rule": draw(st.sampled_from(RULES)),
        "dtype": dtype,
        "shapes": some,
        "decay": draw(st.sampled_from((0.0, 0.1))),
        "options": {
            "max_grad_norm": draw(st.sampled_from((None, clips, 1e6))),
            "l1": draw(st.sampled_from((0.0, 0.25))),
            "ema": draw(st.lists(averages, max_size=3)),
            "prune": prune,
            "statistics": draw(st.booleans()),
        },
        "masks": [draw(st.sampled_from((None, *modes))) for _ in some],
        "mask_dims": [draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))) for s in some],
        "dynamic": draw(st.sampled_from((None, None, *modes))),  # of all that have no static mask
        "every": draw(st.sampled_from((None, 1, 2))),
        "chooser": draw(st.sampled_from(("gradient", "global", "random", "own"))),
        "scale": draw(st.sampled_from((None, 2.0, 1.5))),
        "missing": draw(st.sets(st.tuples(st.integers(1, STEPS), st.integers(0, 4)), max_size=4)),
        "skip": draw(st.sampled_from((None, 1, 2, 3))),
        "resume": draw(st.integers(0, STEPS)),  # after this step
        "backend": draw(st.sampled_from(BACKENDS)),
        "moves": draw(st.booleans()),
    }


def chooser(name: str):
    """A dynamic mask that is the same in any precision, as long as the gradients are."""
    return {
        "gradient": lambda: masks.TopGradient(0.4),
        "global": lambda: masks.TopGradient(0.4, scope="global"),
        "random": lambda: masks.Random(0.5, seed=3),
        "own": lambda: lambda p, g, state: g > 0,
    }[name]()


def build(case, params, **more):
    """The optimizer of a case on these parameters."""
    opt = case["rule"].ours(params, **case["options"], **more)
    for group in opt.param_groups:
        group["weight_decay"] = case["decay"]
    generator, open_ones = torch.Generator().manual_seed(5), []
    for p, mode, dims in zip(params, case["masks"], case["mask_dims"], strict=True):
        keep = torch.rand([n if full else 1 for n, full in zip(p.shape, dims, strict=True)], generator=generator) > 0.3
        if mode:
            opt.mask(p, keep, mode)
        else:
            open_ones.append(p)
    if case["dynamic"]:
        fn = chooser(case["chooser"])
        for p in open_ones:
            opt.mask(p, fn=fn, every=case["every"], mode=case["dynamic"])
    if case["scale"]:
        opt.grad_scale = torch.tensor(case["scale"])
    return opt


def set_gradients(case, params, t: int) -> None:
    for k, p in enumerate(params):
        p.grad = None if (t, k) in case["missing"] else strong(gradient(p, k, t))
        if case["moves"]:
            p.data = p.data.clone()


def refused(opt) -> bool:
    """Steps; whether that was refused, with nothing changed: masks may freeze more than pruning can spare."""
    before = Snapshot(opt)
    try:
        opt.step()
    except ValueError as error:
        assert "freeze" in str(error)
        before.assert_unchanged()
        return True
    before.assert_gradients_unchanged()
    return False


def skip(case, opt, t: int) -> None:
    """A step that found infinities, where the case has one: it changes nothing."""
    if case["skip"] != t:
        return
    before = Snapshot(opt)
    opt.found_inf = torch.tensor(2.0)
    opt.step()
    del opt.found_inf
    before.assert_values_unchanged() if case["backend"] == "cuda" else before.assert_unchanged()


def reloaded(case, opt, params, **more):
    """A new optimizer on the same parameters, from what the old one saved."""
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    new = build(case, params, **more)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


@settings(max_examples=400, **SETTINGS)
@given(cases())
def test_any_combination_agrees_with_the_oracle_and_keeps_the_promises(case):
    params = parameters(case["shapes"], case["dtype"])
    copies = like(params, F64)
    opt, oracle = build(case, params, backend=case["backend"]), build(case, copies, backend="torch")
    for t in range(1, STEPS + 1):
        synchronise(oracle, opt)
        set_gradients(case, params, t)
        for p, q in zip(params, copies, strict=True):
            q.grad = None if p.grad is None else p.grad.double()
        skip(case, opt, t)
        values = {p: live(opt, p) for p in params}
        if refused(opt):
            assert refused(oracle)
            return
        oracle.step()
        agree(opt, oracle, params, copies, case["dtype"])
        for p in params:
            keeps_promises(case, opt, p, values[p], t)
        if t == case["resume"]:
            opt = reloaded(case, opt, params, backend=case["backend"])
            oracle = reloaded(case, oracle, copies, backend="torch")


def empty_entries(opt, p) -> set[str]:
    """What the state of p holds that was made but has had no value yet."""
    cuda_memory.settle(opt)
    return {key for key in opt.state.get(p, {}) if is_placeholder(opt, p, key)}


def live(opt, p) -> dict:
    """Copies of p and of what the state holds of its values."""
    state, empty = opt.state.get(p, {}), empty_entries(opt, p)
    values = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == p.shape}
    values = {k: v for k, v in values.items() if v.is_floating_point() and k not in (*empty, *COUNTERS, "mask_score")}
    return {**values, "p": p.detach().clone(), "pruned": opt.prune_mask(p)}


def keeps_promises(case, opt, p, before: dict, t: int) -> None:
    """What holds after step t, to the bit."""
    prune, state, now = case["options"]["prune"], opt.state.get(p, {}), live(opt, p)
    frozen = torch.zeros(p.shape, dtype=torch.bool)
    if state.get("mask_freeze"):
        frozen = ~stored.unfold(state, p)
    for key in before.keys() - {"pruned"}:
        assert_same_bits(now[key][frozen], before[key][frozen], f"frozen {key}")
    if p.grad is None and before["pruned"] is None and now["pruned"] is None:
        assert_same_bits(p.detach(), before["p"], "without a gradient")
    pruned = now["pruned"]
    if pruned is None:
        return
    kept_moments = prune.moments == "keep"
    for key, value in now.items():
        if key == "p" or key.startswith("ema_") or (key != "pruned" and not kept_moments):
            assert not bits(value)[pruned & ~frozen].any(), f"pruned {key}"
    if before["pruned"] is not None and not prune.regrow:
        assert not (before["pruned"] & ~pruned).any(), "a mask shrank"
    if prune.pattern == "rows" and pruned.numel():
        rows = pruned.reshape(len(pruned), -1)
        assert torch.equal(rows.all(1), rows.any(1)), "a part of a row"
    if ":" in prune.pattern and t >= prune.begin and p.dim() >= 2 and p.numel():
        n, m = map(int, prune.pattern.split(":"))
        kept = torch.nn.functional.pad((~pruned).movedim(1, -1), (0, -p.shape[1] % m)).unflatten(-1, (-1, m)).sum(-1)
        whole = torch.nn.functional.pad(torch.ones(p.shape[1], dtype=torch.bool), (0, -p.shape[1] % m)).reshape(-1, m)
        assert torch.equal(kept, whole.sum(-1).clamp(max=n).expand(kept.shape)), "not n of m"


def agree(opt, oracle, params, copies, dtype) -> None:
    rtol, atol = ONE_STEP[dtype]
    for p, q in zip(params, copies, strict=True):
        assert_close(p, q, (rtol, atol), f"{tuple(p.shape)}")
        mine, other = opt.state.get(p, {}), oracle.state.get(q, {})
        assert mine.keys() == other.keys()
        if p.numel():  # where a GPU decides, nobody can tell of nothing whether it has a value
            assert empty_entries(opt, p) == empty_entries(oracle, q)
        for key, value in mine.items():
            if not isinstance(value, torch.Tensor):
                assert value == other[key]
            elif not value.is_floating_point():
                assert torch.equal(value, other[key]), key
            elif key not in empty_entries(opt, p):
                loose = 4 * rtol if key.startswith("ema_") else atol  # it follows the stored parameter
                assert_close(value, other[key], (rtol, max(atol, loose)), key)


@settings(max_examples=300, **SETTINGS)
@given(cases(), st.sampled_from((1, 2)))
def test_resuming_anywhere_with_any_number_of_threads_changes_no_bit(case, threads):
    case["every"] = case["every"] or 1  # a mask that is computed once is not set again after loading
    params = parameters(case["shapes"], case["dtype"])
    again = like(params)
    straight, resumed = (build(case, x, backend=case["backend"]) for x in (params, again))
    for group in (*straight.param_groups, *resumed.param_groups):
        if "dampening" in group:  # README, Limits: a buffer made before its first gradient is saved as one of zeros
            group["dampening"] = 0.0
    usual = torch.get_num_threads()
    try:
        for t in range(1, STEPS + 1):
            if t == case["resume"] + 1:
                resumed = reloaded(case, resumed, again, backend=case["backend"])
                torch.set_num_threads(threads)
            for opt, own in ((straight, params), (resumed, again)):
                set_gradients(case, own, t)
                skip(case, opt, t)
            if refused(straight):
                assert refused(resumed)
                return
            resumed.step()
        assert_same_state(straight, resumed)
        dynamic = any("mask_t" in state for state in straight.state.values())
        if case["options"]["ema"] or case["options"]["prune"] or dynamic:  # else no schedule reads it
            assert [g["steps"] for g in straight.param_groups] == [g["steps"] for g in resumed.param_groups]
    finally:
        torch.set_num_threads(usual)
