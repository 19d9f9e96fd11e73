"""What `explain()` says is what a step does; `statistics()` keeps the step it was taken from and waits for no GPU."""

import copy
import ctypes
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import emulated
import pytest
import torch
from cases import BF16, F16, F64, parameters, run, set_gradients
from torch.nn import Parameter

import fuseopt
from fuseopt import EMA, Prune, backends, cpu, cuda, triton_driver
from fuseopt.explain import bandwidth, printing
from fuseopt.explain.stopwatch import Stopwatch
from fuseopt.stages import statistics

ROOT = Path(__file__).resolve().parents[1]
needs_cuda = pytest.mark.skipif(bool(emulated.why_not or cpu.native_error()), reason=str(emulated.why_not))
needs_triton = pytest.mark.skipif(triton_driver.why_not() is not None, reason=str(triton_driver.why_not()))
needs_cpu = pytest.mark.skipif(cpu.native_error() is not None, reason="needs the compiled pass")


# ---- launches ---------------------------------------------------------------------------------------


def several_kinds() -> list[dict]:
    """Dtypes, one of them of an empty tensor alone; two rules; empty tensors and groups."""
    a, b, c = parameters([(5, 3), (7,), (0, 2)]), parameters([(4,)] * 3, BF16), parameters([(6, 6)], F64)
    return [{"params": a + b}, {"params": [], "lr": 0.2}, {"params": c + parameters([(0,)], F16), "amsgrad": True}]


def overlapping() -> list[dict]:
    p = Parameter(torch.randn(40))
    return [{"params": [p, Parameter(p.detach()[4:12]), *parameters([(3,)])]}]


CONFIGURATIONS = {
    "one": (lambda: [{"params": parameters([(5,)])}], {"max_grad_norm": 1.0}),
    "several kinds": (several_kinds, {"max_grad_norm": 1.0, "ema": [EMA(0.9), EMA(0.5, dtype="parameter")]}),
    "statistics": (several_kinds, {"statistics": True}),
    "masks": (several_kinds, {"prune": Prune(threshold=0.1), "max_grad_norm": 1.0}),
    "many groups": (lambda: [{"params": [p]} for p in parameters([(2,)] * 40)], {}),
    "in turn": (overlapping, {"max_grad_norm": 1.0}),
}


def launches_of(explanation) -> int:
    return sum(row["launches"] or 0 for row in explanation.launches)


@needs_cuda
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_launches_are_those_of_the_cuda_module(name):
    groups, options = CONFIGURATIONS[name]
    opt = fuseopt.AdamW(groups(), lr=0.1, backend="cuda", **options)
    params = [p for group in opt.param_groups for p in group["params"]]
    run(opt, params, 2)
    counter = ctypes.c_int.in_dll(ctypes.CDLL(cuda.native.__file__), "emulated_launches")
    before = counter.value
    run(opt, params, 1, first=3)
    assert counter.value - before == launches_of(opt.explain())


@needs_triton
@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if "many" not in name])
def test_the_launches_are_those_of_the_triton_backend(name, monkeypatch):
    from fuseopt import triton_backend

    groups, options = CONFIGURATIONS[name]
    opt = fuseopt.AdamW(groups(), lr=0.1, backend="triton", **options)
    params = [p for group in opt.param_groups for p in group["params"]]
    run(opt, params, 1)
    seen = []
    monkeypatch.setattr(triton_backend, "launch", lambda kernel, *rest, **more: seen.append(kernel))
    run(opt, params, 1, first=2)
    assert len(seen) == launches_of(opt.explain()) > 0


@needs_cpu
def test_what_a_launch_covers():
    p, q, r = parameters([(5, 3), (7,), (4, 4)])
    groups = [{"params": [("w", p), ("b", q)]}, {"params": [("v", r)], "lr": 0.2}]
    opt = fuseopt.NAdam(groups, max_grad_norm=1.0, prune=Prune(0.1, begin=3, end=9, every=3))
    run(opt, [p, q, r], 1)
    opt.mask("v", torch.tensor(False))
    norm, update, pruning = opt.explain().launches
    assert norm["names"] == update["names"] == ["w", "b"] and pruning["names"] == ["w", "v"]
    assert (update["launches"], update["rules"], update["dtypes"], update["groups"]) == (1, ["nadam"], ["float32"], [0])
    assert (update["tensors"], update["elements"], pruning["when"]) == (2, 22, "at 3 to 9 by 3")
    opt.mask("w", fn=fuseopt.masks.TopGradient(0.5), every=7)
    assert [row["when"] for row in opt.explain().launches if row["what"] == "mask"] == ["every 7 steps"]
    run(opt, [p, q, r], 8, first=2)
    assert "prune" not in [row["what"] for row in opt.explain().launches]  # the schedule is over


# ---- bytes and notes ----------------------------------------------------------------------------------


def test_bytes_are_by_stream_and_average(backend):
    p, q = parameters([(30, 10), (50,)], BF16)
    averages = [EMA(0.9), EMA(0.5, every=4), EMA(0.1, dtype="parameter")]
    opt = fuseopt.SGD([p, q], lr=0.1, momentum=0.9, ema=averages, max_grad_norm=1.0, backend=backend)
    (row,) = opt.explain().rows
    expected = {
        "param": 4,
        "grad": 2,
        "moments": 4,
        "ema_0": 8,
        "ema_1": 2,
        "ema_2": 4,
        "ema": 14,
        "masks": 0,
        "norm": 2,
    }
    assert {name: row[name] / 350 for name in expected} == expected and row["bytes"] == 350 * 26
    assert (row["rule"], row["tensors"], row["elements"]) == ("sgd_momentum", 2, 350)
    q.grad = torch.ones_like(q)
    assert opt.explain().bytes_per_step == 50 * 26  # p has no gradient
    opt.mask(q, torch.tensor(False))
    assert opt.explain().bytes_per_step == 0
    opt.defaults["statistics"] = True
    assert opt.explain().bytes_per_step == 50 * 4


def options_of(case: str) -> tuple:
    p, q = parameters([(6, 4), (5,)])
    if case == "gaps":
        p = Parameter(torch.randn(6, 9)[:, :4])
        return [p, q], {"prune": Prune(0.5)}, "1 parameter with gaps in memory, stepped through a dense copy"
    if case == "ranked by torch":
        p = Parameter(torch.randn(6, 9)[:, :4])
        return [p, q], {"prune": Prune(0.5)}, "1 parameter with gaps in memory, ranked for pruning by torch"
    if case == "gradient's order":
        p.grad = torch.randn(4, 6).t()
        return [p], {}, "with a gradient in another order of memory, which is copied"
    if case == "shared":
        return [p, q, Parameter(p.detach()[:2])], {}, "stepped one after another, by one thread"
    if case == "shared with gaps":
        return [p, Parameter(p.detach()[:, :2])], {}, "stepped one after another, in a pass each"
    if case == "without gradient":
        q.grad = torch.ones_like(q)
        return [p, q], {}, "1 parameter without a gradient now, left out of a step: parameter 0 of group 0."
    if case == "no gradients":
        return [p, q], {}, "No parameter has a gradient now"
    if case == "not trained":
        p.requires_grad_(False)
        return [p, q], {}, "with requires_grad=False"
    if case == "fp16":
        return parameters([(3,)], F16), {}, "1 parameter in fp16, which the CPU's pass converts"
    return [p, q], {"backend": "torch"}, "Plain torch operations step"


NOTED = ("gaps", "ranked by torch", "gradient's order", "shared", "shared with gaps", "without gradient", "no gradients",
         "not trained", "fp16", "torch")  # fmt: skip


@needs_cpu
@pytest.mark.parametrize("case", NOTED)
def test_what_falls_back_is_said(case, monkeypatch):
    params, options, text = options_of(case)
    explanation = fuseopt.AdamW(params, **options).explain()
    assert sum(text in note for note in explanation.notes) == 1 and text[:20] in str(explanation)
    assert text not in str(fuseopt.AdamW(parameters([(6, 4), (5,)])).explain()) or case == "no gradients"


@needs_cpu
def test_a_process_without_its_threads_says_so(monkeypatch):
    opt = fuseopt.AdamW(parameters([(3,)]))
    assert not any("forked" in note for note in opt.explain().notes)
    monkeypatch.setattr(cpu.native, "pool_lost", lambda: True)
    assert any("one thread steps" in note for note in opt.explain().notes)


def test_the_reason_counts_threads(native):
    opt = fuseopt.AdamW(parameters([(3,)]))
    for count, text in ((1, ", 1 thread"), (2, ", 2 threads")):
        torch.set_num_threads(count)
        assert opt.explain().why.endswith(text)


def test_a_missing_compiler_is_the_reason(monkeypatch):
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(backends, "_warned", True)
    monkeypatch.setattr(cpu, "why_not", "the compiled module is missing; install a C++ compiler")
    explanation = fuseopt.AdamW(parameters([(3,)])).explain()
    assert explanation.backend == "torch" and "install a C++ compiler" in str(explanation)


# ---- the least time, and the measured ------------------------------------------------------------------


def test_the_least_time_is_bytes_by_bandwidth_beyond_the_cache(monkeypatch):
    monkeypatch.setattr(bandwidth, "of", lambda device: 1e6)
    opt = fuseopt.SGD(parameters([(1000,)]), lr=0.1)  # 12,000 bytes a step of 8,000
    opt.time_steps()
    run(opt, opt.param_groups[0]["params"], 1)
    opt._stopwatch.last = [0.0, 0.024]
    for cache, least, text in [
        (None, 0.012, "at least 12.0 ms at 1.00 MB/s."),
        (7999, 0.012, "part of it may stay in the cache of 8.00 kB"),
        (8000, None, "all of it fits in the cache of 8.00 kB, so the memory's bandwidth is no bound."),
    ]:
        monkeypatch.setattr(bandwidth, "cache", lambda device, cache=cache: cache)
        explanation = opt.explain()
        assert explanation.least_seconds == least and text in " ".join(str(explanation).split())
        ratio = ", 2.00 times the least." if least else "."
        assert f"The last step took 24.0 ms{ratio}" in str(explanation)


def test_bandwidth_is_measured_once_and_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(bandwidth, "LEAST", 2**20)
    monkeypatch.setattr(bandwidth, "cache", lambda device: 0)
    bandwidth._measured.cache_clear()
    explanation = fuseopt.SGD(parameters([(1000,)]), lr=0.1).explain()
    assert explanation.bytes_per_step and bandwidth._measured.cache_info().misses == 0
    assert 1e8 < explanation.bandwidth < 1e13 and explanation.least_seconds > 0
    assert str(explanation) and bandwidth._measured.cache_info().misses == 1
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")))
    bandwidth._measured.cache_clear()
    assert explanation.bandwidth is None and explanation.least_seconds is None and "at least" not in str(explanation)
    monkeypatch.undo()
    bandwidth._measured.cache_clear()  # of so small a buffer


def test_the_last_step_is_timed_on_request(monkeypatch):
    (p,) = params = parameters([(8, 8)])
    opt = fuseopt.AdamW(params)
    run(opt, params, 1)
    assert opt.explain().last_seconds is None and "call opt.time_steps()" in str(opt.explain())
    opt.time_steps()
    assert opt.explain().last_seconds is None and "No step since" in str(opt.explain())
    now = iter(range(100))
    monkeypatch.setattr("fuseopt.explain.stopwatch.time", SimpleNamespace(perf_counter=lambda: float(next(now))))

    def closure():
        for _ in range(10):
            next(now)
        return torch.tensor(3.0)

    assert opt.step(closure) == 3.0 and opt.step(closure=closure) == 3.0
    assert opt.explain().last_seconds == 1.0  # without the closure's ten
    opt.state[p]["exp_avg"] = torch.ones(3)
    with pytest.raises(ValueError, match="exp_avg"):
        opt.step()
    assert opt.explain().last_seconds == 1.0  # the step that raised is none
    opt.time_steps(False)
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks and not opt.explain().timed


def test_on_a_gpu_events_are_recorded_and_only_reading_waits(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self, stream):
            self.at = len(log)
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return float(end.at - self.at)

    capturing = [False]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    params = parameters([(3,)])
    opt = fuseopt.SGD(params, lr=0.1)
    opt._stopwatch = Stopwatch(opt, torch.device("cuda", 0))
    run(opt, params, 3)
    assert log == ["record"] * 6
    capturing[0] = True
    run(opt, params, 1)
    assert opt.explain().last_seconds == 1e-3 and log == ["record"] * 6 + ["wait"]


# ---- printing ---------------------------------------------------------------------------------------


def test_it_prints_within_a_terminal_and_escapes_in_a_notebook(backend):
    names = [f"<b>layer.{k}&</b>.weight_that_has_a_long_name" for k in range(30)]
    pairs = list(zip(names, parameters([(300, 200)] * 29 + [(3,)]), strict=True))
    groups = [{"params": pairs[:20]}, *({"params": [pair]} for pair in pairs[20:])]
    options = {
        "max_grad_norm": 1.0,
        "ema": [EMA(k / 10) for k in range(8)],
        "prune": Prune(0.5, begin=100, end=20000, every=100),
    }
    opt = fuseopt.AdamW(groups, backend=backend, **options)
    explanation = opt.explain()
    text, html = str(explanation), explanation._repr_html_()
    assert max(text.splitlines(), key=len)[printing.WIDTH :] == "" and repr(explanation) == text
    assert "... 29 more" in text and "ema_0" not in text and "ema" in text  # of eight there is one column
    assert "&lt;b&gt;layer.0&amp;" in html and "<b>" not in html and html.count("<table>") == 2
    assert html.count("<tr>") == html.count("</tr>") == 2 + len(explanation.launches) + len(explanation.rows) + 1
    few = fuseopt.AdamW(pairs[:1], ema=[EMA(0.5), EMA(0.9)], backend=backend).explain()
    assert "ema_0" in str(few) and "ema_1" in str(few)


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (999, "999 B"), (1e3, "1.00 kB"), (12.34e6, "12.3 MB"), (5e18, "5000 PB")]
)
def test_sizes(count, text):
    assert printing.size(count) == text


@pytest.mark.parametrize(
    "seconds, text", [(4.1e-6, "4.10 us"), (0.25, "250 ms"), (3.456, "3.46 s"), (0.9999, "1000 ms")]
)
def test_durations(seconds, text):
    assert printing.duration(seconds) == text


def test_there_may_be_nothing_to_explain(backend):
    opt = fuseopt.AdamW([{"params": []}], backend=backend)
    assert opt.explain().bytes_per_step == 0 and not opt.explain().launches and not opt.explain().rows
    assert "reads and writes 0 B" in str(opt.explain()) and opt.explain()._repr_html_()
    opt.step()
    frozen = Parameter(torch.ones(3), requires_grad=False)
    assert "requires_grad=False" in str(fuseopt.AdamW([frozen], backend=backend).explain())


def test_a_table_without_entries_is_left_out():
    p = torch.nn.Parameter(torch.empty(0, 3))
    p.grad = torch.empty(0, 3)
    for text in (str(fuseopt.AdamW([p]).explain()), fuseopt.AdamW([p]).explain()._repr_html_()):
        assert "Launches" not in text and "Bytes read" not in text and "A step reads and writes 0 B." in text


@needs_cpu
def test_what_is_over_is_not_said_to_be_pruned():
    p = torch.nn.Parameter(torch.randn(8, 8)[:, ::2])
    p.grad = torch.ones(8, 4)
    opt = fuseopt.AdamW([p], prune=Prune(0.5, begin=1, end=2))
    for _ in range(2):
        assert "ranked for pruning" in str(opt.explain()) and "prune" in [row["what"] for row in opt.explain().launches]
        opt.step()
    assert "ranked" not in str(opt.explain()) and "prune" not in [row["what"] for row in opt.explain().launches]


def test_a_model_without_memory_can_be_planned():
    with torch.device("meta"):
        params = [Parameter(torch.empty(10**6, 10**5))]
    explanation = fuseopt.AdamW(params, ema=EMA(0.9)).explain()
    assert explanation.bytes_per_step == 10**11 * 36 and explanation.least_seconds is None
    assert "3.60 TB" in str(explanation)


# ---- statistics --------------------------------------------------------------------------------------


def test_statistics_stay_those_of_their_step(backend):
    params = parameters([(40, 30), (7,)])
    opt = fuseopt.AdamW(params, lr=0.1, statistics=True, backend=backend)
    twin = fuseopt.AdamW(parameters([(40, 30), (7,)]), lr=0.1, statistics=True, backend=backend)
    run(twin, twin.param_groups[0]["params"], 1)
    expected = dict(twin.statistics())
    run(opt, params, 1)
    unread = opt.statistics()
    set_gradients(params, 2, scale=100.0)
    params[1].grad = None  # other blocks
    opt.step()
    assert unread == expected and unread["grad_norm"] < opt.statistics()["grad_norm"]


def test_statistics_are_a_mapping(backend):
    params = parameters([(3,)])
    found = run(fuseopt.SGD(params, lr=0.1, statistics=True, backend=backend), params, 1).statistics()
    assert tuple(found) == statistics.NAMES and len(found) == 5 and found == dict(found)
    assert json.loads(json.dumps(dict(found))) == {**found} == pickle.loads(pickle.dumps(found))
    assert repr(found) == repr(dict(found))
    assert isinstance(found["zeros"], int) and isinstance(found["grad_norm"], float)
    with pytest.raises(KeyError, match="grad_norm"):
        found["norm"]
    with pytest.raises(TypeError):
        found["zeros"] = 1


WAITS = ("item", "__float__", "__int__", "__bool__", "cpu", "tolist", "numpy", "to")


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=needs_cuda), pytest.param("triton", marks=needs_triton)])
def test_no_value_is_fetched_before_it_is_read(name, monkeypatch):
    params = parameters([(40,), (7,)])
    opt = fuseopt.AdamW(params, lr=0.1, max_grad_norm=0.5, statistics=True, backend=name)
    run(opt, params, 2)
    set_gradients(params, 3)
    with monkeypatch.context() as patched:
        for method in WAITS:  # whatever brings a number from a GPU
            if name == "cuda" or method not in ("item", "numpy", "to"):  # Triton's counters lie on the CPU
                patched.setattr(torch.Tensor, method, None)
        opt.step()
    with monkeypatch.context() as patched:
        for method in WAITS:
            patched.setattr(torch.Tensor, method, None)
        found = opt.statistics()
        assert list(found) == list(statistics.NAMES)
        with pytest.raises(TypeError, match="not callable"):
            found["grad_norm"]
    set_gradients(params, 4)
    params[0].grad = None
    opt.step()
    twin = parameters([(40,), (7,)])
    reference = fuseopt.AdamW(twin, lr=0.1, max_grad_norm=0.5, statistics=True, backend="torch")
    assert dict(found) == pytest.approx(dict(run(reference, twin, 3).statistics()), rel=1e-6)


@needs_cpu
def test_the_tables_on_the_page_are_what_its_code_prints(capsys):
    page = (ROOT / "docs" / "pages" / "explain.md").read_text()
    exec(re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[1], {})
    tables = capsys.readouterr().out.split("\n\n")[1:3]
    assert len(tables) == 2 and all(table in page for table in tables)


def test_a_copy_is_not_timed():
    """Nor does the copy's step reach the original's watch."""
    params = parameters([(3,)])
    opt = run(fuseopt.SGD(params, lr=0.1), params, 1)
    opt.time_steps()
    for made in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        run(made, made.param_groups[0]["params"], 1)
        assert not made.explain().timed and opt.explain().last_seconds is None
