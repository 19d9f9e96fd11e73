"""What `fuseopt verify` prints: the machine, a row a rule and stage, the totals; and the same as JSON."""

import json
import math
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fuseopt

from .cases import STEPS
from .trial import Outcome

RULE, STAGE, CELL = 8, 16, 7  # widths: 80 columns with two backends and four dtypes


@dataclass(frozen=True)
class Cell:
    """One trial's place in the table and what came of it. skipped: why there is no such trial."""

    rule: str
    stage: str
    dtype: str
    backend: str
    outcome: Outcome = field(default_factory=Outcome)
    skipped: str | None = None
    seconds: float = 0.0
    repeat: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.outcome.failures)

    def __str__(self) -> str:
        share = self.outcome.share
        if self.skipped:
            return "-"
        if self.failed:
            return "FAIL" if share <= 1 else f"FAIL {share:.0f}" if share < 9.5 else "FAIL>9"
        return "ok   0" if share == 0 else "ok 1.0" if share > 0.994 else f"ok {share:.2f}".replace("0.", ".")

    def plain(self) -> dict:
        """For JSON, which has no infinity."""
        result = "skipped" if self.skipped else "fail" if self.failed else "ok"
        share = self.outcome.share if math.isfinite(self.outcome.share) else None
        out = {"rule": self.rule, "stage": self.stage, "dtype": self.dtype, "backend": self.backend, "result": result}
        if self.skipped:
            return out | {"why": self.skipped}
        out |= {"share_of_bound": share, "seconds": round(self.seconds, 4), "repeat": self.repeat}
        return out | {"failures": self.outcome.failures}


def machine() -> dict:
    """What the figures belong to."""
    from .. import cpu

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instruction_set": cpu.native.instruction_set() if cpu.native else None,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fuseopt": fuseopt.__version__,
    }


def _processor() -> str:
    """The processor's name; Python's own is empty on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown processor"


def header(about: dict, backends: dict[str, str | None], tensors: list[str]) -> str:
    """The lines above the table. backends: why each is not here; tensors: what the sweep runs on."""
    named = {"cpu": f"cpu ({about['instruction_set']})", "torch": "torch (plain operations)"}
    here = [named.get(name, name) for name, why in backends.items() if not why]
    lines = [
        f"fuseopt {about['fuseopt']}, torch {about['torch']}, Python {about['python']}, {about['threads']} threads",
        f"machine   {about['processor']}, {about['cores']} cores, {about['system']}",
        f"backends  {', '.join(here)}",
        *(f"  not here: {name}: {why}" for name, why in backends.items() if why),
        f"tensors   {'; '.join(tensors[:1])}",
        *(f"          {line}" for line in tensors[1:]),
        f"Each cell: {STEPS} steps against torch.optim and separate passes in float64; the same bits when saved and",
        "loaded halfway (one cell of a row: with all threads too); gradients not written; every free entry moved.",
    ]
    return "\n".join(line.rstrip() for line in lines)


def panels(backends: list[str], dtypes: list[str]) -> list[list[str]]:
    """The backends that stand side by side in one table, as wide as the terminal."""
    fit = max(1, (shutil.get_terminal_size((100, 24)).columns - RULE - STAGE + 1) // (CELL * len(dtypes)))
    return [backends[k : k + fit] for k in range(0, len(backends), fit)]


def column_heads(backends: list[str], dtypes: list[str]) -> str:
    width = CELL * len(dtypes)
    first = " " * (RULE + STAGE) + "".join(f"{name:<{width}}" for name in backends)
    second = f"{'rule':<{RULE}}{'stage':<{STAGE}}" + "".join(f"{dtype:<{CELL}}" for dtype in dtypes) * len(backends)
    return f"{first.rstrip()}\n{second.rstrip()}"


def footer(cells: list[Cell], seconds: float) -> str:
    """What the marks mean, the failures with the commands that repeat them, the totals."""
    lines = [
        "ok .43: the greatest difference is 0.43 of what roundings allow; beyond 1 it is FAIL. In 16 bits 1 is usual:",
        "a value between two neighbours may be rounded to either.",
    ]
    reasons: dict[str, set] = {}
    for cell in cells:
        if cell.skipped:
            reasons.setdefault(cell.skipped, set()).add(f"{cell.rule} {cell.stage}")
    lines += [f"-: {why}" for why in reasons]
    failed = [cell for cell in cells if cell.failed]
    for cell in failed:
        more = f" (and {len(cell.outcome.failures) - 1} more)" if cell.outcome.failures[1:] else ""
        name = f"{cell.rule} {cell.stage} {cell.dtype} {cell.backend}"
        lines.append(f"FAIL {name}: {cell.outcome.failures[0]}{more}; alone: {cell.repeat}")
    run = sum(not cell.skipped for cell in cells)
    total = f"{len(failed)} of {run} failed" if failed else f"all {run} passed"
    return "\n".join([*lines, f"{'FAIL' if failed else 'PASS'}: {total}, {seconds:.0f} s"])


def as_json(about: dict, backends: dict, tensors: list[str], seed: int, cells: list[Cell], seconds: float) -> str:
    run = [cell for cell in cells if not cell.skipped]
    content = {
        "passed": bool(run) and not any(cell.failed for cell in run),
        "machine": about,
        "backends": {name: {"available": not why, "why_not": why} for name, why in backends.items()},
        "tensors": tensors,
        "seed": seed,
        "seconds": round(seconds, 2),
        "counts": {"run": len(run), "failed": sum(cell.failed for cell in run), "skipped": len(cells) - len(run)},
        "cells": [cell.plain() for cell in cells],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_whole(path: str, text: str) -> None:
    """Write a file, or leave what is there. Raises OSError."""
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as scratch:
        (Path(scratch) / "new").write_text(text)
        os.replace(Path(scratch) / "new", target)
