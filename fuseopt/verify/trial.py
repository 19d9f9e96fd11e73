"""One cell of the sweep: an optimizer driven for a few steps, checked by `attach` and by what `attach` cannot see."""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import cases
from .cases import HALF, STEPS, Rule, Stage
from .checker import attach


@dataclass(frozen=True)
class Trial:
    """What is run. shapes, dtypes: of the tensors; device: where they lie."""

    rule: Rule
    stage: Stage
    backend: str
    seed: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: str
    threads: int | None  # that must do what one does; None: not compared
    against_cpu: bool = False  # the cpu backend is there to compare a GPU's fp32 bits with

    def parameters(self) -> list[Parameter]:
        return cases.parameters(self.shapes, self.dtypes, self.seed, self.device)

    def build(self, params: list[Parameter], backend: str | None = None):
        return cases.build(self.rule, self.stage, params, backend or self.backend, self.seed)

    def step(self, opt, params: list[Parameter], t: int) -> None:
        cases.set_gradients(opt, params, self.stage, self.seed, t)
        opt.step()

    def run(self, opt, params: list[Parameter], first: int = 1, last: int = STEPS):
        """Steps first to last; returns the optimizer."""
        for t in range(first, last + 1):
            self.step(opt, params, t)
        return opt


@dataclass
class Outcome:
    """share: the greatest difference, as a part of its bound; failures: one line each."""

    share: float = 0.0
    failures: list[str] = field(default_factory=list)


def check(trial: Trial) -> Outcome:
    """Run a trial; an exception is a failure too."""
    outcome = Outcome()
    try:
        with use_threads(1), warnings.catch_warnings():  # waiting for each other costs small tensors more than it saves
            warnings.simplefilter("ignore")  # torch's, of schedulers and backends that are not ours
            if trial.stage is cases.TORCH_FUSED:
                outcome.failures += _against_torch(trial)
            else:
                _check(trial, outcome)
    except Exception as error:
        outcome.failures.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return outcome


def _check(trial: Trial, outcome: Outcome) -> None:
    params = trial.parameters()
    opt = trial.build(params)
    checker = attach(opt)
    outcome.failures += _drive(trial, opt, params)
    report = checker.report()
    checker.detach()
    outcome.share = max((row["share"] for row in report.rows), default=0.0)
    outcome.failures += [_told(row) for row in report.worst() if not row["passed"]]
    if report.steps != STEPS:
        outcome.failures.append(f"{report.steps} of {STEPS} steps were checked")
    outcome.failures += _repeat(trial, _state(opt, params))


def _drive(trial: Trial, opt, params: list[Parameter]) -> Iterator[str]:
    """All steps. Yields what is wrong: gradients that were written, weights that never moved."""
    start = [p.detach().clone() for p in params]
    large = [cases.gradient(p, k, trial.seed, 1).abs() >= cases.LARGE for k, p in enumerate(params)]
    moved = [torch.zeros(p.shape, dtype=torch.bool, device=p.device) for p in params]
    for t in range(1, STEPS + 1):
        cases.set_gradients(opt, params, trial.stage, trial.seed, t)
        before = [(p.grad, p.grad.clone()) for p in params]
        opt.step()
        for k, (p, (grad, value)) in enumerate(zip(params, before, strict=True)):
            if p.grad is not grad or not _equal(grad, value):
                yield f"the gradient of w{k} was written to at step {t}"
            moved[k] |= p.detach() != start[k]
    for k, p in enumerate(params):
        held, pruned = opt.keep_mask(p), opt.prune_mask(p)
        free = large[k] if held is None else large[k] & held
        free = free if pruned is None else free & ~pruned
        if still := int((free & ~moved[k]).sum()):
            yield f"{still} of {p.numel()} entries of w{k} {tuple(p.shape)} never moved"


def _repeat(trial: Trial, expected: dict) -> list[str]:
    """What changes the bits and must not: saving and loading halfway, threads, the backend of a GPU."""
    half, many = HALF, trial.threads
    failures = _differences(expected, _run_again(trial, half), f"saved and loaded after step {half}")
    if many and trial.device == "cpu":
        failures += _differences(expected, _run_again(trial, threads=many), f"with {many} threads instead of one")
    if trial.against_cpu:
        on_cpu = replace(trial, backend="cpu", device="cpu")
        failures += _differences(expected, _run_again(on_cpu), "on the cpu backend")
    return failures


def _run_again(trial: Trial, half: int | None = None, threads: int = 1) -> dict:
    """The state after the same steps. half: the step after which all is saved and loaded."""
    params = trial.parameters()
    with use_threads(threads):
        opt = trial.run(trial.build(params), params, last=half or STEPS)
        if half is None:
            return _state(opt, params)
        saved = io.BytesIO()
        torch.save(opt.state_dict(), saved)
        saved.seek(0)
        again = cases.copies(params)
        opt = trial.build(again)
        opt.load_state_dict(torch.load(saved, weights_only=True))
        return _state(trial.run(opt, again, half + 1), again)


def _against_torch(trial: Trial) -> list[str]:
    """Differences from torch's fused kernel, in fp32, with and without weight decay."""
    failures, stage = [], trial.stage
    parent = next(base for base in trial.rule.cls.__mro__ if base.__module__.startswith("torch.optim."))
    for decays in (False, True):
        params = cases.parameters(cases.TORCH_SHAPES, trial.dtypes[:1] * 3, trial.seed, trial.device)
        theirs = cases.copies(params)
        opt = trial.build(params)
        for group in () if decays else opt.param_groups:
            group["weight_decay"] = 0.0
        twins = dict(zip(params, theirs, strict=True))
        groups = [{**_torchs_options(parent, g), "params": [twins[p] for p in g["params"]]} for g in opt.param_groups]
        torchs = parent(groups, lr=0.1, fused=True, **trial.rule.common)
        for t in range(1, STEPS + 1):
            for some, one in ((params, opt), (theirs, torchs)):
                cases.set_gradients(one, some, stage, trial.seed, t)
                one.step()
        ours = {k: {key: opt.state[p][key] for key in torchs.state[q]} for k, (p, q) in enumerate(twins.items())}
        expected = {k: torchs.state[q] for k, q in enumerate(theirs)}
        what = f"with fused=True of torch.optim.{parent.__name__}, {'with' if decays else 'without'} decay"
        failures += _differences({"state": expected, "w": theirs}, {"state": ours, "w": params}, what)
    return failures


def _torchs_options(parent: type, group: dict) -> dict:
    """Those options of a group that torch's class knows."""
    known = parent([torch.zeros(1, requires_grad=True)]).defaults.keys() - {"fused", "foreach"}
    return {name: value for name, value in group.items() if name in known and name != "decoupled_weight_decay"}


# ---- comparing ----------------------------------------------------------------------------------------


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    """torch's threads, and with them ours, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _state(opt, params: list[Parameter]) -> dict:
    """Weights and everything of a checkpoint: row by row, whatever the layout in memory."""
    return {"weight": dict(enumerate(params)), **opt.state_dict()}


def _differences(a: Any, b: Any, what: str) -> list[str]:
    """One line that names where two runs differ in a bit, or none."""
    found = list(_unequal(a, b, ""))
    return [f"other bits {what}: {', '.join(found[:3])}{' ...' if found[3:] else ''}"] if found else []


def _unequal(a: Any, b: Any, where: str) -> Iterator[str]:
    """The names of the tensors and numbers that differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _unequal(a[key], b[key], f"{where}.{key}".lstrip("."))
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for k, pair in enumerate(zip(a, b, strict=True)):
            yield from _unequal(*pair, f"{where}.{k}")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if not _equal(a, b):
            yield where
    elif a != b:
        yield where


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and bits are the same, signs of zero and kinds of NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.detach().reshape(-1).cpu().contiguous().view(torch.uint8) for x in (a, b)))


def _told(row: dict) -> str:
    """A figure of the checker's report in words."""
    where = f"{row['stream']} of {row['parameter']}, step {row['at_step']}"
    if row["share"]:
        size = f"{row['share']:.3g} of the bound" if math.isfinite(row["share"]) else "where none may"
        return f"{where}: off by {row['max_abs']:.3g}, {size}, {row['differences']} entries ({row['check']})"
    return f"{where}: {row['differences']} wrong ({row['check']})"
