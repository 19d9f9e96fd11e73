"""Wrong values: torch's exception type where torch has the value; otherwise one or two sentences that name
the thing, the value and the remedy. Nothing is changed."""

import math

import pytest
import torch
from cases import BY_NAME, F32, ONE_EACH, RULES, Snapshot, Stage, element_mask, ident, parameters, run, set_gradients

import fuseopt
from fuseopt import EMA, Prune, rules

TENSOR2 = torch.ones(2)
CLASSES = tuple(cls for cls in rules.ALL if hasattr(torch.optim, cls.__name__))

# Each is given to every class; where a class has no such option, both raise TypeError.
WRONG = [
    {"lr": -0.1},
    {"lr": math.nan},
    {"lr": TENSOR2},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"lr": torch.tensor(0.1), "foreach": True, "capturable": False},
    {"lr": "fast"},
    {"betas": (-0.1, 0.9)},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9, math.nan)},
    {"betas": (torch.tensor(0.9), 0.9)},
    {"betas": (TENSOR2, TENSOR2)},
    {"eps": -1e-8},
    {"eps": math.nan},
    {"weight_decay": -0.1},
    {"weight_decay": math.nan},
    {"momentum": -0.9},
    {"momentum": 0.9, "dampening": 0.1, "nesterov": True},
    {"nesterov": True},
    {"momentum_decay": -0.1},
    {"lr_decay": -0.1},
    {"initial_accumulator_value": -1.0},
    {"fused": True, "foreach": True},
    {"no_such_option": 1},
    {"lr": -1.0, "weight_decay": -1.0},
]


def outcome(make):
    try:
        make()
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("options", WRONG, ids=str)
def test_wrong_values_raise_what_torch_raises(options, cls):
    torchs = getattr(torch.optim, cls.__name__)
    expected = outcome(lambda: torchs(parameters([(3,)]), **options))
    assert outcome(lambda: cls(parameters([(3,)]), **options)) is expected


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "params",
    [[], [{"params": []}], torch.ones(2), 3, [3], ["w"], [torch.ones(2, requires_grad=True) * 2], [None], [("w",)],
     [{"lr": 0.1}], [{"params": parameters([(2,)]) * 2}], parameters([(2,)]) * 2,
     [("w", torch.nn.Parameter(torch.ones(2))), torch.nn.Parameter(torch.ones(2))], [{"params": {torch.ones(2)}}]],
    ids=lambda x: str(type(x).__name__ + str(x))[:40].replace("\n", ""),
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_parameters_raise_what_torch_raises(params, cls):
    torchs = getattr(torch.optim, cls.__name__)
    again = list(params) if isinstance(params, list) else params
    again = [dict(g) if isinstance(g, dict) else g for g in again] if isinstance(again, list) else again
    assert outcome(lambda: cls(params)) is outcome(lambda: torchs(again))


@pytest.mark.parametrize("cls", rules.ALL, ids=lambda c: c.__name__)
def test_values_are_validated_before_parameters_are_looked_at(cls):
    with pytest.raises(ValueError, match="learning rate"):
        cls([], lr=-1.0)
    with pytest.raises(ValueError, match="l1"):
        cls([], l1=-1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -0.1}, "-0.1"), ({"lr": math.nan}, "nan"), ({"betas": (1.0, 0.9)}, "index 0: 1.0"),
     ({"betas": (0.9, -1)}, "index 1: -1"), ({"weight_decay": -2}, "-2"), ({"lr": TENSOR2}, "1-element")],
    ids=str,
)
def test_lion_is_as_strict_as_torch(options, message):
    with pytest.raises(ValueError, match=message):
        fuseopt.Lion(parameters([(3,)]), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"betas": (0.9,)}, ValueError, r"betas.*\(0.9,\).*two"), ({"betas": 0.9}, ValueError, "betas.*0.9.*two"),
     ({"betas": (0.9, "x")}, TypeError, "index 1.*'x'"), ({"lr": "a"}, TypeError, "learning rate.*'a'"),
     ({"lr": None}, TypeError, "learning rate.*None"), ({"weight_decay": "a"}, TypeError, "weight_decay.*'a'")],
    ids=str,
)
def test_lion_names_what_is_no_number(options, error, message):
    with pytest.raises(error, match=message):
        fuseopt.Lion(parameters([(3,)]), **options)


STAGE_OPTIONS = [  # option, exception, what the message names
    ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm.*0.0"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm.*-1.0"),
    ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm.*nan"),
    ({"max_grad_norm": "1"}, ValueError, "max_grad_norm.*'1'"),
    ({"l1": -0.1}, ValueError, "l1.*-0.1"),
    ({"l1": math.nan}, ValueError, "l1.*nan"),
    ({"l1": math.inf}, ValueError, "l1.*inf"),
    ({"l1": None}, ValueError, "l1.*None"),
    ({"ema": 0.99}, TypeError, r"ema.*0.99.*EMA\("),
    ({"ema": [EMA(0.9), 0.99]}, TypeError, r"ema.*0.99.*EMA\("),
    ({"ema": {"decay": 0.9, "warm": 1}}, TypeError, "ema.*warm"),
    ({"ema": {"decay": 2.0}}, ValueError, "decay.*2.0"),
    ({"ema": [EMA(0.9)] * 9}, ValueError, "9 averages.*8"),
    ({"prune": 0.5}, TypeError, r"prune.*0.5.*Prune\("),
    ({"prune": {"sparsity": 1.5}}, ValueError, "sparsity.*1.5"),
    ({"prune": {"patern": "2:4"}}, TypeError, "prune.*patern"),
    ({"prune": {"pattern": "4:2"}}, ValueError, "pattern.*'4:2'.*n < m <= 32"),
    ({"prune": {"pattern": "2:64"}}, ValueError, "pattern.*'2:64'.*n < m <= 32"),
    ({"prune": {"pattern": 24}}, ValueError, "pattern.*24.*rows"),
    ({"prune": {"pattern": "2:4", "sparsity": 0.5}}, ValueError, "sparsity: 0.5.*leave sparsity out"),
    ({"prune": {"pattern": "2:4", "threshold": 0.5}}, ValueError, "threshold: 0.5.*leave threshold out"),
    ({"prune": {"pattern": "rows"}}, ValueError, "either a sparsity or a threshold"),
    ({"prune": {"pattern": "rows", "threshold": 0.5}}, ValueError, "threshold: 0.5.*takes a sparsity"),
    ({"prune": {"sparsity": 0.5, "regrow": 1}}, ValueError, "regrow: 1.*True or False"),
    ({"prune": {"threshold": 0.5, "regrow": True}}, ValueError, "regrow.*every step.*sparsity"),
    ({"backend": "cud"}, ValueError, "backend.*'cud'"),
    ({"sparsity": 0.5}, TypeError, "unknown option 'sparsity'.*prune"),
    ({"differentiable": True}, ValueError, "differentiable.*torch.optim"),
]


@pytest.mark.parametrize(("options", "error", "message"), STAGE_OPTIONS, ids=[str(o[0]) for o in STAGE_OPTIONS])
@pytest.mark.parametrize("cls", rules.ALL, ids=lambda c: c.__name__)
def test_stage_options(cls, options, error, message):
    with pytest.raises(error, match=message) as found:
        cls(parameters([(3,)]), **options)
    assert len(str(found.value)) < 300 and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [({"l1": -1.0}, ValueError, "l1"), ({"ema": 3}, TypeError, "ema"), ({"prune": 3}, TypeError, "prune"),
     ({"max_grad_norm": -3}, ValueError, "max_grad_norm")],
    ids=str,
)
def test_stage_options_of_a_late_group(option, error, message):
    p, q = parameters([(3,), (3,)])
    opt = run(fuseopt.AdamW([p]), [p], 1)
    before = Snapshot(opt)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": [q], **option})
    before.assert_unchanged()
    assert len(opt.param_groups) == 1


PRUNES = [
    ((), {}, ValueError, "sparsity or a threshold"),
    ((0.5,), {"threshold": 0.1}, ValueError, "sparsity or a threshold"),
    ((1.0,), {}, ValueError, r"sparsity.*1.0.*\[0, 1\)"),
    ((-0.1,), {}, ValueError, "sparsity.*-0.1"),
    ((math.nan,), {}, ValueError, "sparsity.*nan"),
    (("x",), {}, ValueError, "sparsity.*'x'"),
    ((), {"threshold": math.nan}, ValueError, "threshold.*nan"),
    ((), {"threshold": -1.0}, ValueError, "threshold.*-1.0"),
    ((), {"threshold": math.inf}, ValueError, "threshold.*inf"),
    ((), {"threshold": "x"}, ValueError, "threshold.*'x'"),
    ((0.5,), {"scope": "layer"}, ValueError, "scope.*'layer'.*'global'"),
    ((0.5,), {"schedule": "step"}, ValueError, "schedule.*'step'.*'cubic'"),
    ((0.5,), {"moments": "drop"}, ValueError, "moments.*'drop'.*'keep'"),
    ((0.5,), {"begin": 0}, ValueError, "begin.*0"),
    ((0.5,), {"begin": 1.5}, ValueError, "begin.*1.5"),
    ((0.5,), {"every": 0}, ValueError, "every.*0"),
    ((0.5,), {"begin": 5, "end": 4}, ValueError, "end.*4.*begin=5"),
    ((0.5,), {"begin": 1, "end": 6, "every": 2}, ValueError, "end.*6.*every=2.*use end=5"),
    ((0.5,), {"begin": 10, "end": 49, "every": 10, "schedule": "linear"}, ValueError, "use end=50"),
    ((0.5,), {"begin": 10, "end": 12, "every": 10}, ValueError, "use end=20"),
    ((0.5,), {"begin": 2, "end": 6, "schedule": "once"}, ValueError, "once.*end"),
    ((0.5,), {"begin": 2, "every": 3, "schedule": "once"}, ValueError, "once.*every"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), PRUNES, ids=[f"{p[0]}{p[1]}" for p in PRUNES])
def test_prune_options(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        Prune(*args, **kwargs)


@pytest.mark.parametrize("decay", (math.nan, 1.5, -0.1, None, "x"))
def test_ema_decay(decay):
    with pytest.raises(ValueError, match=r"decay.*\[0, 1\]"):
        EMA(decay)


def test_ema_warmup():
    with pytest.raises(ValueError, match="warmup.*'cosine'.*'timm'"):
        EMA(0.9, warmup="cosine")


# ---- parameters and gradients ---------------------------------------------------------------------

PARAMETERS = {
    "complex": (torch.ones(3, dtype=torch.complex64), TypeError, "'head'.*complex64.*float32"),
    "integer": (torch.ones(3, dtype=torch.int64), TypeError, "'head'.*int64"),
    "float8": (torch.ones(3).to(torch.float8_e4m3fn), TypeError, "'head'.*float8"),
    "sparse": (torch.eye(3).to_sparse(), ValueError, "'head'.*sparse"),
    "expanded": (torch.ones(1, 6).expand(3, 6), ValueError, r"'head'.*strides \(0, 1\).*expanded.*clone"),
    "overlapping": (torch.ones(9).as_strided((3, 3), (2, 1)), ValueError, r"'head'.*strides \(2, 1\).*clone"),
    "meta": (torch.ones(3, device="meta"), ValueError, "on meta.* on cpu"),
}


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("cls", rules.ALL, ids=lambda c: c.__name__)
def test_parameters_that_cannot_be_stepped(cls, kind, backend):
    value, error, message = PARAMETERS[kind]
    good, bad = parameters([(4, 4)])[0], value.detach()
    good.grad, bad.grad = torch.ones(4, 4), bad.clone()
    try:
        opt = cls([("stem", good), ("head", bad)], backend=backend)
    except Exception as refused:  # torch's own constructor may (Adagrad makes state there)
        assert cls is fuseopt.Adagrad and outcome(lambda: torch.optim.Adagrad([bad])) is type(refused)
        return
    start, state = good.detach().clone(), {p: dict(s) for p, s in opt.state.items()}
    with pytest.raises(error, match=message) as found:
        opt.step()
    assert len(str(found.value)) < 300
    assert torch.equal(good, start)
    assert {p: dict(s) for p, s in opt.state.items()}.keys() == state.keys()


def test_messages_name_unnamed_parameters_by_place(backend):
    p, q = parameters([(3,), (3,)])
    opt = fuseopt.SGD([{"params": [p]}, {"params": [q]}], lr=0.1, backend=backend)
    set_gradients([p, q], 1)
    q.grad = torch.eye(3).to_sparse()[0]
    with pytest.raises(ValueError, match="parameter 0 of group 1"):
        opt.step()


# ---- masks ----------------------------------------------------------------------------------------

MASKS = {
    "shape": (lambda p: torch.ones(3, dtype=torch.bool), {}, ValueError, r"'w'.*\(3,\).*\(4, 5\).*keep\[:, None\]"),
    "larger": (lambda p: torch.ones(2, 4, 5, dtype=torch.bool), {}, ValueError, r"\(2, 4, 5\)"),
    "grows": (lambda p: torch.ones(4, 5, 5, dtype=torch.bool), {}, ValueError, "broadcast"),
    "float": (lambda p: torch.ones(4, 5), {}, TypeError, "'w'.*float32.*boolean"),
    "bytes": (lambda p: torch.ones(4, 5, dtype=torch.uint8), {}, TypeError, "'w'.*uint8.*boolean"),
    "list": (lambda p: [True], {}, TypeError, "'w'.*list.*boolean"),
    "none": (lambda p: None, {}, TypeError, "'w'.*NoneType.*boolean"),
    "mode": (element_mask, {"mode": "zero"}, ValueError, "'w'.*'zero'.*'freeze'"),
}


@pytest.mark.parametrize("steps", (0, 2))
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind, steps, backend):
    make, more, error, message = MASKS[kind]
    p = parameters([(4, 5)])[0]
    opt = fuseopt.AdamW([("w", p)], backend=backend)
    if steps:
        opt.mask(p, element_mask(p))
    run(opt, [p], steps)
    before = Snapshot(opt)
    with pytest.raises(error, match=message):
        opt.mask(p, make(p), **more)
    before.assert_unchanged()


def test_masks_of_strangers(backend):
    p = parameters([(4, 5)])[0]
    opt = fuseopt.AdamW([("w", p)], backend=backend)
    with pytest.raises(ValueError, match="not a parameter.*add_param_group"):
        opt.mask(torch.ones(4, 5), torch.tensor(True))
    with pytest.raises(ValueError, match="'v'.*names are 'w'"):
        opt.mask("v", torch.tensor(True))
    with pytest.raises(ValueError, match="not a parameter"):
        opt.prune_mask(torch.ones(4, 5))


# ---- averages and statistics ----------------------------------------------------------------------


def test_averages_that_do_not_exist(backend):
    model = torch.nn.Linear(2, 3)
    params = list(model.parameters())
    without = run(fuseopt.SGD(params, lr=0.1, backend=backend), params, 1)
    early = fuseopt.SGD(params, lr=0.1, ema=EMA(0.5), backend=backend)
    for opt, k, message in ((without, 0, r"EMA\(decay\)"), (early, 1, "no average 1"), (early, -1, "-1"), (early, "x", "x")):
        with pytest.raises(ValueError, match=message), opt.swap_ema(k):
            raise AssertionError("the body must not run")
        with pytest.raises(ValueError, match=message):
            opt.copy_ema_to(model, k)


def test_copy_ema_to_a_model_that_does_not_match(backend):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    opt = fuseopt.SGD(model.named_parameters(), lr=0.1, ema=EMA(0.5), backend=backend)
    run(opt, list(model.parameters()), 1)
    for other, message in (
        (torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)), r"'1.weight'.*\(3, 4\).*\(2, 4\)"),
        (torch.nn.Sequential(torch.nn.Linear(3, 4)), "1.weight"),
    ):
        before = [p.detach().clone() for p in other.parameters()]
        with pytest.raises(ValueError, match=message):
            opt.copy_ema_to(other)
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    unnamed = run(fuseopt.SGD(model.parameters(), lr=0.1, ema=EMA(0.5), backend=backend), list(model.parameters()), 1)
    with pytest.raises(ValueError, match="named_parameters"):
        unnamed.copy_ema_to(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)))


def test_statistics_that_were_not_gathered(backend):
    p = parameters([(3,)])
    with pytest.raises(RuntimeError, match="statistics=True"):
        run(fuseopt.SGD(p, lr=0.1, backend=backend), p, 1).statistics()
    with pytest.raises(RuntimeError, match="no step"):
        fuseopt.SGD(p, lr=0.1, statistics=True, backend=backend).statistics()


# ---- a value that goes wrong later ------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_explain_prints(rule, backend):
    params = parameters([(33, 31), (7,)])
    opt = Stage("", {"max_grad_norm": 1.0, "ema": EMA(0.9), "prune": Prune(0.5)}, "freeze").build(rule, params, F32, backend=backend)
    explanation = opt.explain()
    assert explanation.backend == backend and isinstance(explanation.bytes_per_step, int)
    n, slots = 33 * 31 + 7, len(opt.slots(opt.param_groups[0]))
    streams = 4 * n * (2 + 1 + 1 + 2 * slots + 2)  # p, gradient twice (norm), moments, average
    assert 0 < explanation.bytes_per_step - streams < n  # and bits
    assert backend in str(explanation)


def test_a_damaged_group_is_refused_at_the_step(backend):
    p = parameters([(3,)])[0]
    opt = run(BY_NAME["adam"].ours([p], backend=backend), [p], 1)
    opt.param_groups[0]["lr"] = "fast"
    before = Snapshot(opt)
    with pytest.raises((ValueError, TypeError)):
        opt.step()
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [({"max_grad_norm": -1.0}, ValueError, "max_grad_norm.*-1.0"), ({"l1": math.nan}, ValueError, "l1.*nan"),
     ({"ema": 0.9}, TypeError, "ema.*0.9"), ({"ema": [{"decay": 7}]}, ValueError, "decay.*7"),
     ({"prune": {"sparsity": 2.0}}, ValueError, "sparsity.*2.0")],
    ids=str,
)
def test_stage_options_edited_to_wrong_values(option, error, message, backend):
    p, q = parameters([(3, 3), (4,)])
    opt = run(fuseopt.AdamW([{"params": [p]}, {"params": [q]}], max_grad_norm=1.0, backend=backend), [p, q], 2)
    opt.param_groups[1].update(option)
    set_gradients([p, q], 3)
    before = Snapshot(opt) if option.get("l1") is None else None  # NaN differs from itself
    start = p.detach().clone()
    with pytest.raises(error, match=message):
        opt.step()
    assert torch.equal(p, start) and opt.state[p]["step"] == 2
    if before:
        before.assert_unchanged()


def test_a_valid_option_edited_in_place_to_a_wrong_value(backend):
    p = parameters([(4, 4)])[0]
    opt = run(fuseopt.SGD([p], ema=EMA(0.5), prune=Prune(0.5, begin=9), backend=backend), [p], 1)
    opt.param_groups[0]["prune"]["sparsity"] = 3.0
    with pytest.raises(ValueError, match="sparsity.*3.0"):
        opt.step()
    opt.param_groups[0]["prune"]["sparsity"] = 0.5
    opt.param_groups[0]["ema"].append({"decay": -1})
    with pytest.raises(ValueError, match="decay.*-1"):
        opt.step()


@pytest.mark.parametrize("option", ({"backend": "torch"}, {"sharded": True}, {"statistics": True}), ids=str)
def test_options_of_the_whole_optimizer_in_a_group(option):
    p, q = parameters([(3,), (3,)])
    (name,) = option
    with pytest.raises(ValueError, match=f"'{name}'.*optimizer"):
        fuseopt.AdamW([{"params": [p], **option}])
    opt = fuseopt.AdamW([p])
    with pytest.raises(ValueError, match=f"'{name}'.*optimizer"):
        opt.add_param_group({"params": [q], **option})
    assert len(opt.param_groups) == 1
    opt.add_param_group({**opt.param_groups[0], "params": [q]})  # a group made from another one
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert not {"backend", "statistics"} & set().union(*opt.param_groups)


@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_a_loss_scale_of_zero(rule, backend):
    if backend == "cuda":
        pytest.skip("the GPU reads it, and nothing waits for the GPU")
    p = parameters([(3, 4)])
    opt = run(rule.ours(p, backend=backend), p, 1)
    set_gradients(p, 2)
    opt.grad_scale = torch.tensor(0.0)
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="grad_scale is 0"):
        opt.step()
    before.assert_unchanged()


def test_parameters_without_values(backend):
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    opt = fuseopt.AdamW([("w", p)], backend=None if backend == "cpu" else backend)
    with pytest.raises(ValueError, match="'w' is on the meta device.*to_empty"):
        opt.step()
    assert not opt.state


def test_what_an_option_would_ignore_is_refused_and_dropped_from_old_checkpoints():
    for options, word in (
        ({"threshold": 0.5, "end": 3}, "leave out end"),
        ({"threshold": 0.5, "every": 3}, "leave out end"),
        ({"sparsity": 0.5, "every": 3}, "give end"),
        ({"sparsity": 0.5, "begin": True}, "whole number"),
    ):
        with pytest.raises(ValueError, match=word):
            fuseopt.Prune(**options)
    with pytest.raises(ValueError, match="belongs to warmup='edm2'"):
        fuseopt.EMA(sigma_rel=0.1)
    p = torch.nn.Parameter(torch.ones(2, 2))
    opt = fuseopt.SGD([p], lr=0.1, prune=fuseopt.Prune(threshold=0.5))
    old = opt.state_dict()
    old["param_groups"][0]["prune"] |= {"end": 3, "every": 2}
    opt.load_state_dict(old)
    assert (opt.param_groups[0]["prune"]["end"], opt.param_groups[0]["prune"]["every"]) == (None, 1)


def test_what_would_be_lost_inside_swap_ema_is_refused():
    model = torch.nn.Linear(2, 2)
    opt = fuseopt.SGD(model.parameters(), lr=0.1, ema=fuseopt.EMA(0.5))
    other = torch.nn.Linear(2, 2)
    named = fuseopt.SGD(other.named_parameters(), lr=0.1, ema=fuseopt.EMA(0.5))
    for one in (opt, named):
        for p in one.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        one.step()
    with opt.swap_ema():
        with pytest.raises(RuntimeError, match="swapped model"):
            opt.copy_ema_to(model)
        with pytest.raises(RuntimeError, match="look at the average"):
            opt.mask("*", keep=fuseopt.masks.nonzero)
    with named.swap_ema():
        named.copy_ema_to(model)
    assert torch.equal(model.weight, other.weight)
    for wrong in (lambda: opt.copy_ema_to({}), lambda: opt.finalize_pruning("x"), lambda: fuseopt.masks.new_rows(model, 1)):
        with pytest.raises(TypeError, match="give the"):
            wrong()
    with pytest.raises(ValueError, match="names are 'weight', 'bias'"):
        named.prune_mask("*.weight")


def test_the_mask_in_force_can_be_read(backend):
    p = torch.nn.Parameter(torch.ones(3, 2))
    opt = fuseopt.SGD([p], lr=0.1, backend=backend)
    assert opt.keep_mask(p) is None
    opt.mask(p, torch.tensor([True, False, True])[:, None])
    assert opt.keep_mask(p).tolist() == [[True, True], [False, False], [True, True]]
    opt.mask(p, fn=lambda p, g, state: g > 0)
    p.grad = torch.tensor([[1.0, -1.0]] * 3)
    opt.step()
    assert opt.keep_mask(p).tolist() == [[True, False]] * 3
