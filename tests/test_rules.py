"""Each rule alone: against torch, against the float64 oracle, and its state against torch's."""

import copy
import inspect
import math

import pytest
import torch
from cases import (
    BF16,
    BLOCK_SIZES,
    BY_NAME,
    COUNTERS,
    DTYPES,
    F16,
    F32,
    F64,
    FUSED_RULES,
    ONE_STEP,
    RULES,
    SIZES,
    STEPS,
    TAIL_SIZES,
    TRAJECTORY,
    VECTOR_SIZES,
    Rule,
    assert_close,
    assert_same_bits,
    assert_same_state,
    gradient,
    ident,
    like,
    parameters,
    run,
    set_gradients,
    synchronise,
)

# torch's fused SGD stores nothing in 16 bits, so only Adam is compared there.
BIT_FOR_BIT = [(rule, dtype) for rule in FUSED_RULES for dtype in (F32, F64)] + [
    (rule, dtype) for rule in FUSED_RULES if "adam" in rule.name for dtype in (BF16, F16)
]


@pytest.mark.parametrize(("rule", "dtype"), BIT_FOR_BIT, ids=ident)
def test_equals_torch_fused_bit_for_bit(rule: Rule, dtype):
    params = parameters(VECTOR_SIZES, dtype)
    ours, torchs = rule.ours(params, backend="cpu"), rule.torchs(like(params))
    for t in range(1, STEPS + 1):
        run(ours, params, 1, t)
        run(torchs, torchs.param_groups[0]["params"], 1, t)
        assert_same_state(ours, torchs)


@pytest.mark.parametrize("rule", FUSED_RULES, ids=ident)
def test_negative_zeros_are_torchs(rule):
    """The sign of zero counts: a neutral stage must not turn -0.0 into +0.0."""
    params = parameters([(64,), (128,)])
    ours = rule.ours(params, weight_decay=0.0, backend="cpu")
    torchs = rule.torchs(like(params), weight_decay=0.0)
    for _ in range(STEPS):
        for opt in (ours, torchs):
            for k, p in enumerate(opt.param_groups[0]["params"]):
                p.grad = torch.tensor([-0.0, 0.0]).repeat(p.numel() // 2)
        ours.step(), torchs.step()
        assert_same_state(ours, torchs)


@pytest.mark.parametrize("dtype", (F32, F64), ids=ident)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.torch_has], ids=ident)
def test_agrees_with_torch_at_ragged_sizes(rule, dtype, backend):
    """torch's scalar tails, its loops and NAdam round differently: by tolerance."""
    params = parameters(TAIL_SIZES + BLOCK_SIZES, dtype)
    ours, torchs = rule.ours(params, backend=backend), rule.torchs(like(params))
    run(ours, params), run(torchs, torchs.param_groups[0]["params"])
    for p, q in zip(params, torchs.param_groups[0]["params"], strict=True):
        assert_close(p, q, TRAJECTORY[dtype], f"{tuple(p.shape)}")
        for key in torchs.state[q]:
            assert_close(ours.state[p][key], torchs.state[q][key], TRAJECTORY[dtype], key)


@pytest.mark.parametrize(("backend", "sizes"), [("cpu", "tails"), ("cpu", "blocks"), ("torch", "tails")], indirect=["backend"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_agrees_with_the_oracle(rule, dtype, sizes, backend):
    """Every step, from equal state, against the reference in float64; every element has moved."""
    params = parameters(SIZES[sizes], dtype)
    opt = rule.ours(params, backend=backend)
    copies = like(params, F64)
    oracle = rule.ours(copies, backend="torch")
    for t in range(1, STEPS + 1):
        before = [p.detach().clone() for p in params]
        synchronise(oracle, opt)
        run(opt, params, 1, t)
        set_gradients(params, t)
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.double()
        oracle.step()
        for p, q, old in zip(params, copies, before, strict=True):
            assert_close(p, q, ONE_STEP[dtype], f"step {t} {tuple(p.shape)}")
            for key, value in opt.state[p].items():
                assert_close(value, oracle.state[q][key], ONE_STEP[dtype], f"step {t} {key}")
            if dtype in (F32, F64):  # in fp32, decay and update may cancel to the same bits
                assert (p == old).sum() <= p.numel() // 10_000, f"elements of {tuple(p.shape)} did not move"
            elif p.numel() > 1000:  # small updates of large weights are rounded away
                assert (p != old).float().mean() > 0.5, "most elements did not move"


@pytest.mark.parametrize("dtype", (BF16, F16), ids=ident)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.torch_has], ids=ident)
def test_low_precision_agrees_with_torchs_loop(rule, dtype):
    """One step from new state; torch's loop rounds after each operation, so within a few units."""
    params = parameters(TAIL_SIZES + ((1000,),), dtype)
    ours = rule.ours(params)
    torchs = rule.torchs(like(params), foreach=False, **({"fused": False} if rule.fused else {}))
    for opt in (ours, torchs):
        for k, p in enumerate(opt.param_groups[0]["params"]):
            g = gradient(p, k, 1)
            p.grad = g + torch.copysign(torch.full_like(g, 0.25), g)  # squares of less underflow in torch's loop
        opt.step()
    unit = {BF16: 2**-8, F16: 2**-11}[dtype]
    for p, q in zip(params, torchs.param_groups[0]["params"], strict=True):
        assert_close(p, q, (3 * unit, 3 * unit), f"{tuple(p.shape)}")


def plain_lion(p, g, m, lr, betas, weight_decay):
    """Chen et al. 2023, algorithm 2, in plain torch."""
    c = betas[0] * m + (1 - betas[0]) * g
    p = p - lr * (torch.sign(c) + weight_decay * p)
    return p, betas[1] * m + (1 - betas[1]) * g


@pytest.mark.parametrize("rule", [BY_NAME["lion"], BY_NAME["lion-maximize"]], ids=ident)
def test_lion_is_the_papers(rule, backend):
    params = parameters(TAIL_SIZES + ((1000,),), F64)
    opt = rule.ours(params, backend=backend)
    plain = [(p.detach().clone(), torch.zeros_like(p)) for p in params]
    o = rule.options
    for t in range(1, STEPS + 1):
        run(opt, params, 1, t)
        set_gradients(params, t, -1.0 if o.get("maximize") else 1.0)
        plain = [
            plain_lion(q, p.grad, m, o["lr"], o["betas"], o["weight_decay"])
            for p, (q, m) in zip(params, plain, strict=True)
        ]
    for p, (q, m) in zip(params, plain, strict=True):
        assert_close(p, q, TRAJECTORY[F64])
        assert_close(opt.state[p]["exp_avg"], m, TRAJECTORY[F64])


def test_lion_leaves_entries_without_gradient_alone(backend):
    """sign(0) = 0: taken as -1 or +1, weights without gradient drift."""
    p = parameters([(40,)])[0]
    before = p.detach().clone()
    opt = BY_NAME["lion"].ours([p], weight_decay=0.0, backend=backend)
    for _ in range(3):
        p.grad = torch.where(torch.arange(40) % 2 == 0, 0.0, 1.0)
        opt.step()
    assert_same_bits(p[::2], before[::2])
    assert (p[1::2] != before[1::2]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.torch_has], ids=ident)
def test_state_is_torchs(rule, dtype, backend):
    """Keys, their order, dtypes, shapes; counters 0-dim on the CPU; every parameter its own."""
    params = parameters([(), (5, 7)], dtype)
    ours, torchs = rule.ours(params, backend=backend), rule.torchs(like(params))
    assert [list(s) for s in ours.state.values()] == [list(s) for s in torchs.state.values()]  # Adagrad's sum
    run(ours, params, 2), run(torchs, torchs.param_groups[0]["params"], 2)
    for p, q in zip(params, torchs.param_groups[0]["params"], strict=True):
        assert list(ours.state[p]) == list(torchs.state[q])
        for key, value in torchs.state[q].items():
            mine = ours.state[p][key]
            assert (mine.shape, mine.dtype, mine.device) == (value.shape, value.dtype, value.device), key
            if key in COUNTERS:
                assert_same_bits(mine, value, key)
                assert mine.item() != 0
    counters = [s[key].data_ptr() for s in ours.state.values() for key in COUNTERS if key in s]
    assert len(set(counters)) == len(counters)


def test_lion_keeps_one_moment(backend):
    p = parameters([(3, 4)], BF16)[0]
    opt = run(BY_NAME["lion"].ours([p], backend=backend), [p], 1)
    assert list(opt.state[p]) == ["exp_avg"] and opt.state[p]["exp_avg"].dtype == BF16


def test_sgd_without_momentum_has_no_state(backend):
    p = parameters([(9,)])[0]
    opt = run(BY_NAME["sgd"].ours([p], backend=backend), [p], 2)
    assert not opt.state.get(p)


def test_counters_follow_the_default_type(backend):
    """torch makes `step` fp64 where fp64 is the default type."""
    torch.set_default_dtype(F64)
    try:
        p = torch.nn.Parameter(torch.ones(3))
        q = torch.nn.Parameter(torch.ones(3))
        ours, torchs = run(BY_NAME["nadam"].ours([p], backend=backend), [p]), run(BY_NAME["nadam"].torchs([q]), [q])
        assert p.dtype == F64
        for key in COUNTERS:
            assert ours.state[p][key].dtype == torchs.state[q][key].dtype
            assert_same_bits(ours.state[p][key], torchs.state[q][key], key)
        assert_close(p, q, (1e-15, 0))
    finally:
        torch.set_default_dtype(F32)


@pytest.mark.parametrize("lr", (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=F64)), ids=str)
def test_a_tensor_learning_rate_stays_the_same_object(lr, backend):
    p, q = parameters([(20,)])[0], parameters([(20,)])[0]
    rule, lr = BY_NAME["sgd"], copy.deepcopy(lr)
    opt, plain = rule.ours([p], lr=lr, backend=backend), rule.ours([q], lr=0.5, backend=backend)
    run(opt, [p], 1), run(plain, [q], 1)
    assert opt.param_groups[0]["lr"] is lr
    if isinstance(lr, torch.Tensor):
        lr.fill_(0.25)
    else:
        opt.param_groups[0]["lr"] = 0.25
    plain.param_groups[0]["lr"] = 0.25
    run(opt, [p], 1, 2), run(plain, [q], 1, 2)
    assert_same_bits(p, q)


def test_tensor_betas(backend):
    p, q = parameters([(20,)])[0], parameters([(20,)])[0]
    betas = (torch.tensor(0.5), torch.tensor(0.75))
    run(BY_NAME["adam"].ours([p], lr=torch.tensor(0.25), betas=betas, backend=backend), [p])
    run(BY_NAME["adam"].ours([q], lr=0.25, betas=(0.5, 0.75), backend=backend), [q])
    assert_same_bits(p, q)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.torch_has and "decoupled" not in rule.name], ids=ident)
def test_defaults_are_torchs(rule):
    """Replacing the import is enough: parameters, names, order and defaults."""
    torchs = inspect.signature(getattr(torch.optim, rule.cls.__name__)).parameters
    ours = inspect.signature(rule.cls).parameters
    assert list(ours)[: len([k for k in torchs if torchs[k].kind is not inspect.Parameter.KEYWORD_ONLY])] == [
        k for k in torchs if torchs[k].kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    for name, parameter in torchs.items():
        assert ours[name].default == parameter.default and ours[name].kind == parameter.kind, name
    p = parameters([(2,)])
    mine, other = rule.cls(p), getattr(torch.optim, rule.cls.__name__)(like(p))
    for key, value in other.param_groups[0].items():
        if key != "params":
            assert mine.param_groups[0][key] == value, key
    assert "initial_lr" not in mine.param_groups[0]


@pytest.mark.parametrize("storage", (BF16, F16), ids=ident)
def test_every_16_bit_pattern_is_read_and_rounded_as_torch_does(storage, native):
    """p - lr*g over all 65,536 patterns of p: what is read is exact, what is stored is nearest, ties even."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(storage)
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(patterns.shape, generator=generator) * 2.0 ** torch.randint(
        -24, 16, patterns.shape, generator=generator
    )
    for lr in (0.0, 2.0**-9, 1 / 3):
        g = factors.to(storage)
        g[g.isinf()] = 1
        p = torch.nn.Parameter(patterns.clone())
        p.grad = g
        before = p.detach().clone()
        BY_NAME["sgd"].ours([p], lr=lr, weight_decay=0.0, backend="cpu").step()
        rounded_lr = torch.tensor(lr).double()
        expected = (before.double() - rounded_lr * g.double()).float().to(storage)
        finite = expected.isfinite() | expected.isinf()
        assert_same_bits(p.detach()[finite], expected[finite], f"lr {lr}")
        assert (p.isnan() == expected.isnan()).all()


def test_nan_enters_the_greatest_second_moment(backend):
    """As in torch, whose maximum of NaN is NaN."""
    p = parameters([(40,)])[0]
    opt = BY_NAME["adamw-amsgrad-maximize"].ours([p], backend=backend)
    run(opt, [p], 1)
    p.grad[[3, 39]] = float("nan")
    opt.step()
    assert opt.state[p]["max_exp_avg_sq"].isnan().nonzero().flatten().tolist() == [3, 39]


@pytest.mark.parametrize("steps", (1, 1000, 2**24))
def test_bias_corrections_are_formed_in_double(steps, backend):
    """Formed in float they are off by 1.3e-5."""
    p = parameters([(64,)], F32)[0]
    opt = BY_NAME["adam"].ours([p], weight_decay=0.0, betas=(0.9, 0.9999), backend=backend)
    run(opt, [p], 1)
    opt.state[p]["step"].fill_(steps - 1)
    before, (m, v) = p.detach().double(), [opt.state[p][k].double() for k in ("exp_avg", "exp_avg_sq")]
    run(opt, [p], 1, 2)
    g = p.grad.double()
    m, v = 0.9 * m + (1 - 0.9) * g, 0.9999 * v + (1 - 0.9999) * g * g
    step_size, root = 0.01 / (1 - 0.9**steps), math.sqrt(1 - 0.9999**steps)
    assert_close(p, before - step_size * m / (v.sqrt() / root + 1e-6), ONE_STEP[F32])


@pytest.mark.parametrize("kept", (F32, F64), ids=ident)
def test_a_counter_is_multiplied_in_its_own_type(kept, native):
    """NAdam's mu_product, whatever the default type is: checkpoints bring either."""
    params = parameters([(5,), (6,), (7,)], F64)  # neighbours share scalars
    torchs = run(BY_NAME["nadam"].torchs(like(params)), [], 0)
    ours = BY_NAME["nadam"].ours(params, backend="cpu")
    run(ours, params, 1), run(torchs, torchs.param_groups[0]["params"], 1)
    for opt in (ours, torchs):
        for k, s in enumerate(opt.state.values()):
            s["mu_product"] = s["mu_product"].to(kept if k else F32)
    run(ours, params, STEPS, 2), run(torchs, torchs.param_groups[0]["params"], STEPS, 2)
    for p, q in zip(params, torchs.param_groups[0]["params"], strict=True):
        assert_same_bits(ours.state[p]["mu_product"], torchs.state[q]["mu_product"])
        assert_close(p, q, (1e-14, 1e-15))
