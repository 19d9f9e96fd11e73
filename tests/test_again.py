"""Short cuts of the usual step: one like the last takes its scalars from it, a first one makes plain state at once.

Whatever is edited in between, the outcome is that of the way around them, bit for bit.
"""

import pickle

import pytest
import torch
from cases import F64, RULES, all_params, assert_same_state, ident, parameters, run, set_gradients
from torch.nn import Parameter

import fuseopt
from fuseopt import EMA, Prune, backends, cpu, plan

SHAPES = [(40, 3), (7,)]


def group(opt) -> dict:
    return opt.param_groups[0]


def first(opt) -> Parameter:
    return group(opt)["params"][0]


def lr_in_place(opt):
    """A tensor that stays the same object and changes its value, as below."""
    if isinstance(group(opt)["lr"], torch.Tensor):
        group(opt)["lr"].mul_(0.5)
    else:
        group(opt)["lr"] = torch.tensor(0.3, dtype=F64)


def betas_in_place(opt):
    betas = group(opt)["betas"] = group(opt)["betas"] if isinstance(group(opt)["betas"], list) else [0.5, 0.6]
    betas[0] *= 0.9


def ema_in_place(opt):
    group(opt)["ema"][0]["decay"] *= 0.5


def tensor_betas(opt):
    betas = group(opt)["betas"]
    if isinstance(betas[0], torch.Tensor):
        betas[0].mul_(0.5)
    else:
        group(opt)["betas"] = (torch.tensor(0.5), 0.6)


def scaled_loss(opt):
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)


def overflow(opt):
    opt.found_inf = torch.tensor(1.0)


def moved(opt):
    first(opt).data = first(opt).detach().clone().t().contiguous().t()


def another_parameter(opt):
    group(opt)["params"][0] = Parameter(first(opt).detach() + 1)


def state_edited(opt):
    opt.state[first(opt)]["exp_avg"] = torch.ones_like(first(opt))


EDITS = {
    "lr": lambda opt: group(opt).update(lr=group(opt)["lr"] / 3),
    "lr tensor": lr_in_place,
    "betas": lambda opt: group(opt).update(betas=(0.5, 0.6)),
    "betas in place": betas_in_place,
    "betas of tensors": tensor_betas,
    "weight_decay": lambda opt: group(opt).update(weight_decay=0.7),
    "maximize": lambda opt: group(opt).update(maximize=not group(opt)["maximize"]),
    "amsgrad": lambda opt: group(opt).update(amsgrad=True),
    "coupled": lambda opt: group(opt).update(decoupled_weight_decay=False),
    "l1": lambda opt: group(opt).update(l1=0.3),
    "clip": lambda opt: group(opt).update(max_grad_norm=0.1),
    "ema": ema_in_place,
    "two averages": lambda opt: group(opt).update(ema=[EMA(0.9), EMA(warmup="swa")]),
    "prune": lambda opt: group(opt).update(prune=Prune(0.5, begin=5)),
    "threshold": lambda opt: group(opt).update(prune=Prune(threshold=0.3)),
    "mask": lambda opt: opt.mask(first(opt), torch.arange(40)[:, None] % 2 == 0),
    "dynamic mask": lambda opt: opt.mask(first(opt), fn=lambda p, g, state: g > 0, every=1),
    "grad scale": scaled_loss,
    "overflow": overflow,
    "moved": moved,
    "another parameter": another_parameter,
    "one group fewer": lambda opt: opt.param_groups.__delitem__(slice(1, None)),
    "groups swapped": lambda opt: opt.param_groups.reverse(),
    "one group more": lambda opt: opt.add_param_group({"params": parameters([(5,)], F64, 7), "lr": 0.5}),
    "state": state_edited,
    "state lost": lambda opt: opt.state.pop(first(opt)),
    "no state": lambda opt: opt.state.clear(),
    "loaded": lambda opt: opt.load_state_dict(opt.state_dict()),
    "steps": lambda opt: [one.update(steps=40) for one in opt.param_groups],
    "statistics": lambda opt: opt.defaults.update(statistics=True),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_step_like_the_last_follows_every_edit(name, native):
    """Of two optimizers the second has forgotten the step before at each step."""
    opts = []
    for _ in range(2):
        a, b = parameters(SHAPES, F64)
        opts.append(fuseopt.AdamW([{"params": [a], "lr": 0.2}, {"params": [b]}], lr=0.1, ema=EMA(0.9), backend="cpu"))
    for t in range(1, 8):
        for opt in opts:
            if opt is opts[1]:
                opt._kept = None
            if t > 3:
                EDITS[name](opt)
            set_gradients(all_params(opt), t)
            opt.step()
        assert opts[0]._kept is not None or t > 3
        assert_same_state(*opts)
        assert [one["steps"] for one in opts[0].param_groups] == [one["steps"] for one in opts[1].param_groups]


STAGES = {
    "warmup": {"ema": EMA(0.9, warmup="timm")},
    "every": {"ema": [EMA(0.9, every=3), EMA(warmup="swa", start=2)]},
    "pruned now and then": {"prune": Prune(0.6, schedule="linear", begin=2, end=8, every=3), "ema": EMA(0.9)},
    "threshold": {"prune": Prune(threshold=0.3, begin=4)},
    "tensor": {"lr": torch.tensor(0.1, dtype=F64)},
    "statistics": {"statistics": True},
}


@pytest.mark.parametrize("name", STAGES)
def test_steps_that_depend_on_their_number_are_made_of_the_last(name, native, monkeypatch):
    """Against one that has forgotten it; where nothing is made or selected the way around is never gone."""
    opts = [fuseopt.AdamW(parameters(SHAPES, F64), backend="cpu", **STAGES[name]) for _ in range(2)]
    around = []
    monkeypatch.setattr(fuseopt.plan, "Step", lambda *args, of=fuseopt.plan.Step: around.append(args[1]) or of(*args))
    for t in range(1, 11):
        for opt in opts:
            opt._kept = opt._kept if opt is opts[0] else None
            set_gradients(all_params(opt), t)
            opt.step()
        assert_same_state(*opts)
        assert opts[0].statistics() == opts[1].statistics() if name == "statistics" else True
        if t == 6:
            assert opts[0]._kept is not None
    expected = {"every": {1, 2, 3, 4}, "pruned now and then": {1, 2, 5, 8}, "threshold": {1, 4}}
    assert [t for t in sorted(set(around)) if around.count(t) == 2] == sorted(expected.get(name, {1}))


def test_a_step_like_the_last_makes_no_scalars(native, monkeypatch):
    """What is kept is used: the options are not even looked at."""
    (p,) = parameters([(5,)])
    opt = run(fuseopt.AdamW([p], backend="cpu"), [p], 2)
    monkeypatch.setattr(fuseopt.plan, "group_step", None)
    run(opt, [p], 2, 3)
    assert opt.state[p]["step"] == 4


def listed(gaps: bool, twice: bool) -> list[Parameter]:
    """Of every kind of layout; with `gaps` one that needs the checks."""
    params = parameters([(3, 4, 5, 2), (), (0, 3), (6, 5), (40, 50), (9,)])
    params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
    params[3].data = params[3].data.t()
    params[5].data = params[5].data[::2] if gaps else params[5].data
    return params + params[3:5] * twice


def stepped(opt, params: list[Parameter], t: int) -> None:
    set_gradients(params, t)
    for p in params:
        p.grad = torch.empty_like(p).copy_(p.grad)
    opt.step()


@pytest.mark.parametrize("stages", ({}, {"ema": [EMA(0.9), EMA(0.5)], "max_grad_norm": 0.1}), ids=("plain", "ema"))
@pytest.mark.parametrize("rule", RULES, ids=ident)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_first_step_makes_the_state_that_the_checks_lead_to(rule, stages, native, monkeypatch):
    """Adam's moments and SGD's momentum, which is not zeroed before; in the second optimizer by way of the checks."""
    for gaps, twice in ((False, False), (False, True), (True, True)):
        (mine, a), (other, b) = (
            (p, rule.ours(p, backend="cpu", **stages)) for p in (listed(gaps, twice) for _ in "ab")
        )
        with monkeypatch.context() as patch:
            torch.use_deterministic_algorithms(True)  # what is not written holds NaN
            stepped(a, mine, 1)
            torch.use_deterministic_algorithms(False)
            patch.setattr(cpu, "new_states", lambda *_: {})
            stepped(b, other, 1)
        for t in (2, 3):
            assert_same_state(a, b)
            for p, q in zip(mine, other, strict=True):
                assert list(a.state[p]) == list(b.state[q])
                for x, y in zip(a.state[p].values(), b.state[q].values(), strict=True):
                    assert x.dtype == y.dtype and not x.requires_grad
                    assert x.stride() == y.stride() or x.numel() < 2
            stepped(a, mine, t), stepped(b, other, t)


def test_a_first_step_that_fails_leaves_no_state(native):
    """The state of the good parameter was made before the bad one was found."""
    good, bad = parameters([(5,), (6,)])
    opt = fuseopt.AdamW([good, bad], backend="cpu")
    set_gradients([good, bad], 1)
    bad.data = bad.data.to(torch.float64)
    before = good.detach().clone()
    with pytest.raises((TypeError, ValueError)):
        opt.step()
    assert not opt.state and torch.equal(good, before) and opt.param_groups[0]["steps"] == 0


def test_an_unpickled_optimizer_knows_the_step_before(native):
    """The key "steps" of its groups is another object than the program's."""
    opt = fuseopt.AdamW(parameters(SHAPES), backend="cpu")
    for t in (1, 2, 3):
        set_gradients(all_params(opt), t)
        opt.step()
        opt = pickle.loads(pickle.dumps(opt)) if t == 1 else opt
    opt.param_groups[0]["steps"] += 1
    assert cpu.native.changed(plan.sources(opt), opt._kept.copies, "steps") == []


def test_an_edit_while_a_step_runs_counts_from_the_next(native, monkeypatch):
    """As a signal's handler makes it, which runs when the pass returns, or another thread during it."""

    def interrupted(*calls):
        at_once(*calls)
        group(opt)["lr"] = 0.5

    at_once = backends.at_once
    params = parameters([(5,)], F64)
    opt = fuseopt.SGD(params, lr=0.1, backend="cpu")
    set_gradients(params, 1)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "at_once", interrupted)
        opt.step()
    before = first(opt).detach().clone()
    opt.step()
    torch.testing.assert_close(first(opt).detach(), before - 0.5 * first(opt).grad, rtol=1e-12, atol=0)
