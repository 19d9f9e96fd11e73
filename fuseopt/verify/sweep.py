"""`fuseopt verify`: rules x stages x dtypes x backends on this machine, each against an independent float64 copy."""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

import torch

from .. import cpu, cuda, triton_driver
from . import cases, shapes, table
from .cases import DTYPES, RULES, STAGES, TORCH_FUSED
from .table import Cell
from .trial import Trial, check, use_threads

PROG = "fuseopt verify"
BACKENDS = ("cpu", "torch", "cuda", "triton")
DTYPE_NAMES = {**{name: name for name in DTYPES}, **{str(d).removeprefix("torch."): name for name, d in DTYPES.items()}}
AS_STORED = "model"  # the column of --model without --dtypes
ROWS = (*STAGES, TORCH_FUSED)

DESCRIPTION = """
Check fuseopt on this machine: every rule with every stage, in every dtype, on every backend that is here. Each is
run for a few steps on tensors that fill and overhang vectors, blocks and threads, beside torch.optim with separate
passes in float64, and must stay within what roundings allow; what must be exact is compared bit for bit.
Takes about a minute. Exit status: 0 all passed, 1 a check failed, 2 bad input.
"""


@dataclass(frozen=True)
class Sweep:
    """What is asked for. here: why each backend is not on this machine; None where it is."""

    rules: list[cases.Rule]
    stages: list[cases.Stage]
    dtypes: list[str]
    backends: list[str]
    here: dict[str, str | None]
    seed: int
    threads: int
    json: str | None
    model: str | None
    chosen: shapes.Chosen
    narrowed: bool  # --backends was given

    def command(self, rule: cases.Rule, stage: cases.Stage, dtype: str, backend: str) -> str:
        """What runs one cell alone."""
        words = ["fuseopt", "verify", "--rules", rule.name, "--stages", stage.name]
        words += ["--dtypes", dtype] if dtype != AS_STORED else []
        words += ["--backends", backend, "--seed", str(self.seed), "--threads", str(self.threads)]
        return shlex.join(words + (["--model", self.model] if self.model else []))


def main(argv: list[str] | None = None) -> int:
    """Parse, sweep, print; returns the exit status."""
    try:
        sweep = parse(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    out = sys.stderr if sweep.json == "-" else sys.stdout
    start, cells = time.perf_counter(), []
    with use_threads(sweep.threads):
        about = table.machine()
        print(table.header(about, sweep.here, _tensors(sweep)), file=out)
        for backends in table.panels(sweep.backends, sweep.dtypes):
            print(f"\n{table.column_heads(backends, sweep.dtypes)}", file=out, flush=True)
            cells += _rows(sweep, backends, out)
    seconds = time.perf_counter() - start
    print(f"\n{table.footer(cells, seconds)}", file=out, flush=True)
    if sweep.json:
        text = table.as_json(about, sweep.here, _tensors(sweep), sweep.seed, cells, seconds)
        if sweep.json == "-":
            sys.stdout.write(text)
        elif error := _written(sweep.json, text):
            print(f"{PROG}: {error}", file=sys.stderr)
            return 2
    return 1 if any(cell.failed for cell in cells) else 0


def _written(path: str, text: str) -> str | None:
    """Write the JSON file; what went wrong, or None."""
    try:
        table.write_whole(path, text)
    except OSError as error:
        return f"--json {path}: {error.strerror or error}"


def _rows(sweep: Sweep, backends: list[str], out: TextIO) -> Iterator[Cell]:
    """Run and print the rows of one table, cell by cell."""
    rows = [(rule, stage) for rule in sweep.rules for stage in sweep.stages]
    for number, (rule, stage) in enumerate(rows):
        line = f"{rule.name:<{table.RULE}}{stage.name:<{table.STAGE}}"
        for backend in backends:
            for k, dtype in enumerate(sweep.dtypes):
                # Two threads on a busy processor wait long for each other: one cell in turn, and any cell alone.
                threads = max(2, sweep.threads) if k == number % len(sweep.dtypes) else None
                cell = _cell(sweep, rule, stage, dtype, backend, threads)
                print(line, end="", file=out, flush=True)
                line = f"{str(cell):<{table.CELL}}"
                yield cell
        print(line.rstrip(), file=out, flush=True)


def _cell(sweep: Sweep, rule: cases.Rule, stage: cases.Stage, dtype: str, backend: str, threads: int | None) -> Cell:
    """Run one cell."""
    place = (rule.name, stage.name, dtype, backend)
    if skipped := cases.why_not(rule, stage, dtype, backend, sweep.narrowed):
        return Cell(*place, skipped=skipped)
    shapes = sweep.chosen.shapes
    dtypes = sweep.chosen.dtypes if dtype == AS_STORED else (DTYPES[dtype],) * len(shapes)
    like_cpu = backend in ("cuda", "triton") and sweep.here["cpu"] is None and set(dtypes) == {torch.float32}
    trial = Trial(rule, stage, backend, sweep.seed, shapes, dtypes, device_of(backend), threads, like_cpu)
    start = time.perf_counter()
    outcome = check(trial)
    return Cell(*place, outcome, None, time.perf_counter() - start, sweep.command(rule, stage, dtype, backend))


def _tensors(sweep: Sweep) -> list[str]:
    if sweep.model:
        return [f"{sweep.model}: {sweep.chosen.said[0]}", *sweep.chosen.said[1:]]
    return [", ".join(shapes.text(shape) for shape in sweep.chosen.shapes)]


# ---- the backends of this machine ---------------------------------------------------------------------


def device_of(backend: str) -> str:
    """Where a backend's parameters lie."""
    if backend == "cuda":
        return cuda.DEVICE
    return _accelerator() or "cpu" if backend == "triton" else "cpu"


def _accelerator() -> str | None:
    """The kind of GPU that torch finds here."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else None


def availability() -> dict[str, str | None]:
    """Why each backend is not on this machine; None where it is."""
    gpu = _accelerator()
    missing = triton_driver.why_not(gpu) or (None if gpu else "there is no GPU for it to drive")
    return {"cpu": cpu.why_not, "torch": None, "cuda": cuda.unavailable(), "triton": missing}


# ---- the command line ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {PROG} --help)")


def parser() -> Parser:
    stages = "\n".join(f"  {stage.name:<16}{stage.what}" for stage in ROWS)
    out = Parser(
        prog=PROG,
        description=DESCRIPTION,
        epilog=f"stages:\n{stages}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(rule.name for rule in RULES)
    out.add_argument("--rules", nargs="+", metavar="RULE", help=f"only these: {names}")
    out.add_argument("--stages", nargs="+", metavar="STAGE", help="only these; see below")
    out.add_argument("--dtypes", nargs="+", metavar="DTYPE", help=f"only these: {', '.join(DTYPES)}")
    out.add_argument("--backends", nargs="+", metavar="BACKEND", help=f"only these: {', '.join(BACKENDS)}")
    out.add_argument(
        "--model",
        metavar="PATH",
        help="run on the shapes and dtypes of this model: a safetensors file, a file that "
        "torch.load(weights_only=True) reads, a folder with either, or a transformers folder with config.json; "
        "large ones are cut; --dtypes replaces its dtypes",
    )
    out.add_argument("--seed", type=int, default=0, help="of weights, gradients and masks; 0 by default")
    out.add_argument("--threads", type=int, help="that torch may use; torch's own number by default")
    out.add_argument(
        "--json", metavar="FILE", help="write the result here too; -: to standard output, the table to error"
    )
    return out


def parse(argv: list[str]) -> Sweep:
    """Check everything that can be wrong. Raises ValueError or OSError, in one line."""
    given = parser().parse_args(argv)
    here = availability()
    backends = _named("--backends", given.backends, {name: name for name in BACKENDS})
    for name in backends if given.backends else ():
        if here[name]:
            raise ValueError(f"--backends {name}: it is not on this machine: {here[name]}")
    if not 0 <= given.seed < 2**31:
        raise ValueError(f"--seed {given.seed}: give a whole number from 0 to {2**31 - 1}")
    threads = torch.get_num_threads() if given.threads is None else given.threads
    if not 1 <= threads <= 1024:
        raise ValueError(f"--threads {threads}: give a whole number from 1 to 1024")
    if given.json and given.json != "-":
        _check_target(Path(given.json))
    dtypes = list(dict.fromkeys(_named("--dtypes", given.dtypes, DTYPE_NAMES)))
    if given.model:
        chosen, dtypes = shapes.of_model(given.model), dtypes if given.dtypes else [AS_STORED]
    else:
        chosen = shapes.Chosen(cases.SHAPES, (), ())
    return Sweep(
        _named("--rules", given.rules, {rule.name: rule for rule in RULES}),
        _named("--stages", given.stages, {stage.name: stage for stage in ROWS}),
        dtypes,
        [name for name in backends if not here[name]],
        here,
        given.seed,
        threads,
        given.json,
        given.model,
        chosen,
        bool(given.backends),
    )


def _named(option: str, given: list[str] | None, known: dict) -> list:
    """What the names given mean, separated by spaces or commas; everything without any."""
    if given is None:
        return list(known.values())
    out = []
    for name in dict.fromkeys(name for word in given for name in word.split(",") if name):
        if name.lower() not in known:
            raise ValueError(f"{option} {name}: there is no such; choose from: {', '.join(known)}")
        out.append(known[name.lower()])
    return out


def _check_target(path: Path) -> None:
    """Raise ValueError if a file cannot be written there, before a minute is spent."""
    if path.is_dir():
        raise ValueError(f"--json {path}: this is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--json {path}: the folder {path.absolute().parent} does not exist; make it first")
