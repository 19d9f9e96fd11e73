"""What the CUDA backend adds to a step: scalars on the GPU, GradScaler without waiting, graphs, bad input.

The kernels run on the CPU; tests/test_rules.py, test_stages.py and others run their cases on them too.
"""

import copy
import ctypes
import pickle

import emulated
import pytest
import torch
from cases import (
    BY_NAME,
    all_params,
    assert_same_bits,
    assert_same_state,
    ident,
    like,
    parameters,
    run,
    set_gradients,
)

import fuseopt
from fuseopt import EMA, Prune, cpu, cuda

pytestmark = pytest.mark.skipif(bool(emulated.why_not or cpu.native_error()), reason=str(emulated.why_not))

SHAPES = [(40, 33), (5,), (70, 70)]
EVERYTHING = {"max_grad_norm": 0.7, "l1": 0.01, "weight_decay": 0.1, "ema": [EMA(0.9), EMA(0.999, warmup="timm", start=2, every=2)],
              "prune": Prune(threshold=0.05, begin=2)}
RULES = [BY_NAME[name] for name in ("adamw-amsgrad-maximize", "sgd-momentum", "nadam", "adagrad", "lion")]


def pair(rule, **options):
    """The same optimizer on the CPU and on CUDA."""
    a = parameters(SHAPES)
    b = like(a)
    return [rule.ours(params, backend=name, **options) for name, params in (("cpu", a), ("cuda", b))]


def infinite(value: float) -> torch.Tensor:
    return torch.tensor(value)


def snapshot(opt):
    return copy.deepcopy([(p.detach(), opt.state.get(p, {})) for p in all_params(opt)])


def assert_unchanged(opt, before) -> None:
    for p, (old, state) in zip(all_params(opt), before, strict=True):
        assert_same_bits(p, old)
        for key, value in state.items():
            assert_same_bits(opt.state[p][key], value, key) if isinstance(value, torch.Tensor) else None


# ---- GradScaler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_a_scaler_is_followed_without_reading_it(rule, monkeypatch):
    """Whether a step counts is decided by the kernels; state, counts and schedules agree with the CPU's."""
    on_cpu, on_gpu = pair(rule, **EVERYTHING)
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "__float__", None)
    monkeypatch.setattr(torch.Tensor, "__bool__", torch.Tensor.__bool__)
    infinities = [2.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    for t, found in enumerate(infinities, 1):
        set_gradients(all_params(on_gpu), t, 8.0)
        on_gpu.found_inf, on_gpu.grad_scale = infinite(found), torch.tensor(8.0)
        on_gpu.step()
    monkeypatch.undo()
    for t, found in enumerate(infinities, 1):
        set_gradients(all_params(on_cpu), t, 8.0)
        on_cpu.found_inf, on_cpu.grad_scale = infinite(found), torch.tensor(8.0)
        on_cpu.step()
    saved = on_gpu.state_dict()
    assert saved["param_groups"][0]["steps"] == infinities.count(0.0) == on_cpu.param_groups[0]["steps"]
    assert_same_state(on_cpu, on_gpu)
    with on_cpu.swap_ema(1), on_gpu.swap_ema(1):
        for p, q in zip(all_params(on_cpu), all_params(on_gpu), strict=True):
            assert_same_bits(p, q)


def test_torchs_scaler_drives_it():
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(params, lr=0.1, backend="cuda")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    before = snapshot(opt)
    for bad in (True, False):
        loss = sum((p**2).sum() for p in params) * (float("inf") if bad else 1.0)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        if bad:
            assert_unchanged(opt, before)
    assert opt.state_dict()["param_groups"][0].get("steps", 1) == 1
    assert all(opt.state[p]["step"] == 1 and (p != old).any() for p, (old, _) in zip(params, before, strict=True))


@pytest.mark.parametrize("more", [{"prune": Prune(0.5, begin=1, end=3)}, {}], ids=["schedule", "buffers"])
def test_what_python_decides_by_the_step_reads_the_scaler(more):
    """A schedule of pruning, or averages of buffers, must know whether a step counts."""
    on_cpu, on_gpu = pair(BY_NAME["adamw"], ema=EMA(0.5), **more)
    models = [torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)]
    for opt, model in zip((on_cpu, on_gpu), models, strict=True):
        if not more:
            opt.average_buffers(model)
        for t, found in enumerate([1.0, 0.0, 0.0, 1.0, 0.0], 1):
            model.running_mean.fill_(t)
            set_gradients(all_params(opt), t)
            opt.found_inf = torch.tensor(found)
            opt.step()
    assert_same_state(on_cpu, on_gpu)
    a, b = (opt.state_dict()["param_groups"][0] for opt in (on_cpu, on_gpu))
    assert a["steps"] == b["steps"] == 3
    if not more:
        assert torch.equal(*(g["ema_buffers"]["ema_0"]["values"]["running_mean"] for g in (a, b)))


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_a_run_that_began_with_an_overflow_is_saved_and_goes_on(rule):
    on_cpu, on_gpu = pair(rule, ema=EMA(0.9, start=1))
    for opt in (on_cpu, on_gpu):
        opt.found_inf = torch.tensor(1.0)
        run(opt, all_params(opt), 1)
    fresh = rule.ours(like(all_params(on_gpu)), ema=EMA(0.9, start=1), backend="cuda")
    fresh.load_state_dict(copy.deepcopy(on_gpu.state_dict()))
    for opt in (on_cpu, on_gpu, fresh):
        opt.found_inf = torch.tensor(0.0)
        run(opt, all_params(opt), 3, first=2)
    assert_same_state(on_cpu, on_gpu)
    assert_same_state(on_cpu, fresh)


# ---- a learning rate in a tensor ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ident)
@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_a_learning_rate_on_the_gpu_is_read_there(rule, dtype, monkeypatch):
    lr = torch.tensor(0.0, dtype=dtype)
    a = parameters(SHAPES)
    b = like(a)
    options = {key: value for key, value in rule.options.items() if key != "lr"}
    on_gpu = rule.cls(b, lr=lr, backend="cuda", l1=0.01, **options)
    on_cpu = rule.cls(a, lr=0.5, backend="cpu", l1=0.01, **options)
    for t in (1, 2, 3):
        lr.fill_(0.1 / t)
        on_cpu.param_groups[0]["lr"] = float(lr)
        run(on_cpu, a, 1, first=t)
        set_gradients(b, t)
        with monkeypatch.context() as patch:
            if t > 1:
                patch.setattr(torch.Tensor, "__float__", None)
            on_gpu.step()
    assert on_gpu.param_groups[0]["lr"] is lr
    assert_same_state(on_cpu, on_gpu)


# ---- graphs -----------------------------------------------------------------------------------------


class Graph:
    """What a CUDA graph does: the launches of one step, with the arguments that they had."""

    def __init__(self, opt, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "capturing", lambda: True)
            calls = []
            arguments = cuda.arguments
            patch.setattr(cuda, "arguments", lambda *a: calls.append((a[1], arguments(*a))) or calls[-1][1])
            opt.step()
        (self.table, self.arguments), = calls
        self.specs = [cuda.spec(gs, gs.group["params"], gs.slots, gs.counters, gs.averages()) for gs in self.step_of(opt)]
        self.opt = opt

    @staticmethod
    def step_of(opt):
        return fuseopt.plan.Step(opt, 1, 1.0, "cuda").groups

    def replay(self):
        table = cuda.native.TensorTable()
        assert not table.gather(self.specs, self.opt.state, {}, 1.0, -1)
        table.run(*self.arguments)


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_a_replayed_step_counts_decays_and_averages_on(rule, monkeypatch):
    on_cpu, on_gpu = pair(rule, **EVERYTHING)
    params = all_params(on_gpu)
    for group in on_gpu.param_groups:
        group["capturable"] = True
    run(on_gpu, params, 2)
    set_gradients(params, 3)
    graph = Graph(on_gpu, monkeypatch)  # the emulation runs what a GPU would only record
    for t in (4, 5, 6):
        for k, p in enumerate(params):
            p.grad.copy_(_gradient(p, k, t))
        graph.replay()
    run(on_cpu, all_params(on_cpu), 6)
    assert on_gpu.state_dict()["param_groups"][0]["steps"] == 6
    assert_same_state(on_cpu, on_gpu)
    run(on_cpu, all_params(on_cpu), 2, first=7)
    run(on_gpu, params, 2, first=7)  # and eager again
    assert_same_state(on_cpu, on_gpu)


def _gradient(p, k, t):
    from cases import gradient

    return gradient(p, k, t)


def test_a_capture_that_cannot_be_is_refused(monkeypatch):
    params = parameters(SHAPES)
    set_gradients(params, 1)

    def refused(match, **options):
        opt = fuseopt.AdamW(params, lr=0.1, backend="cuda", **options)
        warm = options.pop("warm", True)
        if warm and match != "take a step":
            opt.step()
        before = snapshot(opt)
        with monkeypatch.context() as patch:
            patch.setattr(cuda, "capturing", lambda: True)
            with pytest.raises(RuntimeError, match=match):
                opt.step()
        assert_unchanged(opt, before)

    refused("capturable")
    refused("take a step", capturable=True)
    refused("schedule of pruning", capturable=True, prune=Prune(0.5, begin=5, end=9))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_other_backends_cannot_be_captured(name, monkeypatch):
    params = parameters([(3,)])
    opt = fuseopt.AdamW(params, backend=name)
    set_gradients(params, 1)
    monkeypatch.setattr(cuda, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot be; use 'cuda'"):
        opt.step()
    assert not opt.state


def test_new_gradients_or_parameters_need_no_new_memory_in_a_capture(monkeypatch):
    """One that had no gradient in the warm-up is refused, with nothing changed."""
    params = parameters(SHAPES)
    set_gradients(params[:2], 1)
    opt = fuseopt.AdamW(params, lr=0.1, capturable=True, backend="cuda")
    opt.step()
    set_gradients(params, 2)
    before = snapshot(opt)
    monkeypatch.setattr(cuda, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="take a step"):
        opt.step()
    assert_unchanged(opt, before)


# ---- steady steps -------------------------------------------------------------------------------------


def test_a_steady_step_allocates_nothing_and_reads_nothing(monkeypatch):
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(params, lr=0.1, backend="cuda", **{**EVERYTHING, "statistics": True})
    run(opt, params, 2)
    set_gradients(params, 3)
    for name in ("zeros", "empty", "full_like", "empty_like", "tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, None)
    for name in ("item", "__float__", "__bool__", "cpu", "tolist", "clone"):
        monkeypatch.setattr(torch.Tensor, name, None)
    opt.step()
    monkeypatch.undo()
    assert opt.statistics()["zeros"] > 0


@pytest.mark.parametrize("tensors, launches", [(1, 3), (300, 3), (1000, 6)])
def test_a_step_is_three_launches(tensors, launches):
    """The norm, the scalars, the update; more only when a launch's table is full: of 500 rows or so with an average."""
    counter = ctypes.c_int.in_dll(ctypes.CDLL(cuda.native.__file__), "emulated_launches")
    params = parameters([(5,)] * tensors)
    opt = fuseopt.AdamW(params, lr=0.1, max_grad_norm=0.5, ema=EMA(0.9), statistics=True, backend="cuda")
    run(opt, params, 1)
    before = counter.value
    run(opt, params, 1, first=2)
    assert counter.value - before == launches == sum(row["launches"] for row in opt.explain().launches)


def test_statistics_are_of_the_last_step_when_they_are_read():
    on_cpu, on_gpu = pair(BY_NAME["adamw"], statistics=True, max_grad_norm=0.5)
    for opt in (on_cpu, on_gpu):
        run(opt, all_params(opt), 3)
    assert dict(on_cpu.statistics()) == dict(on_gpu.statistics())


def test_memory_grows_with_the_parameters_and_counts_go_on():
    on_cpu, on_gpu = pair(BY_NAME["sgd-momentum"], ema=EMA(0.9))
    for opt in (on_cpu, on_gpu):
        run(opt, all_params(opt), 2)
        opt.add_param_group({"params": parameters([(9000,), (3,)], seed=5)})
        run(opt, all_params(opt), 2, first=3)
    assert_same_state(on_cpu, on_gpu)


def test_steps_on_other_gradients_share_one_memory():
    """Few large tensors and many small ones in turn: after one of each nothing is allocated any more."""
    params = parameters([(3,)] * 40 + [(200_000,)])
    opt = fuseopt.AdamW(params, lr=0.1, max_grad_norm=0.5, statistics=True, backend="cuda")
    seen = []
    for t in range(1, 7):
        set_gradients(params, t)
        for p in params[:40] if t % 2 else params[40:]:
            p.grad = None
        opt.step()
        seen.append((opt._memory.addresses, len(opt._memory.outgrown)))
    assert len(set(seen[1:])) == 1


@pytest.mark.parametrize("groups", [[{"params": []}], [{"params": []}, {"params": [], "lr": 0.1}]], ids=["one", "two"])
def test_nothing_to_step(groups, backend):
    opt = fuseopt.AdamW(groups, max_grad_norm=1.0, statistics=True, ema=EMA(0.9), backend=backend)
    opt.step()
    assert opt.state_dict()["state"] == {} and opt.statistics()["grad_norm"] == 0


def test_the_same_state_goes_from_one_backend_to_the_other():
    on_cpu, on_gpu = pair(BY_NAME["adamw"], **EVERYTHING)
    for opt in (on_cpu, on_gpu):
        run(opt, all_params(opt), 3)
    there, back = (
        BY_NAME["adamw"].ours(like(all_params(on_cpu)), backend=name, **EVERYTHING) for name in ("cuda", "cpu")
    )
    there.load_state_dict(copy.deepcopy(on_cpu.state_dict()))
    back.load_state_dict(copy.deepcopy(on_gpu.state_dict()))
    third = pickle.loads(pickle.dumps(on_gpu))
    for opt in (on_cpu, there, back, third):
        run(opt, all_params(opt), 3, first=4)
        assert_same_state(on_cpu, opt)


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_parameters_that_share_memory_or_state_follow_each_other(rule):
    base = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    opts = []
    for name in ("cpu", "cuda"):
        memory = base.clone()
        parts = [torch.nn.Parameter(memory[:30]), torch.nn.Parameter(memory[20:])]
        opts.append(rule.ours(parts, backend=name, max_grad_norm=0.5))
        run(opts[-1], parts, 3)
    assert_same_state(*opts)


# ---- bad input --------------------------------------------------------------------------------------


def test_without_a_driver_or_module_it_says_so():
    real = emulated.REAL
    assert "CUDA" in real["unavailable"]()  # this torch, or this machine, has none
    with pytest.raises(ValueError, match="Invalid backend: 'cudo'"):
        fuseopt.AdamW(parameters([(3,)]), backend="cudo")


def test_an_unavailable_backend_is_refused_before_the_parameters_are_looked_at(monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: "there is no NVIDIA driver")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: there is no NVIDIA driver"):
        fuseopt.AdamW([], backend="cuda")


@pytest.mark.parametrize("capability, fits", [((6, 1), False), ((7, 5), True), ((7, 0), False), ((8, 9), True), ((9, 0), True),
                                              ((10, 3), True), ((11, 0), False), ((12, 1), True), ((13, 0), True)])  # fmt: skip
def test_a_gpu_without_code_is_told_what_to_install(capability, fits, monkeypatch):
    monkeypatch.setattr(cuda, "native", type("M", (), {"architectures": staticmethod(lambda: [75, 80, 90, 100, 120, -120])}))
    found = cuda._without_code(capability)
    assert (found is None) == fits
    if not fits:
        assert "FUSEOPT_CUDA_ARCHS={}{}".format(*capability) in found


def test_an_unfit_gpu_changes_nothing(monkeypatch):
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(params, backend="cuda")
    set_gradients(params, 1)
    before = snapshot(opt)
    monkeypatch.setattr(cuda, "unfit", lambda device: "no machine code")
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 on cpu: no machine code"):
        opt.step()
    assert_unchanged(opt, before)
    assert not opt.state


def test_parameters_elsewhere_are_refused(monkeypatch):
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, device="meta"))]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = fuseopt.AdamW(params, backend="cuda")
    with pytest.raises(ValueError, match="is on meta, parameter 0 of group 0 on cpu; give each device an optimizer"):
        opt.step()
    assert not opt.state and not params[0].any()
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    with pytest.raises(ValueError, match="is on cpu and backend='cuda' was asked for"):
        opt.step()


def test_momentum_goes_on_under_a_scaler_where_another_parameter_is_late():
    a = parameters(SHAPES)
    b = like(a)
    opts = [fuseopt.SGD(ps, lr=0.1, momentum=0.9, backend=name) for ps, name in ((a, "cpu"), (b, "cuda"))]
    for t in range(1, 5):
        for opt in opts:
            if t == 1:
                opt.mask(all_params(opt)[1], torch.ones(5, dtype=torch.bool))  # makes moments without a value
            set_gradients(all_params(opt), t)
            if t < 3:
                all_params(opt)[2].grad = None
            opt.found_inf = infinite(0.0)
            opt.step()
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)


def test_an_average_that_no_step_filled_is_no_value():
    opts = pair(BY_NAME["adamw"], ema=EMA(0.9, start=1))
    for opt in opts:
        set_gradients(all_params(opt), 1)
        late = all_params(opt)[1]
        gradient, late.grad = late.grad, None
        opt.found_inf = infinite(1.0)
        opt.step()
        late.grad, opt.found_inf = gradient, None
        opt.step()
        with opt.swap_ema():
            assert not any(p.isnan().any() for p in all_params(opt))


def test_replays_after_a_checkpoint_are_counted(monkeypatch):
    opt = pair(BY_NAME["sgd-momentum"], ema=EMA(0.9))[1]
    set_gradients(all_params(opt), 1)
    opt.step()
    monkeypatch.setattr(cuda, "capturing", lambda: True)
    opt.step()
    monkeypatch.setattr(cuda, "capturing", lambda: False)
    for steps in (3, 4):
        opt._memory.control[0] += 1  # as a replay does
        assert opt.state_dict()["param_groups"][0]["steps"] == steps


def test_parameters_may_move_to_the_cpu():
    p = torch.nn.Parameter(torch.ones(3))
    opt = fuseopt.SGD([p], lr=0.1, backend="cuda")
    p.grad = torch.ones(3)
    opt.step()
    opt.defaults["backend"] = "cpu"
    opt.step()
    assert torch.allclose(p, torch.tensor(0.8))


def test_a_parameter_with_gaps_that_is_listed_twice():
    results = []
    for name in ("cpu", "cuda"):
        p = torch.ones(10, 10)[:, ::2].requires_grad_()
        with pytest.warns(UserWarning):
            opt = fuseopt.SGD([p, p], lr=0.1, momentum=0.9, backend=name)
        for t in range(1, 4):
            p.grad = torch.full_like(p, t)
            opt.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_a_capture_where_processes_sum_up_is_refused(monkeypatch):
    _, opt = pair(BY_NAME["adamw"], max_grad_norm=1.0, capturable=True)
    set_gradients(all_params(opt), 1)
    opt.step()
    opt.defaults["sharded"] = True  # as though it had been given
    monkeypatch.setattr(cuda, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="processes"):
        opt.step()


def test_a_driver_too_old_for_the_module_is_told(monkeypatch):
    class Old:
        driver = staticmethod(lambda: "CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(cuda, "unavailable", emulated.REAL["unavailable"])
    monkeypatch.setattr(cuda, "native", Old)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="insufficient"):
        fuseopt.AdamW([torch.nn.Parameter(torch.ones(3))], backend="cuda")


def test_a_skipped_step_changes_no_statistics():
    """Neither where the step had other gradients, nor where it is the first."""
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(params, lr=0.1, statistics=True, backend="cuda")

    def step(t, found, left_out=()):
        set_gradients(params, t)
        for k in left_out:
            params[k].grad = None
        opt.found_inf = torch.tensor(found)
        opt.step()

    step(1, 1.0)
    with pytest.raises(RuntimeError, match="skipped"):
        dict(opt.statistics())
    step(2, 0.0)
    seen, unread = dict(opt.statistics()), opt.statistics()
    step(3, 1.0, left_out=[0])
    after_it = opt.statistics()
    assert dict(opt.statistics()) == seen
    step(3, 0.0, left_out=[0])
    step(3, 1.0, left_out=[0])  # nobody asked in between
    assert dict(opt.statistics()) != seen
    step(4, 0.0, left_out=[0])
    assert dict(opt.statistics()) != seen
    assert unread == after_it == seen  # read two steps later


def test_an_optimizer_may_leave_the_gpu_and_come_back(monkeypatch):
    on_cpu, moving = pair(BY_NAME["sgd-momentum"], ema=EMA(0.9, start=1))
    for t, (backend, found) in enumerate([("cuda", 1.0), ("cuda", 0.0), ("cpu", 0.0), ("torch", 0.0), ("cuda", 0.0)], 1):
        moving.defaults["backend"] = backend
        on_cpu.defaults["backend"] = backend if backend == "torch" else "cpu"
        for opt in (on_cpu, moving):
            opt.found_inf = torch.tensor(found)
            run(opt, all_params(opt), 1, first=t)
    assert moving.state_dict()["param_groups"][0]["steps"] == 4
    assert_same_state(on_cpu, moving)


@pytest.mark.parametrize("lr", [torch.tensor(0.1, dtype=torch.bfloat16), torch.tensor(0.1, device="meta")], ids=["bf16", "elsewhere"])
def test_a_learning_rate_that_python_must_read_is_not_captured(lr, monkeypatch):
    params = parameters(SHAPES)
    set_gradients(params, 1)
    opt = fuseopt.AdamW(params, lr=torch.tensor(0.1), capturable=True, backend="cuda")
    opt.step()
    opt.param_groups[0]["lr"] = lr
    monkeypatch.setattr(cuda, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=f"lr is a tensor of {lr.dtype} on {lr.device}"):
        opt.step()
