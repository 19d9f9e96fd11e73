"""Time of an AdamW step (fp32) against the number of parameters and against threads: fuseopt and torch's fused step.

    python -m bench scaling                        1e3 to 1e9 parameters as memory allows, 1 to all threads; minutes
    python -m bench scaling --sizes 1e4 1e6 --threads-at 1e6
    python -m bench scaling --plot RESULT.json

One tensor. Both step the same memory in turn, which then has to hold 16 bytes a parameter once. Before it is timed
each takes a step that is compared with float64 on a million entries spread over the tensor.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import measure
import record
import report
import torch
from torch import Tensor

import fuseopt

SIZES = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
THREADS_AT = (10**5, 10**7)
BYTES = 16  # a parameter: weight, gradient, two moments
SPARE = 2**30  # bytes left free
NAMES = ("fuseopt", "torch fused")
OPTIONS = {"lr": 1e-6, "weight_decay": 0.01}
SAMPLE = 10**6  # entries that are compared
BOUND = 1e-4  # of the greatest change that is expected; fp32 rounds the weights by less


class Steps:
    """Both optimizers over one memory."""

    def __init__(self, n: int):
        self.streams = [torch.full((n,), 0.5), torch.rand(n).add_(0.5), torch.zeros(n), torch.ones(n)]
        p, gradient, m, v = self.streams
        self.run: dict[str, Callable] = {}
        for name, cls, more in zip(NAMES, (fuseopt.AdamW, torch.optim.AdamW), ({}, {"fused": True}), strict=True):
            parameter = torch.nn.Parameter(p)
            parameter.grad = gradient
            opt = cls([parameter], **OPTIONS, **more)
            opt.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": m, "exp_avg_sq": v}
            self.run[name] = opt.step

    def problem(self, name: str) -> str | None:
        """What is wrong with a step of one of them, from the state that a fresh Steps has; None if nothing is."""
        p, g, m, v = (x[:: max(1, len(x) // SAMPLE)].clone() for x in self.streams)
        expected = one_step(p.double(), g.double(), m.double(), v.double())
        self.run[name]()
        for was, right, whole in zip((p, m, v), expected, (self.streams[0], *self.streams[2:]), strict=True):
            got, change = whole[:: max(1, len(whole) // SAMPLE)].double(), (right - was.double()).abs().max()
            allowed = BOUND * change + 2 * torch.finfo(torch.float32).eps * right.abs()
            if not bool(((got - right).abs() <= allowed).all()):
                return "the step differs from the same one in float64"
        return None

    def fresh(self) -> None:
        """The weights and moments as they were at first."""
        for x, value in zip((self.streams[0], *self.streams[2:]), (0.5, 0.0, 1.0), strict=True):
            x.fill_(value)


def one_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW's second step, by torch's plain loop in float64."""
    opt = torch.optim.AdamW([p], **OPTIONS)
    p.grad = g
    opt.state[p] = {"step": torch.tensor(1.0), "exp_avg": m, "exp_avg_sq": v}
    opt.step()
    return p, m, v


def measure_size(n: int, threads: int, seconds: float) -> dict:
    """A row: both optimizers at one size, or why there is none."""
    row = {"elements": n, "threads": threads}
    free = measure.free_memory()
    if free is not None and BYTES * n + SPARE > free:
        return row | {"skipped": f"needs {BYTES * n / 1e9:.0f} GB and 1 GiB to spare, {free / 1e9:.1f} GB are free"}
    torch.set_num_threads(threads)
    both = Steps(n)
    for name in NAMES:
        if wrong := both.problem(name):
            raise SystemExit(f"{name}, {n} parameters: {wrong}")
        both.fresh()
    others, samples = measure.Others(), alternated(both.run, seconds)
    row |= {name: measure.spread(samples[name]) for name in NAMES}
    row |= {"ratio": measure.ratios(samples[NAMES[1]], samples[NAMES[0]]), "rounds": len(samples[NAMES[0]])}
    return row | {"others": others.share()}


def alternated(run: dict[str, Callable], seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Seconds a step of each, from rounds that take them in turn, first one way, then the other."""
    repeats = {name: measure.repeats(step, 1e-3) for name, step in run.items()}
    samples: dict[str, list[float]] = {name: [] for name in run}
    start = time.perf_counter()
    while len(samples[NAMES[0]]) < least or time.perf_counter() - start < seconds:
        for name in NAMES if len(samples[NAMES[0]]) % 2 else NAMES[::-1]:
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                run[name]()
            samples[name].append((time.perf_counter() - begin) / repeats[name])
    return samples


def line(row: dict) -> str:
    """A row as text."""
    head = f"{row['elements']:>13,} parameters, {row['threads']} threads  "
    if "skipped" in row:
        return head + f"skipped: {row['skipped']}"
    ratio, times = row["ratio"], [report.duration(row[name]["median"]) for name in NAMES]
    busy = "  BUSY" if row["others"] is not None and row["others"] > report.BUSY else ""
    return (
        head + f"x{ratio['median']:.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})  {times[0]:>9}{times[1]:>9}{busy}"
    )


def markdown(results: list[dict]) -> str:
    """Sizes, then threads."""
    rows, result = [], results[0]
    for row in result["scaling"]:
        if "skipped" in row:
            cells = [f"skipped: {row['skipped']}", "", ""]
        else:
            cells = [*(report.duration(row[name]["median"]) for name in NAMES), f"x{row['ratio']['median']:.2f}"]
        rows.append([f"{row['elements']:,}", str(row["threads"]), *cells])
    table = report.grid(["parameters", "threads", *NAMES, "torch / fuseopt"], rows)
    return "\n".join([*table, "", f"`{result['command']}` on {report.machine(result)}."])


def counts() -> list[int]:
    """1, 2, 4, ... threads, and as many as there are processors."""
    most = os.cpu_count() or 1
    return sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {most})


def main(argv: list[str] | None = None) -> int:
    how = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("python -m bench scaling", description=__doc__, formatter_class=how, allow_abbrev=False)
    for option, nargs, default, words in (
        ("--sizes", "+", SIZES, "parameters (default: 1e3 to 1e9)"),
        ("--threads-at", "*", THREADS_AT, "sizes at which the threads vary (default: 1e5 1e7)"),
    ):
        p.add_argument(option, nargs=nargs, type=record.count, default=default, metavar="N", help=words)
    p.add_argument("--seconds", type=float, default=3.0, help="a row, beside setting up (default: 3)")
    p.add_argument("--plot", type=Path, metavar="RESULT", help="draw a result beside it and exit")
    record.common(p)
    args = p.parse_args(argv)
    if args.plot:
        return draw(record.read(args.plot, "scaling"), args.plot)
    result = record.begin(p, args, "scaling") | {"scaling": []}
    print(report.machine(result) + "\n\ntorch fused / fuseopt (quartiles), fuseopt, torch fused")
    todo = [(n, result["threads"]) for n in args.sizes]
    todo += [(n, k) for n in args.threads_at for k in counts() if (n, k) not in todo]
    for n, threads in todo:
        result["scaling"].append(measure_size(n, threads, args.seconds))
        print(line(result["scaling"][-1]), flush=True)
    return draw(result, record.finish(args, result, "scaling"))


def draw(result: dict, path: Path) -> int:
    try:
        import plot
    except ModuleNotFoundError as error:
        print(f"no picture: {error}")
        return 0
    print(f"written: {plot.scaling(result, path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
