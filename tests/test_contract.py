"""torch's own contract, driven by the material of torch's own optimizer tests: every input that
torch.testing lists for a class, its errors, flags, signatures, hooks, copies, names.
"""

import copy
import inspect
import pickle
import types

import pytest
import torch
from cases import F32, all_params, gradient, like, parameters, run, set_gradients
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torchs import CLASSES, INFOS, RAGGED, VECTORS, assert_agree, by_desc, exact, listed, ours, theirs

import fuseopt

# ---- every input that torch lists -------------------------------------------------------------------


@pytest.mark.parametrize("shapes", (VECTORS, RAGGED), ids=("vectors", "ragged"))
@pytest.mark.parametrize("case", listed(), ids=by_desc)
def test_every_listed_input(case, shapes, backend):
    name, item = case
    params = parameters(shapes)
    twins = like(params)
    bits = shapes is VECTORS and exact(name, backend)
    a = ours(name, params, backend=backend, **copy.deepcopy(item.kwargs))
    b = theirs(name, twins, fused=shapes is VECTORS, **copy.deepcopy(item.kwargs))
    for t in range(1, 6):
        run(a, params, 1, t), run(b, twins, 1, t)
        assert_agree(a, b, bits, f"step {t}")


@pytest.mark.parametrize("case", listed(), ids=by_desc)
def test_every_listed_input_as_the_override_of_a_group(case, backend):
    """One group has torch's defaults, one the listed options, one more is added in mid-run."""
    name, item = case
    params = parameters(VECTORS)
    twins = like(params)
    bits = exact(name, backend)

    def groups(x, drop=()):
        options = {k: v for k, v in copy.deepcopy(item.kwargs).items() if k not in drop}
        return [{"params": x[:1]}, {"params": [x[1]], **options}], {"params": x[2], **options}

    (first, late), (others, later) = groups(params), groups(twins, drop=("capturable",))
    a, b = ours(name, first, lr=0.02, backend=backend), theirs(name, others, lr=0.02)
    run(a, params[:2], 2), run(b, twins[:2], 2)
    a.add_param_group(late), b.add_param_group(later)
    for t in range(3, 6):
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 0.02 / t
        run(a, params, 1, t), run(b, twins, 1, t)
        assert_agree(a, b, bits, f"step {t}")


ERRORS = [(name, item) for name in CLASSES for item in INFOS[name].optim_error_inputs_func(device="cpu", dtype=F32)]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: f"{case[0]}-{case[1].optimizer_error_input.desc}".replace(" ", "_"))
def test_every_listed_error(case):
    name, item = case
    given = item.optimizer_error_input
    make = lambda: ours(name, given.params or parameters([(2, 3)]), **given.kwargs)
    if issubclass(item.error_type, Warning):
        with pytest.warns(item.error_type, match=item.error_regex):
            make()
    else:
        with pytest.raises(item.error_type, match=item.error_regex):
            make()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("value", (None, False, True), ids=str)
@pytest.mark.parametrize("flag", ("foreach", "fused", "capturable"))
def test_flags_are_accepted_as_torch_accepts_them(name, flag, value, backend):
    """The same error or none; kept in the groups, and nothing to the steps."""
    params, kind = parameters(VECTORS), getattr(torch.optim, name)
    twins = like(params)
    try:
        accepted = kind(like(params), **{flag: value})
    except TypeError as error:
        with pytest.raises(TypeError, match=flag):
            ours(name, params, **{flag: value})
        assert flag in str(error)
        return
    a, b = ours(name, params, backend=backend, **{flag: value}), theirs(name, twins)
    run(a, params), run(b, twins)
    assert_agree(a, b, exact(name, backend))
    assert a.param_groups[0].get(flag) == accepted.param_groups[0].get(flag)


@pytest.mark.parametrize("name", CLASSES)
def test_differentiable_is_refused_wherever_it_is_given(name):
    p, q = parameters([(3,), (3,)])
    for give in (lambda: ours(name, [p], differentiable=True), lambda: ours(name, [{"params": [p], "differentiable": True}])):
        with pytest.raises(ValueError, match="differentiable=True.*torch.optim"):
            give()
    opt = ours(name, [p])
    with pytest.raises(ValueError, match="differentiable=True.*torch.optim"):
        opt.add_param_group({"params": [q], "differentiable": True})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("name", CLASSES)
def test_the_signature_starts_with_torchs(name):
    """nanoGPT and others ask it whether `fused` exists."""
    strip = lambda cls: [(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]
    torchs = strip(getattr(torch.optim, name))
    assert strip(getattr(fuseopt, name))[: len(torchs)] == torchs
    assert issubclass(getattr(fuseopt, name), getattr(torch.optim, name))


# ---- hooks, names, copies, profiler -------------------------------------------------------------------


def hooked_run(opt, log: list) -> None:
    """A run with a hook of every kind, some of which change what they are given."""
    p = all_params(opt)[0]
    note = lambda what: lambda *args: log.append(what)
    closure = lambda: log.append("closure")
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {})),  # puts in a closure
        opt.register_step_post_hook(lambda o, args, kwargs: log.append(("post", o is opt, len(args), kwargs))),
        opt.register_state_dict_pre_hook(note("state_dict pre")),
        opt.register_state_dict_post_hook(lambda o, d: {**d, "extra": 7}),
        opt.register_state_dict_post_hook(note("state_dict post first"), prepend=True),
        opt.register_load_state_dict_pre_hook(note("load pre")),
        opt.register_load_state_dict_pre_hook(lambda o, d: {**d, "param_groups": [{**d["param_groups"][0], "lr": 0.25}]}, prepend=True),
        opt.register_load_state_dict_post_hook(lambda o: log.append(("load post", o.param_groups[0]["lr"]))),
    ]
    for t in (1, 2):
        p.grad = gradient(p, 0, t)
        opt.step()
        saved = opt.state_dict()
        log.append((sorted(saved), saved["param_groups"][0]["param_names"]))
        opt.load_state_dict(copy.deepcopy(saved))
    for handle in handles:
        handle.remove()
    opt.step()
    log.append(opt.state_dict().keys() == {"state", "param_groups"})


@pytest.mark.parametrize("name", CLASSES)
def test_hooks_of_every_kind_run_as_torchs(name, backend):
    params, logs = parameters(VECTORS[:1]), ([], [])
    twins = like(params)
    a, b = ours(name, [("w", params[0])], backend=backend), theirs(name, [("w", twins[0])])
    hooked_run(a, logs[0]), hooked_run(b, logs[1])
    assert logs[0] == logs[1] and ("load post", 0.25) in logs[0] and logs[0].count("closure") == 2
    assert_agree(a, b, exact(name, backend))


@pytest.mark.parametrize("way", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))), ids=("deepcopy", "pickle"))
@pytest.mark.parametrize("name", CLASSES)
def test_copies_before_and_after_steps(name, way, backend):
    """Hooks and all: what goes on is what torch's copy goes on with."""
    params = parameters(VECTORS)
    twins = like(params)
    a, b = ours(name, params, backend=backend), theirs(name, twins)
    for t in (1, 2, 3):
        a, b = way(a), way(b)
        run(a, all_params(a), 1, t), run(b, all_params(b), 1, t)
    assert_agree(a, b, exact(name, backend))


@pytest.mark.parametrize("name", CLASSES)
def test_the_profiler_sees_torchs_names(name):
    p = parameters([(3,)])
    opt = ours(name, p)
    set_gradients(p, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        opt.step()
        opt.zero_grad()
    names = [event.name for event in seen.events()]
    assert names.count(f"Optimizer.step#{name}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{name}.zero_grad") == 1
    assert repr(opt).startswith(f"{name} (\nParameter Group 0\n")


def test_what_frameworks_do_to_an_optimizer(backend):
    """accelerate loads an empty state at once and puts another step in place; Lightning subclasses the class."""
    params = parameters(VECTORS)
    twins = like(params)
    a, b = ours("AdamW", params, backend=backend), ours("AdamW", twins, backend=backend)
    a.load_state_dict(a.state_dict())
    calls, plain = [], a.step

    def counted(self, closure=None):
        calls.append(self)
        return plain(closure)

    a.step = types.MethodType(counted, a)
    wrapped = types.SimpleNamespace()

    class Wrapper:
        def __init__(self, opt):
            self.__dict__ = {k: v for k, v in opt.__dict__.items() if k != "step"}
            self.__class__ = type("Lightning" + type(opt).__name__, (Wrapper, type(opt)), {})
            self.inner = opt

        def step(self, closure=None):
            return self.inner.step(closure)

    wrapped = Wrapper(a)
    assert isinstance(wrapped, torch.optim.AdamW)
    for t in (1, 2):
        set_gradients(params, t)
        wrapped.step(lambda: wrapped.zero_grad(set_to_none=False) or set_gradients(params, t))
        run(b, twins, 1, t)
    assert calls == [a, a] and wrapped.param_groups is a.param_groups and wrapped.state_dict()["state"][0]["step"] == 2
    assert_agree(a, b, True)
