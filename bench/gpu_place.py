"""Where the sections of gpu_check.py run: the GPU, or in a dry run the tests' stand-ins on the CPU."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

DRY = os.environ.get("FUSEOPT_TEST_DEVICE") != "cuda"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.modules["fuseopt._CUDA"] = None  # pybind11 would hand out the real module in place of the emulated

import torch  # noqa: E402

import fuseopt  # noqa: E402

if str(ROOT) not in fuseopt.__path__:
    fuseopt.__path__.append(str(ROOT))  # kernels/ lies beside fuseopt/
import cases  # noqa: E402, F401  also for those that import this
import emulated  # noqa: E402
import measure  # noqa: E402

if DRY:
    import interpreter

    interpreter.mend()

DEVICE = "cpu" if DRY else "cuda"
BACKENDS = ("cuda", "triton")
if DRY and emulated.why_not:
    raise SystemExit(emulated.why_not)


def attempt(run: Callable[[], dict], who: str = "") -> dict:
    """What run() returns, or how it ended, under a key that ends in "error": then the section fails, but goes on."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc(limit=-4)
        return {f"{who}error": f"{type(error).__name__}: {error}"[:300]}


def summary(samples: list[float]) -> dict:
    """What a row says of the times of its runs."""
    found = measure.spread(samples)
    return {"seconds": found["median"], "quartiles": [found["low"], found["high"]], "samples": samples}


def wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Of one run(), by the device's clock."""
    if DRY:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def host_seconds(run: Callable[[], object], repeats: int) -> float:
    """Of one run(), until it returns; the device may be behind."""
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    found = (time.perf_counter() - start) / repeats
    wait()
    return found


def alternated(
    runs: dict[str, Callable], limit: float, clock=seconds, least: int = 5, sample: float = 2e-3
) -> dict[str, list[float]]:
    """Seconds of each, a sample a round; each round takes all, the last round's order backwards."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    repeats = {}
    for name, run in runs.items():
        clock(run, 1)
        repeats[name] = max(1, min(50, round(sample / max(clock(run, 1), 1e-6))))
    start, order = time.perf_counter(), list(runs)
    while len(samples[order[0]]) < least or (time.perf_counter() - start < limit and len(samples[order[0]]) < 200):
        for name in order:
            samples[name].append(clock(runs[name], repeats[name]))
        order.reverse()
        if time.perf_counter() - start > 4 * limit and len(samples[order[0]]) > 1:
            break
    return samples
