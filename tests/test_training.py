"""What surrounds an optimizer in training, against torch's classes: every scheduler, swa_utils, parameters and
gradients in any layout, storage that moves, gradients that come and go, torch.compile.
"""

import copy
import inspect
import warnings
from functools import partial

import pytest
import torch
from cases import all_params, assert_close, assert_same_bits, gradient, like, parameters, run, set_gradients
from torch.optim import lr_scheduler as schedules
from torch.optim import swa_utils
from torchs import CLASSES, INFOS, LOOSE, VECTORS, assert_agree, exact, ours, theirs

import fuseopt
from fuseopt import EMA

# ---- schedulers and averages ------------------------------------------------------------------------

SCHEDULES = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: schedules.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 5], gamma=0.3),
    "ConstantLR": lambda o: schedules.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: schedules.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, T_max=6, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.001, 0.1, step_size_up=3),  # cycles momentum or betas
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=12),  # and so does this
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.1, 3), schedules.ExponentialLR(o, 0.8)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler([schedules.StepLR(o, 2), schedules.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.005, anneal_epochs=4),
}


def advance(schedule, t: int) -> None:
    schedule.step(1.0) if isinstance(schedule, schedules.ReduceLROnPlateau) else schedule.step()


def test_every_scheduler_of_torch_is_in_the_table():
    kinds = {name for name, cls in vars(schedules).items() if inspect.isclass(cls) and issubclass(cls, schedules.LRScheduler)}
    assert kinds - {"LRScheduler", "_LRScheduler"} <= SCHEDULES.keys()


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("tensor", (False, True), ids=("number", "tensor"))
def test_schedulers(kind, name, tensor, backend):
    """lr, momentum and betas that are written between steps; two groups, each with its own lr."""
    more = {"momentum": 0.9} if name == "SGD" else {}
    takes = inspect.signature(getattr(torch.optim, name)).parameters.keys()
    if kind in ("CyclicLR", "OneCycleLR") and not takes & {"momentum", "betas"}:
        pytest.skip("it has neither momentum nor betas to cycle, in torch either")
    lr = lambda x: torch.tensor(x) if tensor else x
    params = parameters(VECTORS)
    twins = like(params)
    pair = [
        make(name, [{"params": x[:2]}, {"params": x[2:], "lr": lr(0.02)}], lr=lr(0.05), **more, **extra)
        for make, x, extra in ((ours, params, {"backend": backend}), (theirs, twins, {}))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that step() was never called, as for a wrapper it cannot see
        warnings.filterwarnings("ignore", message="The epoch parameter|.*deprecated")
        chosen = [SCHEDULES[kind](opt) for opt in pair]
        for t in range(1, 11):
            for opt, x, schedule in zip(pair, (params, twins), chosen, strict=True):
                run(opt, x, 1, t)
                advance(schedule, t)
            for g, h in zip(*(opt.param_groups for opt in pair), strict=True):
                assert all(g[k] == h[k] for k in ("lr", "betas", "momentum") if k in h)
    assert_agree(*pair, exact(name, backend))


@pytest.mark.parametrize("name", CLASSES)
def test_the_schedulers_torch_tests_it_with(name, backend):
    for makers in INFOS[name].scheduler_inputs:
        params = parameters(VECTORS)
        twins = like(params)
        a, b = ours(name, params, lr=0.01, backend=backend), theirs(name, twins, lr=0.01)
        chains = [[make(opt) for make in makers] for opt in (a, b)]
        for t in range(1, 13):
            run(a, params, 1, t), run(b, twins, 1, t)
            for schedule in (s for chain in chains for s in chain):
                advance(schedule, t)
        assert_agree(a, b, exact(name, backend))


def test_swa_utils(backend):
    """AveragedModel, SWALR and update_bn around ours and torch's; the average equals an EMA of ours."""
    x = [torch.randn(8, 16, generator=torch.Generator().manual_seed(t)) for t in range(6)]
    torch.manual_seed(0)
    # No bias before the normalisation: its gradient is zero but for rounding, which Adam would enlarge.
    start = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 1))
    ends = []
    for make in (partial(ours, backend=backend, ema=EMA(0.9)), theirs):
        model = copy.deepcopy(start)
        opt = make("AdamW", model.parameters(), lr=0.01)
        mean = swa_utils.AveragedModel(model)
        moving = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        schedule = swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=3)
        for batch in x:
            opt.zero_grad()
            model(batch).square().mean().backward()
            opt.step()
            mean.update_parameters(model), moving.update_parameters(model)
            schedule.step()
        swa_utils.update_bn(x, mean)
        ends.append((opt, [*mean.state_dict().values()], moving))
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert_close(a, b, LOOSE)
    opt, _, moving = ends[0]
    for p, q in zip(all_params(opt), moving.module.parameters(), strict=True):
        assert_close(opt.state[p]["ema_0"], q, LOOSE)


# ---- memory -------------------------------------------------------------------------------------------

LAYOUTS = {
    "channels-last": lambda x: x.view(4, 2, 8, 8).contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.view(16, 32).t(),
    "slice": lambda x: torch.zeros(16, 64)[:, ::2].copy_(x.view(16, 32)),
    "part-of-a-buffer": lambda x: torch.zeros(515)[1:513].copy_(x),  # aligned to 4 bytes only
    "number": lambda x: x[0],
    "empty": lambda x: x[:0].view(0, 3),
    "one": lambda x: x[:1].view(1, 1, 1),
}
GRADIENTS = {
    "row-major": lambda g: g.contiguous(),
    "like": lambda g: g,
    "reversed": lambda g: g.mT.contiguous().mT if g.dim() > 1 else g,
    "strided": lambda g: torch.zeros(*g.shape, 2)[..., 0].copy_(g),
    "expanded": lambda g: g.flatten()[0].expand(g.shape) if g.numel() else g,
    "zero": torch.zeros_like,
    "in-a-bucket": lambda g: torch.zeros(g.numel() + 3)[1:-2].view(g.shape).copy_(g),  # aligned to 4 bytes only
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CLASSES)
def test_layouts_against_torchs_loop(name, layout, kind, backend):
    """Not against its fused kernel, which reads gradients in the order of memory and errs."""
    (start,) = parameters([(512,)])
    p, q = (torch.nn.Parameter(LAYOUTS[layout](start.detach().clone())) for _ in range(2))
    more = {"weight_decay": 0.1, "maximize": True, **({"momentum": 0.9} if name == "SGD" else {})}
    a, b = ours(name, [p], backend=backend, **more), theirs(name, [q], fused=False, **more)
    for t in range(1, 5):
        p.grad = GRADIENTS[kind](gradient(p, 0, t))
        q.grad = p.grad.clone()
        a.step(), b.step()
    assert_agree(a, b, False)
    assert p.stride() == q.stride()


MOVES = {
    "data": lambda p: setattr(p, "data", p.data.clone()),
    "format": lambda p: setattr(p, "data", p.data.t().contiguous().t() if p.is_contiguous() else p.data.contiguous()),
    "set_": lambda p: p.set_(p.detach().clone()),
    "resize": lambda p: p.data.untyped_storage().resize_(p.data.untyped_storage().nbytes() * 4),
    "slice": lambda p: setattr(p, "data", torch.zeros(16, 64)[:, ::2].copy_(p.data)),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", CLASSES)
def test_storage_that_changes_between_steps(name, move, backend):
    params, twins = parameters([(16, 32), (64,)]), parameters([(16, 32), (64,)])
    a, b = ours(name, params, backend=backend), theirs(name, twins)
    for t in range(1, 6):
        if t > 1:
            with torch.no_grad():
                MOVES[move](params[0])
        run(a, params, 1, t), run(b, twins, 1, t)
    assert_agree(a, b, exact(name, backend))


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_that_come_and_go(name, backend):
    """None, zero and empty gradients; a parameter is stepped, and its version bumped, if it has one."""
    shapes = [(16,), (0, 4), (32,), (64,)]
    params, twins = parameters(shapes), parameters(shapes)
    a, b = ours(name, params, backend=backend), theirs(name, twins)
    for t in range(1, 8):
        set_gradients(params, t), set_gradients(twins, t)
        for x in (params, twins):
            x[0].grad = None if t % 2 else x[0].grad
            x[2].grad.zero_()
            x[3].grad = None
        versions = [p._version for p in params]
        a.step(), b.step()
        moved = [p._version > v for p, v in zip(params, versions, strict=True)]
        assert [moved[0], moved[2], moved[3]] == [t % 2 == 0, True, False]
        assert_agree(a, b, exact(name, backend))
    assert params[3] not in a.state or name == "Adagrad"  # which makes its state at once, in torch too


def test_tied_weights(backend):
    """One parameter in two places of a model: stepped once, with the sum of its gradients."""
    models, x = [], torch.randint(0, 16, (8,))
    for make in (partial(ours, backend=backend), theirs):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16, bias=False))
        model[2].weight = model[0].weight
        opt = make("AdamW", model.parameters(), lr=0.01)
        for _ in range(4):
            opt.zero_grad()
            model(x).logsumexp(1).mean().backward()
            opt.step()
        models.append(opt)
    assert len(all_params(models[0])) == 1
    assert_agree(*models, exact("AdamW", backend))


# ---- the loss scale -------------------------------------------------------------------------------------


class Readers(torch.utils._python_dispatch.TorchDispatchMode):
    """The torch operations within the block that read one of some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.addresses, self.found = {t.data_ptr() for t in tensors}, []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        for x in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and x.numel() > 1 and x.data_ptr() in self.addresses:
                self.found.append(f)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("found_inf", (0.0, 1.0, 2.0, float("nan")))
@pytest.mark.parametrize("name", CLASSES)
def test_the_loss_scale_costs_no_look_at_the_gradients(name, found_inf, native):
    """grad_scale and found_inf count within the pass: torch reads no gradient, and none is written."""
    params, twins = parameters(VECTORS), parameters(VECTORS)
    a, b = (ours(name, x, backend="cpu", max_grad_norm=1.0) for x in (params, twins))
    for t in (1, 2, 3):
        set_gradients(params, t, 8.0), set_gradients(twins, t)
        a.grad_scale, a.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
        kept = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
        with Readers([p.grad for p in params]) as readers:
            a.step()
        assert not readers.found
        for p, (grad, value, version) in zip(params, kept, strict=True):
            assert p.grad is grad and grad._version == version and torch.equal(grad, value)
        if not found_inf:
            b.step()
    assert_agree(a, b, True)
    assert a.param_groups[0]["steps"] == (0 if found_inf else 3)


# ---- torch.compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ("model", "step", "method", "loop"))
def test_compiled(what, backend):
    """Around the model, around the step, around both. A step breaks the graph once and is not traced."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    x = torch.randn(5, 8)
    results = []
    for compiled in (True, False):
        compile_ = partial(torch.compile, backend="eager") if compiled else lambda f: f
        model = copy.deepcopy(start)
        opt = ours("AdamW", model.parameters(), lr=torch.tensor(0.01), ema=EMA(0.9), max_grad_norm=1.0, backend=backend)
        schedule = schedules.CosineAnnealingLR(opt, 10)
        forward = compile_(model) if what == "model" else model
        step = compile_(opt.step) if what == "method" else compile_(lambda opt=opt: opt.step()) if what == "step" else opt.step

        def train(model=forward, step=step, opt=opt):
            opt.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            step()
            return loss

        train = compile_(train) if what == "loop" else train
        losses = []
        for _ in range(12):  # more than dynamo recompiles for: a value that is traced would show
            losses.append(float(train().detach()))
            schedule.step()
        results.append((opt, losses))
    (a, losses), (b, others) = results
    assert losses == pytest.approx(others, rel=1e-6)
    assert_agree(a, b, False)
    assert a.param_groups[0]["steps"] == 12
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert any("FusedOptimizer.step" in reason for reason in breaks) == (what != "model")
    expected = ("FusedOptimizer.step", "Optimizer.zero_grad", "Tensor.backward")
    assert all(any(name in reason for name in expected) for reason in breaks), "dynamo looked into a step"


@pytest.mark.parametrize("options", ({}, {"prune": fuseopt.Prune(0.5), "max_grad_norm": 1.0, "statistics": True}))
def test_the_default_device_of_torch_is_not_asked(options, backend):
    """Parameters on the CPU are stepped as they are without it; so is torch's."""
    ours, plain = parameters([(8, 8), (5,)]), parameters([(8, 8), (5,)])
    a, b = (fuseopt.AdamW(params, lr=0.1, backend=backend, **options) for params in (ours, plain))
    for t in (1, 2):
        set_gradients(ours, t), set_gradients(plain, t)
        with torch.device("meta"):
            a.step()
        b.step()
    for p, q in zip(ours, plain, strict=True):
        assert_same_bits(p, q)
        assert a.state[p]["step"] == b.state[q]["step"]
