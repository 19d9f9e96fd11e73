"""Interrupts at random moments of a step, of both kinds: the compiled pass alone, and the pass with state,
averages, slices or a selection around it.
"""

import itertools
import signal
import time

import pytest
import torch
from cases import BY_NAME, F32, Rule, Stage, parameters, set_gradients
from test_faults import FULL, PRUNING, SHAPES, Fault

import fuseopt
from fuseopt import EMA, interrupts


def digest(opt, params) -> list:
    """Everything that a step changes, as comparable data."""
    tensors = [p.detach().clone() for p in params]
    state = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in opt.state.get(p, {}).items()} for p in params]
    counts = [[group["steps"] for group in opt.param_groups], dict(opt.statistics()) if opt._statistics else None]
    return [tensors, state, counts, [p._version for p in params]]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)  # NaN: an average without a value yet
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(autouse=True)
def pythons_handler():
    """Of Ctrl-C; a shell that starts pytest in the background has it ignored."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


class Interrupts:
    """Raises KeyboardInterrupt at a random moment of a block that takes `longest` seconds or less.

    Of the moments half are evenly spread, half evenly in their logarithm: before the first write may be the
    thousandth part of a step, or nearly all of it.
    """

    def __init__(self):
        self.random, self.longest = torch.Generator().manual_seed(0), 1e-4

    def moment(self) -> float:
        u, late = torch.rand(2, generator=self.random).tolist()
        return max(self.longest * (u if late < 0.5 else 1e-3**u), 2e-6)

    def __enter__(self):
        self.old = signal.signal(signal.SIGALRM, signal.default_int_handler)
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.old)

    def during(self, f) -> bool:
        """Run f; whether it was interrupted."""
        begin = time.perf_counter()
        try:
            signal.setitimer(signal.ITIMER_REAL, self.moment())
            f()
            self.longest = time.perf_counter() - begin
            while signal.getitimer(signal.ITIMER_REAL)[0]:  # it was too late
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            self.longest *= 1.1
            return True
        return False


def build(rule: Rule, pruning: str, params: list, backend: str, way: str):
    """An optimizer with masks; a slice among the parameters makes every step take the long way."""
    if way == "gaps":
        params[0] = torch.nn.Parameter(torch.zeros(33, 62)[:, ::2].copy_(params[0].detach()))
    options = {**FULL, **PRUNING[pruning], "statistics": way == "statistics"}
    return Stage("", options, "freeze").build(rule, params, F32, backend=backend)


def tried_until_taken(interrupts, one, twin) -> set[tuple[bool, bool]]:
    """Steps one (optimizer, parameters) under interrupts until it was taken as by the twin: {(hit, taken), ...}."""
    before, begin = digest(*twin), time.perf_counter()
    twin[0].step()
    interrupts.longest = 1.2 * (time.perf_counter() - begin)
    after, outcomes = digest(*twin), set()
    for _ in range(1000):
        hit = interrupts.during(one[0].step)
        assert torch.is_grad_enabled(), "an interrupt left gradients off"
        found = digest(*one)
        taken = same(found, after)
        assert taken or same(found, before), "a step is torn"
        outcomes.add((hit, taken))
        if taken:
            return outcomes
    raise AssertionError("the step was never taken")


@pytest.mark.parametrize("way", ("steady", "gaps", "statistics"))
@pytest.mark.parametrize("pruning", PRUNING)
@pytest.mark.parametrize("name", ("sgd-momentum", "adamw-amsgrad-maximize"))
def test_an_interrupted_step_is_whole_or_not_at_all(name, pruning, way, backend):
    """Every step is tried under random interrupts until it has been taken, against an undisturbed twin. The
    first steps, which make state, are tried anew from the beginning many times. That an interrupt falls into a step and
    one does not is waited for."""
    outcomes, least = set(), {"cpu": 40, "cuda": 8}.get(backend, 15)
    with Interrupts() as interrupts:
        for trial in itertools.count():
            if trial >= least and {(True, False), (False, True)} <= outcomes:
                break
            assert trial < 10 * least, f"no interrupt fell into a step, or each did: {outcomes}"
            params, twins = parameters(SHAPES), parameters(SHAPES)
            a, b = (build(BY_NAME[name], pruning, x, backend, way) for x in (params, twins))
            for t in range(1, 8 if trial == 0 else 4):
                set_gradients(params, t), set_gradients(twins, t)
                outcomes |= tried_until_taken(interrupts, (a, params), (b, twins))


def test_an_interrupt_reaches_the_handler_that_was_there():
    """Held back within the block, run once at its end, and handlers are put back."""
    seen = []
    old = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    mine = signal.getsignal(signal.SIGUSR1)
    try:
        with interrupts.held():
            signal.raise_signal(signal.SIGUSR1)
            with interrupts.held():
                signal.raise_signal(signal.SIGUSR1)
            time.sleep(0.001)
            assert not seen
            assert signal.getsignal(signal.SIGUSR1) is not mine
        assert len(seen) == 2 and signal.getsignal(signal.SIGUSR1) is mine
        with pytest.raises(KeyboardInterrupt):
            with interrupts.held():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGUSR1)
                done = True
        assert done and len(seen) == 3, "one handler that raises must not lose the other"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(Fault), interrupts.held():
            raise Fault
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_handlers_survive_interrupts_while_they_are_held():
    """Whenever it comes, an interrupt is delivered, and afterwards handlers do what they did."""
    ends = []

    def hold():
        with interrupts.held():
            pass

    with Interrupts() as timer:
        timer.longest = 2e-5
        for _ in range(3000):
            ends.append(timer.during(hold))
        assert 100 < sum(ends)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGALRM)


def test_an_interrupted_swap_leaves_the_own_weights(backend):
    """Whenever it comes: while the averages go in, within the block, while the weights come back."""
    params = parameters([(64, 64), (300,), (7,)])
    opt = fuseopt.AdamW(params, lr=0.1, ema=EMA(0.9), backend=backend)
    for t in range(1, 4):
        set_gradients(params, t)
        opt.step()
    own = [p.detach().clone() for p in params]
    assert not any(torch.equal(p, opt.state[p]["ema_0"]) for p in params)

    def swap():
        with opt.swap_ema():
            assert not torch.equal(params[0], own[0])

    with Interrupts() as interrupts:
        happened = 0
        for _ in range(2000):
            happened += interrupts.during(swap)
            check_own(opt, params, own)
    assert 50 < happened < 2000


def check_own(opt, params: list, own: list) -> None:
    assert not opt._swapped and torch.is_grad_enabled()
    assert all(torch.equal(p, w) for p, w in zip(params, own, strict=True))
