"""Timing: every round takes all variants and the bandwidth kernels once, in an order drawn anew.

What disturbs the machine then hits all alike, and what is reported are medians of ratios within a round.
"""

import gc
import os
import random
import resource
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import check
import torch
from case import Case, Data
from peers import makers as peer_makers
from shapes import TINY
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from variants import Untimed, Variant, makers

SHARE_FROM = 2**22  # elements; a smaller step is served by the cache and has no share of the bandwidth


@dataclass
class Settings:
    """How long to measure."""

    seconds: float = 6.0  # a case beyond the cache, bandwidth and refreshed gradients included
    seconds_small: float = 2.5  # a case within it
    seconds_host: float = 0.6  # the host time of a case
    least_rounds: int = 9
    most_rounds: int = 200
    sample: float = 1e-3  # seconds; shorter steps are repeated to last that long
    bandwidth_elements: int = 2**24  # fp32 entries a buffer; far beyond the cache


@dataclass
class Samples:
    """The rounds of one variant or kernel."""

    bytes: float | None
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)  # a step, one entry a round
    page_faults: list[float] = field(default_factory=list)  # a step: memory fresh from the system


class Bandwidth:
    """Elementwise torch kernels over buffers beyond the cache, as a measure of what the memory gives.

    All but copy work in place, as a step does, so that no stored line has to be fetched uncounted.
    """

    def __init__(self, n: int):
        a, b, c = (torch.full((n,), value) for value in (1.0, 1e-3, 1e-3))
        self.kernels: dict[str, tuple[Callable[[], object], int]] = {
            "b.copy_(a): 1 read, 1 write": (lambda: b.copy_(a), 8 * n),
            "a.mul_(s): 1 read, 1 write": (lambda: a.mul_(1.0), 8 * n),
            "a.add_(b): 2 reads, 1 write": (lambda: a.add_(b, alpha=1e-6), 12 * n),
            "a.addcmul_(b, c): 3 reads, 1 write": (lambda: a.addcmul_(b, c, value=1e-6), 16 * n),
        }


class Others:
    """How much of the machine other processes take from the moment this is made (Linux; elsewhere None)."""

    def __init__(self):
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds of all processors, of those that they were busy, and that this process was."""
        try:
            with open("/proc/stat") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except OSError:
            return None
        unit, own = os.sysconf("SC_CLK_TCK"), os.times()
        idle = ticks[3] + ticks[4]  # waiting for disks is idle, too
        return sum(ticks) / unit, (sum(ticks) - idle) / unit, own.user + own.system

    def share(self) -> float | None:
        """Share of all processor time that others used."""
        if self.start is None:
            return None
        total, busy, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return min(1.0, max(0.0, busy - own) / max(total, 1e-9))


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    """Spread of above/below, round by round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def allocated(variant: Variant) -> int:
    """Bytes of tensors that one steady step allocates, freed again or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        variant.step()
    events = profiler.profiler.kineto_results.events()
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")


def state_bytes(variant: Variant) -> int:
    """Bytes of the tensors that a variant keeps between steps, beside parameters and gradients."""
    kept = [x for p in variant.params for x in variant.opt.state[p].values() if isinstance(x, Tensor)]
    storages = {}
    for x in [*kept, *variant.averages(), *variant.held()]:
        inner = [getattr(x, name) for name in x.__tensor_flatten__()[0]] if hasattr(x, "__tensor_flatten__") else [x]
        storages |= {(y.device, y.data_ptr()): y.numel() * y.element_size() for y in inner}
    return sum(storages.values())


def run_case(case: Case, settings: Settings, peers: list[str]) -> dict:
    """Verify and time the variants of a case; a result that json can write (see report.py)."""
    data = Data(case)
    ready, untimed = verified(case, data, makers(case, data), peer_makers(case, data, peers))
    extra = {v.name: {"allocated_bytes": allocated(v), "state_bytes": state_bytes(v)} for v in ready}
    bandwidth = Bandwidth(settings.bandwidth_elements) if case.elements >= SHARE_FROM else None
    others = Others()
    samples, kernels = _rounds(data, ready, bandwidth, settings)
    best = min(kernels, key=lambda k: statistics.median(kernels[k].seconds) / kernels[k].bytes, default=None)
    rows = []
    for v in ready:
        row = {"name": v.name, "family": v.family, "verified": True, "passes": v.passes, **extra[v.name]}
        first = samples[ready[0].name].seconds
        rows.append(row | _summary(samples[v.name], first, kernels.get(best)))
    share, rounds = others.share(), len(samples[ready[0].name].seconds) if ready else 0
    tensors, elements = len(case.shapes), case.elements
    del data, ready, samples  # before memory is asked for again
    hosts = host_seconds(case, settings)
    return {
        "case": case.name,
        "shape": case.shape,
        "rule": case.rule,
        "dtype": str(case.dtype).removeprefix("torch."),
        "stages": case.stages,
        "tensors": tensors,
        "elements": elements,
        "rounds": rounds,
        "others": share,
        "bandwidth": {k: spread([s.bytes / t for t in s.seconds]) for k, s in kernels.items()},
        "best_kernel": best,
        "variants": [row | ({"host_seconds": hosts[row["name"]]} if row["name"] in hosts else {}) for row in rows]
        + untimed,
    }


def host_seconds(case: Case, settings: Settings) -> dict[str, dict]:
    """{variant: spread of its host time}: of a step of as many tensors of 64 entries, all of them in the cache.

    Next to nothing is computed or moved there, so what remains is what the step costs whatever the tensors' size.
    Of fuseopt and torch; the first steps are verified as all others are.
    """
    tiny = Case(case.name, case.shape, sizes=[TINY] * len(case.shapes))
    if case.shapes == tiny.shapes:
        return {}  # the case's own times are these
    data = Data(tiny)
    ready, _ = verified(tiny, data, makers(tiny, data))
    samples, _ = _rounds(data, ready, None, replace(settings, seconds_small=settings.seconds_host))
    return {name: spread(found.seconds) for name, found in samples.items()}


def verified(
    case: Case, data: Data, makers: list[Callable], peers: list[tuple[str, Callable]] = ()
) -> tuple[list[Variant], list[dict]]:
    """(variants whose first steps are right, ready for more; a row for each that is not timed).

    Times are relative to the first that is ready. A row has "problem", or "skipped" where the variant does not run
    here; of a wrong peer or optimizer of torch the run goes on and says so.
    """
    made, untimed = [], []
    for name, make in [*((f"variant {k + 1}", make) for k, make in enumerate(makers)), *peers]:
        row = {"name": name, "family": "peer" if (name, make) in peers else "", "verified": False}
        try:
            enough(case)
            variant = make()
            row |= {"name": variant.name, "family": variant.family}
            check.take_steps(data, variant)
            made.append(variant)
        except Untimed as why:
            untimed.append(row | {"skipped": str(why)})
        except Exception as error:  # of one variant; the others are timed all the same
            traceback.print_exc(limit=-4)
            untimed.append(row | {"problem": f"{type(error).__name__}: {error}"})
    ready = []
    for variant, wrong in zip(made, check.problems(case, data, made), strict=True):
        if wrong is None:
            variant.set_gradient(data)
            ready.append(variant)
        else:
            untimed.append({"name": variant.name, "family": variant.family, "verified": False, "problem": wrong})
    return ready, untimed


def enough(case: Case) -> None:
    """Raise Untimed if another variant may not fit in memory: up to nine tensors of the parameters' size."""
    need, free = 9 * case.elements * case.dtype.itemsize, free_memory()
    if case.device == "cpu" and free is not None and need > free:
        raise Untimed(f"may need {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free")


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _rounds(data: Data, ready: list[Variant], bandwidth: Bandwidth | None, settings: Settings) -> tuple[dict, dict]:
    """({variant: Samples}, {kernel: Samples}) of as many rounds as the settings allow."""
    kernels = bandwidth.kernels if bandwidth else {}
    samples = {v.name: Samples(v.bytes()) for v in ready}
    of_kernels = {name: Samples(size) for name, (_, size) in kernels.items()}
    todo = [(v.step, samples[v.name]) for v in ready] + [(kernels[k][0], of_kernels[k]) for k in kernels]
    for run, s in todo:
        s.repeats = repeats(run, settings.sample)
    shuffle, start, done = random.Random(0).shuffle, time.perf_counter(), 0
    seconds = settings.seconds if bandwidth else settings.seconds_small
    while ready and done < settings.most_rounds:
        if done >= settings.least_rounds and time.perf_counter() - start > seconds:
            break
        for v in ready:
            if v.writes_gradient:
                v.set_gradient(data)
        shuffle(todo)
        gc.collect()
        gc.disable()
        for run, s in todo:
            if bandwidth is None:
                run()  # what lies in the cache is another variant's
            _time(run, s)
        gc.enable()
        done += 1
    return samples, of_kernels


def repeats(run: Callable, at_least: float) -> int:
    """How often to repeat run() so that it lasts so many seconds, after warming up."""
    run()
    start = time.perf_counter()
    run()
    return max(1, min(100, round(at_least / (time.perf_counter() - start))))


def _time(run: Callable, samples: Samples) -> None:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for _ in range(samples.repeats):
        run()
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    samples.seconds.append(seconds / samples.repeats)
    samples.page_faults.append(faults / samples.repeats)


def _summary(samples: Samples, baseline: list[float], kernel: Samples | None) -> dict:
    """Time, ratio to the baseline's, bytes, and share of the bandwidth: (bytes/time) / the kernel's."""
    out = {
        "seconds": spread(samples.seconds) | {"least": min(samples.seconds)},
        "ratio": ratios(samples.seconds, baseline),
        "bytes": samples.bytes,
        "page_faults": statistics.median(samples.page_faults),
        "repeats": samples.repeats,
        "samples": [float(f"{s:.4g}") for s in samples.seconds],
    }
    if kernel and samples.bytes:
        per_byte = [s / samples.bytes for s in samples.seconds]
        out["share"] = ratios([s / kernel.bytes for s in kernel.seconds], per_byte)
    return out
