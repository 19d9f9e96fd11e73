"""Times the host's part of a step: many small tensors, whose arithmetic is next to nothing.

    python -m bench host                          all cases, about three minutes; JSON in bench/results/
    python -m bench host --cases adamw --shapes 200 --threads 1

fuseopt and torch's fused step (in a full case, the recipe around it) alternate in one run, both verified
first (check.py). A round is taken in three ways:
    hot       several steps of each in a row, with the same gradients: all but the largest lie in the cache
    backward  one step of each, its gradients made by a backward pass just before, which is not timed
    cold      one step of each after a buffer as large as the cache was written
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import check
import measure
import recipes
import record
import report
import torch
from case import Case, Data
from variants import Variant, fused_pass, plain_torch

from fuseopt import cpu

CASES = ("adamw", "sgd", "full")
SHAPES = ("10", "200", "1000")
WAYS = ("hot", "backward", "cold")
HEADS = {"hot": "steps in a row", "backward": "after a backward pass", "cold": "caches flushed"}
TARGETS = {("adamw", "10"): 2.0, ("adamw", "200"): 10.0, ("adamw", "1000"): 12.0}  # hot; torch's time / fuseopt's
PARTS = ("gather", "run", "mark_written", "release")  # what a step asks of the compiled table


def cache_bytes() -> int:
    """The size of the last-level cache; 32 MiB where the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 2**25


def timed_table():
    """A compiled table that notes in `seconds` how long each part takes; 0.1 us a call go to the notes."""

    def timed(name: str) -> Callable:
        call = getattr(cpu.native.TensorTable, name)

        def method(self, *args):
            start = time.perf_counter()
            result = call(self, *args)
            self.seconds[name] += time.perf_counter() - start
            return result

        return method

    table = type("Timed", (cpu.native.TensorTable,), {name: timed(name) for name in PARTS})()
    table.seconds = dict.fromkeys(PARTS, 0.0)
    return table


class Clock:
    """Times steps of a variant in one of the ways."""

    def __init__(self, data: Data, way: str, buffer: torch.Tensor):
        self.way, self.buffer = way, buffer
        self.gradients = [g.clone() for g in data.split(data.gradient)]

    def steps(self, variant: Variant, count: int) -> float:
        """Seconds a step."""
        if self.way == "hot":
            start = time.perf_counter()
            for _ in range(count):
                variant.step()
            return (time.perf_counter() - start) / count
        if self.way == "cold":
            self.buffer.add_(1)
        else:
            variant.opt.zero_grad()
            torch.autograd.backward([(p * g).sum() for p, g in zip(variant.params, self.gradients, strict=True)])
        start = time.perf_counter()
        variant.step()
        return time.perf_counter() - start


def pair(case: Case, data: Data) -> tuple[Variant, Variant]:
    """fuseopt and what it is compared with, both verified; raises SystemExit if one is wrong."""
    if case.full:
        made = fused_pass(case, data, "grad"), recipes.full(case, data, "float", "fused")
    else:
        made = fused_pass(case, data), plain_torch(case, data, "fused")
    for variant in made:
        check.take_steps(data, variant)
    for variant, wrong in zip(made, check.problems(case, data, list(made)), strict=True):
        if wrong:
            raise SystemExit(f"{variant.name} is wrong and was not timed: {wrong}")
        variant.set_gradient(data)
    return made


def rounds(clock: Clock, variants: tuple[Variant, ...], seconds: float, repeats: int) -> list[list[float]]:
    """Seconds a step of each variant, a list each, from rounds that alternate them."""
    samples: list[list[float]] = [[] for _ in variants]
    for variant in variants:
        clock.steps(variant, 3)
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    while time.perf_counter() - start < seconds or len(samples[0]) < 9:
        for k in range(len(variants)) if len(samples[0]) % 2 else reversed(range(len(variants))):
            samples[k].append(clock.steps(variants[k], repeats))
    gc.enable()
    return samples


def breakdown(clock: Clock, variant: Variant, seconds: float, repeats: int) -> dict[str, float]:
    """Where a step of fuseopt goes, in seconds: medians over samples of the same kind."""
    samples: dict[str, list[float]] = {}
    table = variant.opt._table
    timed = variant.opt._table = timed_table()
    count, start = repeats if clock.way == "hot" else 1, time.perf_counter()
    while time.perf_counter() - start < seconds:
        timed.seconds.update(dict.fromkeys(PARTS, 0.0))
        row = {"whole": clock.steps(variant, repeats)}
        row |= {name: value / count for name, value in timed.seconds.items()}
        row["Python"] = row["whole"] - sum(row[name] for name in PARTS)
        for name, value in row.items():
            samples.setdefault(name, []).append(value)
    variant.opt._table = table
    return {name: statistics.median(values) for name, values in samples.items()}


def measure_case(name: str, shape: str, seconds: float) -> list[dict]:
    """A row for each way."""
    case = Case(name, shape)
    data, rows = Data(case), []
    variants = pair(case, data)
    buffer = torch.zeros(cache_bytes() // 4)
    repeats = max(2, 5000 // len(case.shapes))  # of a hot sample
    for way in WAYS if not case.full else ("hot", "cold"):  # a recipe writes its gradients: no backward before each
        clock, others = Clock(data, way, buffer), measure.Others()
        ours, theirs = rounds(clock, variants, seconds, repeats)
        row = {"case": name, "shape": shape, "way": way, "rounds": len(ours), "repeats": repeats}
        row |= {"variants": [v.name for v in variants], "others": others.share()}
        row |= {"fuseopt": measure.spread(ours), "torch": measure.spread(theirs)}
        row |= {"ratio": measure.ratios(theirs, ours), "parts": breakdown(clock, variants[0], seconds / 3, repeats)}
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    """A row as text: times, ratio with quartiles, and where fuseopt's time goes."""
    ratio, us = row["ratio"], {name: f"{1e6 * value:.1f}" for name, value in row["parts"].items()}
    parts = ", ".join(f"{name} {us[name]}" for name in us if name != "whole")
    busy = "  BUSY" if row["others"] is not None and row["others"] > report.BUSY else ""
    return (
        f"{row['case']:<6}{row['shape']:>5}  {row['way']:<9}"
        f"{report.duration(row['fuseopt']['median']):>9}{report.duration(row['torch']['median']):>9}"
        f"  x{ratio['median']:<6.2f}({ratio['low']:.2f} .. {ratio['high']:.2f})  {parts}{busy}"
    )


def verdicts(rows: list[dict]) -> str:
    """The targets with what the run measured."""
    lines = []
    for row in rows:
        least = TARGETS.get((row["case"], row["shape"]))
        if least and row["way"] == "hot":
            value = row["ratio"]["median"]
            word = "reached" if value >= least else "MISSED"
            lines.append(f"  {word:<8}{value:6.2f} >= {least:<4g} {row['case']}, {row['shape']} tensors of 64")
    return "targets: torch fused takes this many times as long\n" + "\n".join(lines) if lines else ""


def markdown(results: list[dict]) -> str:
    """AdamW: torch's time relative to fuseopt's, a line a number of tensors, for each run (one a number of threads)."""
    columns = [(result, way) for way in WAYS for result in results]
    head = [
        "tensors",
        *(f"{HEADS[way]}, {result['threads']} thread{'s' * (result['threads'] > 1)}" for result, way in columns),
    ]
    lines = []
    for shape in SHAPES:
        cells = [
            f"x{row['ratio']['median']:.2f} ({report.duration(row['fuseopt']['median'])})"
            for result, way in columns
            for row in result["host"]
            if (row["case"], row["shape"], row["way"]) == ("adamw", shape, way)
        ]
        lines.append([shape, *cells])
    made = [f"`{result['command']}` on {report.machine(result)}." for result in results]
    return "\n".join([*report.grid(head, lines), "", *made])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m bench host", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=" ".join(CASES))
    p.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="N", help=" ".join(SHAPES))
    p.add_argument("--seconds", type=float, default=4.0, help="a way of a case (default: 4)")
    record.common(p)
    args = p.parse_args(argv)
    result = record.begin(p, args, "host")
    print(report.machine(result) + "\n\ncase, tensors, way, fuseopt, torch, ratio (quartiles), parts of fuseopt in us")
    result["host"] = [
        row for name in args.cases for shape in args.shapes for row in measure_case(name, shape, args.seconds)
    ]
    print("\n" + verdicts(result["host"]))
    record.finish(args, result, f"host-{result['threads']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
