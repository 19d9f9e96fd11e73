"""state_dict both ways with torch, with torch.save, with deepcopy and pickle; what does not fit is refused."""

import copy
import gc
import io
import json
import pickle
import warnings
import weakref

import pytest
import safetensors.torch
import torch
from cases import (
    BF16,
    BY_NAME,
    DTYPES,
    F32,
    F64,
    FUSED_RULES,
    ONE_EACH,
    RULES,
    STAGE,
    Rule,
    Snapshot,
    all_params,
    assert_close,
    assert_same_bits,
    assert_same_state,
    element_mask,
    ident,
    like,
    parameters,
    run,
    set_gradients,
)

import fuseopt
from fuseopt import EMA, Prune, rules

SHAPES = [(16, 64), (64,)]


def through_disk(state_dict):
    """What torch.load(weights_only=True) makes of torch.save."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def go_on(make, params, state_dict):
    """A new optimizer on copies of the parameters that continues from `state_dict`."""
    opt = make(like(params))
    opt.load_state_dict(state_dict)
    return opt


@pytest.mark.parametrize("dtype", (F32, F64), ids=ident)
@pytest.mark.parametrize("rule", FUSED_RULES, ids=ident)
def test_torch_and_back_on_one_trajectory(rule: Rule, dtype):
    """torch for two steps, ours for two, torch for two: the bits of torch for six."""
    reference = parameters(SHAPES, dtype)
    a = run(rule.torchs(parameters(SHAPES, dtype)), [], 0)
    torchs, params = rule.torchs(reference), all_params(a)
    run(torchs, reference, 6)
    run(a, params, 2)
    b = go_on(rule.ours, params, through_disk(a.state_dict()))
    run(b, all_params(b), 2, 3)
    c = go_on(rule.torchs, all_params(b), through_disk(b.state_dict()))
    run(c, all_params(c), 2, 5)
    assert_same_state(c, torchs)


@pytest.mark.parametrize("rule", [r for r in RULES if r.torch_has and not r.fused], ids=ident)
def test_torch_and_back_by_tolerance(rule, backend):
    reference = parameters(SHAPES, F64)
    torchs = run(rule.torchs(reference), reference, 6)
    a = rule.torchs(parameters(SHAPES, F64))
    run(a, all_params(a), 2)
    b = go_on(lambda p: rule.ours(p, backend=backend), all_params(a), through_disk(a.state_dict()))
    run(b, all_params(b), 2, 3)
    c = go_on(rule.torchs, all_params(b), through_disk(b.state_dict()))
    run(c, all_params(c), 2, 5)
    for p, q in zip(all_params(c), all_params(torchs), strict=True):
        assert_close(p, q, (1e-7, 1e-9))  # torch keeps mu_product in fp32 and rounds it elsewhere


@pytest.mark.parametrize("stage", ("everything", "everything-sparsity"))
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_resuming_half_way_changes_no_bit(rule, dtype, stage, backend):
    """Saved and loaded at every step of six, with every option on; the options come from the file."""
    shapes = [(33, 31), (70,), (3, 5, 2, 2)]
    whole = parameters(shapes, dtype)
    uncut = STAGE[stage].build(rule, whole, dtype, backend=backend)
    params = parameters(shapes, dtype)
    opt = STAGE[stage].build(rule, params, dtype, backend=backend)
    for t in range(1, 7):
        run(uncut, whole, 1, t)
        run(opt, params, 1, t)
        params = like(params)
        saved = through_disk(opt.state_dict())
        opt = rule.ours(params, backend=backend, statistics=opt.defaults["statistics"])
        opt.load_state_dict(saved)
        opt.grad_scale = uncut.grad_scale
        assert_same_state(opt, uncut)
    if uncut.defaults["statistics"]:
        run(uncut, whole, 1, 7), run(opt, params, 1, 7)
        assert dict(opt.statistics()) == dict(uncut.statistics())


@pytest.mark.parametrize("before", ("channels_last", "contiguous"))
def test_bits_of_masks_do_not_depend_on_the_memory_format(before, backend):
    """Saved in one memory format, loaded in the other: the same mask, the same pruned entries."""
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    after = next(name for name in formats if name != before)
    (start,) = parameters([(4, 6, 3, 3)])
    for keep in (element_mask(start), torch.arange(6)[:, None, None] > 2, torch.arange(4)[:, None, None, None] > 1):
        p, q, whole = (torch.nn.Parameter(start.detach().clone(memory_format=formats[f])) for f in (before, after, before))
        a, b, uncut = (fuseopt.AdamW([x], lr=0.1, ema=EMA(0.5), prune=Prune(0.5), backend=backend) for x in (p, q, whole))
        a.mask(p, keep), uncut.mask(whole, keep)
        run(a, [p], 2), run(uncut, [whole], 2)
        q.data.copy_(p.data)
        b.load_state_dict(through_disk(a.state_dict()))
        assert torch.equal(b.prune_mask(q), a.prune_mask(p))
        run(b, [q], 2, 3), run(uncut, [whole], 2, 3)
        assert_same_bits(q, whole)
        assert_same_bits(b.state[q]["ema_0"], uncut.state[whole]["ema_0"])


def test_extras_keep_their_type(backend):
    """torch would cast an fp32 average to the parameter's bf16, and bits to floats."""
    p = parameters([(8, 8)], BF16)[0]
    opt = fuseopt.AdamW([p], ema=EMA(0.5), prune=Prune(0.5), backend=backend)
    opt.mask(p, element_mask(p))
    run(opt, [p], 2)
    other = fuseopt.AdamW(like([p]), backend=backend)
    other.load_state_dict(through_disk(opt.state_dict()))
    state = other.state[all_params(other)[0]]
    assert state["ema_0"].dtype == F32 and state["step"].dtype == F32
    assert state["prune_mask"].dtype == state["mask_keep"].dtype == torch.uint8
    assert state["exp_avg"].dtype == BF16


def test_masks_survive_a_stay_with_torch(backend):
    """torch casts all state to the parameter's type, bits included; ours takes them back."""
    p = parameters([(8, 40)])[0]
    opt = fuseopt.AdamW([p], prune=Prune(0.5), backend=backend)
    opt.mask(p, element_mask(p))
    run(opt, [p], 2)
    torchs = torch.optim.AdamW(like([p]))
    torchs.load_state_dict(through_disk(opt.state_dict()))
    back = fuseopt.AdamW(like([p]), backend=backend)
    back.load_state_dict(through_disk(torchs.state_dict()))
    run(opt, [p], 1, 3), run(back, all_params(back), 1, 3)
    assert_same_state(opt, back)


def test_a_state_dict_is_plain_data(backend):
    p = parameters([(8, 8)])[0]
    opt = fuseopt.AdamW([("w", p)], lr=torch.tensor(0.1), ema=[EMA(0.5, warmup="timm")], prune=Prune(0.5), l1=0.1, backend=backend)
    opt.mask(p, element_mask(p))
    run(opt, [p], 2)

    def plain(x):
        if isinstance(x, dict):
            return all(plain(v) for v in [*x, *x.values()])
        if isinstance(x, (list, tuple)):
            return all(map(plain, x))
        return x is None or type(x) in (torch.Tensor, int, float, bool, str)

    assert plain(opt.state_dict())


def test_foreign_state_and_group_keys_are_kept(backend):
    """Schedulers, SAM and others put entries there."""
    p = parameters([(4,)])[0]
    opt = fuseopt.SGD([p], lr=0.1, momentum=0.9, backend=backend)
    opt.param_groups[0]["initial_lr"] = 0.5
    run(opt, [p], 1)
    opt.state[p]["old_p"] = torch.ones(4)
    opt.state["global"] = {"count": 3}
    other = fuseopt.SGD(like([p]), lr=0.3, momentum=0.9, backend=backend)
    other.load_state_dict(through_disk(opt.state_dict()))
    run(other, all_params(other), 1, 2)
    assert other.param_groups[0]["initial_lr"] == 0.5 and other.param_groups[0]["lr"] == 0.1
    assert_same_bits(other.state[all_params(other)[0]]["old_p"], torch.ones(4))
    assert other.state["global"] == {"count": 3}


def test_groups_keep_their_own_stage_options_when_a_torch_checkpoint_has_none(backend):
    """A group with prune=None must not be pruned because the checkpoint knows nothing of pruning."""
    a, b = parameters([(4, 4), (4, 4)])
    opt = fuseopt.AdamW(
        [{"params": [a]}, {"params": [b], "prune": None, "l1": 0.5, "max_grad_norm": 2.0, "ema": EMA(0.5)}],
        prune=Prune(0.5, begin=4), ema=EMA(0.9), backend=backend,
    )
    torchs = torch.optim.AdamW([{"params": [p]} for p in like([a, b])])
    run(torchs, all_params(torchs), 3)
    opt.load_state_dict(torchs.state_dict())
    first, second = opt.param_groups
    assert first["prune"]["sparsity"] == 0.5 and first["ema"][0]["decay"] == 0.9
    assert second["prune"] is None and second["l1"] == 0.5 and second["max_grad_norm"] == 2.0
    assert second["ema"][0]["decay"] == 0.5
    assert first["steps"] == 3


def test_old_checkpoints_take_defaults(backend):
    """Keys that a checkpoint lacks, as torch does it; the step count comes from the state."""
    p = parameters([(4,)])[0]
    opt = run(fuseopt.AdamW([p], backend=backend), [p], 3)
    saved = through_disk(opt.state_dict())
    for key in ("l1", "ema", "prune", "max_grad_norm", "steps", "maximize", "amsgrad"):
        saved["param_groups"][0].pop(key, None)
    saved["param_groups"][0]["betas"] = [0.9, 0.999]
    other = fuseopt.AdamW(like([p]), backend=backend)
    other.load_state_dict(saved)
    assert other.param_groups[0]["steps"] == 3
    run(opt, [p], 1, 4), run(other, all_params(other), 1, 4)
    assert_same_state(opt, other)


@pytest.mark.parametrize("way", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))), ids=("deepcopy", "pickle"))
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_copies_go_on_by_themselves(rule, way, backend):
    params = parameters([(33, 31), (7,)])
    opt = run(STAGE["everything"].build(rule, params, F32, backend=backend), params, 2)
    twin = way(opt)
    assert type(twin) is type(opt)
    before = Snapshot(opt)
    twin.grad_scale = opt.grad_scale
    run(twin, all_params(twin), 2, 3)
    before.assert_unchanged()
    run(opt, params, 2, 3)
    assert_same_state(opt, twin)
    assert opt.state[params[0]].keys() == twin.state[all_params(twin)[0]].keys()
    twin.add_param_group({"params": parameters([(3,)])})


def test_freed_without_the_garbage_collector(backend):
    p = parameters([(40, 5)])[0]
    opt = run(STAGE["everything"].build(BY_NAME["adamw"], [p], F32, backend=backend), [p], 2)
    gone = weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert gone() is None
    finally:
        gc.enable()


def through_safetensors(state_dict):
    """Tensors as safetensors, the rest, which is plain data, as JSON."""
    state = {f"{k}.{key}": x for k, entries in state_dict["state"].items() for key, x in entries.items()}
    tensors = {key: x.contiguous() for key, x in state.items() if torch.is_tensor(x)}
    rest = {key: x for key, x in state.items() if not torch.is_tensor(x)}
    text = json.dumps({"rest": rest, "param_groups": state_dict["param_groups"]})
    loaded, plain = safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(text)
    out = {"state": {}, "param_groups": plain["param_groups"]}
    for key, x in (loaded | plain["rest"]).items():
        k, name = key.split(".")
        out["state"].setdefault(int(k), {})[name] = x
    return out


def test_extras_travel_as_safetensors_and_json(backend):
    params = parameters([(6, 70), (5, 3, 2, 2)], BF16)
    options = dict(lr=0.1, backend=backend, ema=[EMA(0.9, "timm"), EMA(0.5)], prune=Prune(0.5, begin=2, end=6, every=2))
    opt = fuseopt.AdamW(params, **options)
    opt.mask(params[0], torch.arange(6)[:, None] > 1)
    run(opt, params, 3)
    copies = like(params)
    other = fuseopt.AdamW(copies, backend=backend)
    other.load_state_dict(through_safetensors(opt.state_dict()))
    run(opt, params, 4, 4), run(other, copies, 4, 4)
    assert_same_state(opt, other)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.torch_has], ids=ident)
def test_without_extras_the_keys_are_torchs(rule):
    """So that torch.distributed.checkpoint, which loads between equal keys, takes either's for the other."""
    params, others = parameters([(4, 4)]), parameters([(4, 4)])
    ours = run(rule.ours(params), params, 1).state_dict()
    torchs = run(rule.torchs(others), others, 1).state_dict()
    assert ours["state"][0].keys() == torchs["state"][0].keys() if torchs["state"] else not ours["state"]
    more = ours["param_groups"][0].keys() ^ torchs["param_groups"][0].keys()
    assert more == (set() if "step" in ours["state"].get(0, {}) else {"steps"})


@pytest.mark.parametrize("way", ("mask", "dry run", "deepcopy"))
@pytest.mark.parametrize("cls", (fuseopt.SGD, fuseopt.AdamW))
def test_state_made_early_holds_no_value(cls, way, backend):
    """A parameter whose first gradient comes late starts as it would if its state had not been made before."""
    options = {"momentum": 0.9, "dampening": 0.5} if cls is fuseopt.SGD else {}

    def train(early: bool):
        params = parameters([(8, 8), (40,)])
        opt = cls(params, lr=0.1, ema=EMA(0.9), backend=backend, **options)
        if early and way == "dry run":
            opt.param_groups[0]["lr"] = 0.0
            for p in params:
                p.grad = torch.zeros_like(p)
            opt.step()
            opt.param_groups[0]["lr"] = 0.1
            opt.zero_grad()
        elif early:
            opt.mask(params[0], element_mask(params[0]))
            opt.mask(params[0], torch.ones(8, 8, dtype=torch.bool))
            before = params[0].detach().clone()
            with opt.swap_ema():  # no update yet: the weights themselves
                assert torch.equal(params[0], before)
        for t in range(1, 6):
            set_gradients(params, t)
            if t < 3:
                params[1].grad = None
            if early and way == "deepcopy" and t == 2 and cls is fuseopt.AdamW:
                params, opt = copy.deepcopy((params, opt))
                set_gradients(params, t)
                params[1].grad = None
            opt.step()
        return opt

    assert_same_state(train(early=True), train(early=False))


OF_TORCH = {
    "average": ({"ema": EMA(0.9)}, "ema_0 start anew.*3 steps"),
    "averages": ({"ema": [EMA(0.9), EMA(0.5)]}, "ema_0, ema_1 start anew"),
    "prune": ({"prune": Prune(0.5, begin=9)}, "no weight is pruned yet.*3 steps"),
}


@pytest.mark.parametrize("options", OF_TORCH)
def test_loading_torchs_checkpoint_tells_what_starts_anew(options, backend):
    options, message = OF_TORCH[options]
    p = parameters([(8, 8)])[0]
    saved = run(torch.optim.AdamW([p]), [p], 3).state_dict()
    opt = fuseopt.AdamW([p], backend=backend, **options)
    with pytest.warns(UserWarning, match=message):
        opt.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuseopt.AdamW([p], backend=backend, **options).load_state_dict(run(opt, [p], 1).state_dict())  # has them
        fuseopt.AdamW([p], backend=backend).load_state_dict(saved)  # nothing is missed
        other = fuseopt.AdamW([p], backend=backend, **options)
        other.load_state_dict(other.state_dict())  # empty, as accelerate loads it


def test_masks_stay_when_the_checkpoint_has_none(backend):
    """torch's has none for anyone; ours may have some for others."""
    params = parameters([(8, 8), (4, 4)])
    opt = fuseopt.AdamW(params, lr=0.1, backend=backend)
    opt.mask(params[1], torch.eye(4) > 0)
    for saved in (run(torch.optim.AdamW(like(params)), [], 0).state_dict(), opt.state_dict()):
        copies = like(params)
        other = fuseopt.AdamW(copies, lr=0.1, backend=backend)
        other.mask(copies[0], element_mask(copies[0]))
        other.load_state_dict(through_disk(saved))
        run(other, copies, 2)
        kept = element_mask(params[0])
        assert_same_bits(copies[0][~kept], params[0].detach()[~kept])
        assert bool((copies[0][kept] != params[0][kept]).all())


def damaged(change):
    """A checkpoint of AdamW after two steps, changed."""
    p = parameters([(8, 8)])[0]
    opt = fuseopt.AdamW([p], ema=EMA(0.5), prune=Prune(0.5))
    opt.mask(p, element_mask(p))
    saved = through_disk(run(opt, [p], 2).state_dict())
    change(saved)
    return saved


DAMAGES = {
    "moment-shape": (lambda s: s["state"][0].update(exp_avg=torch.zeros(8, 7)), "exp_avg.*shape"),
    "average-shape": (lambda s: s["state"][0].update(ema_0=torch.zeros(3)), "ema_0.*shape"),
    "prune-mask-size": (lambda s: s["state"][0].update(prune_mask=torch.zeros(1, 8, dtype=torch.bool)), "prune_mask"),
    "prune-mask-rank": (lambda s: s["state"][0].update(prune_mask=torch.zeros(8, dtype=torch.bool)), "prune_mask"),
    "mask-size": (lambda s: s["state"][0].update(mask_keep=torch.ones(8, 2, dtype=torch.bool)), "mask_keep"),
    "mask-mode-gone": (lambda s: s["state"][0].pop("mask_freeze"), "mask_freeze"),
    "more-groups": (lambda s: s["param_groups"].append({"params": []}), "group"),
    "no-state": (lambda s: s.pop("state"), "no 'state'"),
    "no-groups": (lambda s: s.pop("param_groups"), "no 'param_groups'"),
    "no-params": (lambda s: s["param_groups"][0].pop("params"), "'params'"),
    "no-lr": (lambda s: s["param_groups"][0].pop("lr"), "lacks 'lr'"),
    "no-weight-decay": (lambda s: s["param_groups"][0].pop("weight_decay"), "lacks 'weight_decay'"),
    "one-beta": (lambda s: s["param_groups"][0].update(betas=[0.9]), "hyper-parameter"),
    "lr-text": (lambda s: s["param_groups"][0].update(lr="fast"), "hyper-parameter.*fast"),
    "steps": (lambda s: s["param_groups"][0].update(steps="x"), "steps"),
    "average-options": (lambda s: s["param_groups"][0].update(ema=[{"decay": 7}]), "decay: 7"),
    "prune-options": (lambda s: s["param_groups"][0].update(prune={"sparsity": 7}), "sparsity: 7"),
    "norm": (lambda s: s["param_groups"][0].update(max_grad_norm=-1.0), "max_grad_norm"),
    "more-parameters": (lambda s: s["param_groups"][0]["params"].append(1), "group"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_is_refused_with_nothing_changed(name, backend):
    check_refused(*DAMAGES[name], ValueError, backend)


def check_refused(change, message, error, backend):
    p = parameters([(8, 8)])[0]
    opt = run(fuseopt.AdamW([p], ema=EMA(0.9), backend=backend), [p], 1)
    before = Snapshot(opt)
    with pytest.raises(error, match=message):
        opt.load_state_dict(damaged(change))
    before.assert_unchanged()


OF_ANOTHER_TYPE = {
    "state": (lambda s: s.update(state=[]), "'state' is list"),
    "groups": (lambda s: s.update(param_groups={}), "'param_groups' is dict"),
    "group": (lambda s: s.update(param_groups=[3]), "group 0 is int"),
    "entry": (lambda s: s["state"].update({0: [1]}), "parameter 0 is list"),
    "step": (lambda s: s["state"][0].update(step="3"), "step.*str"),
    "mask": (lambda s: s["state"][0].update(mask_keep=[True]), "mask_keep.*list"),
    "moment": (lambda s: s["state"][0].update(exp_avg=[1.0]), "exp_avg.*list"),
    "average": (lambda s: s["state"][0].update(ema_0="x"), "ema_0.*str"),
    "average-options": (lambda s: s["param_groups"][0].update(ema=7), "ema: 7"),
}


@pytest.mark.parametrize("name", OF_ANOTHER_TYPE)
def test_what_is_of_another_type_is_refused_with_nothing_changed(name, backend):
    check_refused(*OF_ANOTHER_TYPE[name], TypeError, backend)


@pytest.mark.parametrize("value", (None, [], "x", 3), ids=str)
def test_what_is_no_dict_is_refused(value):
    opt = fuseopt.AdamW(parameters([(3,)]))
    with pytest.raises(TypeError, match="not a dict"):
        opt.load_state_dict(value)


@pytest.mark.parametrize("rule", [r for r in RULES if r.torch_has], ids=ident)
def test_the_step_count_follows_torchs(rule, backend):
    """torch keeps the count among the group's keys, and does not advance it."""
    params = parameters([(8, 8)])
    ours = run(rule.ours(params, backend=backend), params, 2)
    torchs = go_on(rule.torchs, params, through_disk(ours.state_dict()))
    run(torchs, all_params(torchs), 3, 3)
    back = go_on(lambda p: rule.ours(p, backend=backend), all_params(torchs), through_disk(torchs.state_dict()))
    assert back.param_groups[0]["steps"] == (5 if ours.counters(ours.param_groups[0]) else 2)  # SGD counts nowhere


@pytest.mark.parametrize("mid_run", (False, True))
def test_a_reused_group_starts_at_the_optimizers_own_count(mid_run, backend):
    p, q = parameters([(8, 8), (8, 8)])
    group = {"params": [p]}
    run(fuseopt.AdamW([group], ema=EMA(0.5), backend=backend), [p], 5)
    assert group["steps"] == 5
    if mid_run:
        opt = run(fuseopt.AdamW([q], ema=EMA(0.5), backend=backend), [q], 2)
        opt.add_param_group(group)
        assert [g["steps"] for g in opt.param_groups] == [2, 2]
    else:
        opt = fuseopt.AdamW([group], ema=EMA(0.5), prune=Prune(0.5), backend=backend)
        assert opt.param_groups[0]["steps"] == 0


@pytest.mark.parametrize("saved", ({}, {"ema": EMA(0.25), "prune": Prune(0.25, begin=7)}), ids=("without", "with"))
def test_options_that_a_checkpoint_has_not_stay(saved, backend):
    params = parameters([(8, 8)])
    first = run(fuseopt.AdamW(params, lr=0.5, max_grad_norm=1.0, backend=backend, **saved), params, 2)
    opt = fuseopt.AdamW(like(params), lr=0.1, ema=EMA(0.75), prune=Prune(0.5, begin=4), l1=1e-6, backend=backend)
    opt.load_state_dict(through_disk(first.state_dict()))
    group = opt.param_groups[0]
    assert (group["lr"], group["max_grad_norm"], group["l1"], group["steps"]) == (0.5, 1.0, 1e-6, 2)
    assert group["ema"][0]["decay"] == (0.25 if saved else 0.75)
    assert group["prune"]["sparsity"] == (0.25 if saved else 0.5)
    run(opt, all_params(opt), 2, 3)
    assert int((all_params(opt)[0] == 0).sum()) == (0 if saved else 32)
    with opt.swap_ema():
        pass


def test_a_new_rules_state_is_known(backend, monkeypatch):
    class Other(fuseopt.Lion):
        @staticmethod
        def slots(group):
            return ("velocity",)

    monkeypatch.setattr(rules, "ALL", (*rules.ALL, Other))
    p = parameters([(8, 8)])
    saved = run(fuseopt.Lion(p, backend=backend), p, 1).state_dict()
    saved["state"][0] = {"velocity": saved["state"][0]["exp_avg"]}
    with pytest.raises(ValueError, match="velocity.*another optimizer"):
        fuseopt.Lion(like(p), backend=backend).load_state_dict(saved)


FOREIGN = [
    (a, b) for a in ("adamw", "sgd-momentum", "adagrad", "lion") for b in ("adamw", "sgd-momentum", "adagrad", "lion") if a != b
]


@pytest.mark.parametrize(("saved", "loader"), FOREIGN)
def test_another_optimizers_checkpoint_is_refused(saved, loader, backend):
    """Where moments would be missing. (Lion's exp_avg is among AdamW's, but not the other way round.)"""
    p = parameters([(8, 8)])[0]
    other = run(BY_NAME[saved].ours([p], backend=backend), [p], 2).state_dict()
    q = like([p])
    opt = run(BY_NAME[loader].ours(q, backend=backend), q, 1)
    before = Snapshot(opt)
    if (saved, loader) == ("adamw", "lion"):
        pytest.skip("AdamW's state holds all that Lion needs")
    with pytest.raises(ValueError, match="(state|lacks).*another optimizer"):
        opt.load_state_dict(other)
    before.assert_unchanged()


def test_masks_that_were_written_into_the_state_as_booleans_are_saved_again():
    """ZeroRedundancyOptimizer writes a checkpoint's entries itself; it may be saved again before the next step."""
    p = torch.nn.Parameter(torch.ones(4, 3))
    opt = fuseopt.AdamW([p])
    opt.mask(p, torch.arange(4)[:, None] > 0)
    saved = opt.state_dict()
    opt.state[p] = dict(saved["state"][0])
    again = opt.state_dict()["state"][0]
    assert again.keys() == saved["state"][0].keys() and torch.equal(again["mask_keep"], saved["state"][0]["mask_keep"])


@pytest.mark.parametrize("how", ("file", "deepcopy", "pickle"))
def test_what_was_made_before_the_first_step_is_still_without_a_value(how, backend):
    """A mask makes the whole state; the first momentum buffer is the gradient undamped all the same."""
    options = {"lr": 1.0, "momentum": 0.9, "dampening": 0.25, "backend": backend}
    p = torch.nn.Parameter(torch.zeros(3))
    opt = fuseopt.SGD([p], **options)
    opt.mask(p, torch.tensor([True, True, False]))
    if how == "file":
        other = fuseopt.SGD([p], **options)
        other.load_state_dict(through_disk(opt.state_dict()))
    else:
        other = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
        (p,) = other.param_groups[0]["params"]
    p.grad = torch.ones(3)
    other.step()
    assert p.tolist() == [-1, -1, 0]
