"""A result file: where and how a run was made, beside its numbers; written whole, read with one line of complaint."""

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fuseopt
from fuseopt import cpu as compiled

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "results"
HEAD = {"command", "date", "machine", "threads", "torch", "fuseopt", "instruction_set", "commit", "uncommitted_changes"}
KINDS = ("cases", "host", "prune", "masks", "scaling", "finetune")  # what a file holds: "cases" is the main table


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git(*words: str) -> str:
    """Output of a git command here; empty where there is no repository."""
    try:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def circumstances(name: str, quick: bool = False) -> dict:
    """Everything about a run but its numbers. name: of the sub-command."""
    native = compiled.native_error()
    words = sys.argv[1:] if sys.argv[1:2] == [name] or name == "step" else [name, *sys.argv[1:]]
    return {
        "command": shlex.join(["python", "-m", "bench", *words]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fuseopt": fuseopt.__version__,
        "instruction_set": compiled.native.instruction_set() if native is None else f"not compiled: {native}",
        "commit": git("rev-parse", "--short", "HEAD") or "no commit",
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "quick": quick,
    }


def count(text: str) -> int:
    """A number from 1 on, such as 1000 or 1e6, as the type of an argument."""
    try:
        if 1 <= float(text) < math.inf:
            return int(float(text))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: give a number, 1 or more")


def common(p: argparse.ArgumentParser) -> None:
    """The arguments that all sub-commands share."""
    p.add_argument("--threads", type=count, help="threads of torch and fuseopt (default: torch's choice)")
    where = "where to write the result (default: bench/results/DATE-COMMIT.json)"
    p.add_argument("--json", type=Path, metavar="PATH", help=where)


def begin(p: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> dict:
    """Sees, before anything is measured, that --json can be written; sets the threads. The head of the result."""
    if args.json:
        try:
            if args.json.is_dir():
                raise OSError("it is a folder, name a file in it")
            args.json.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.json.parent).close()
        except OSError as error:
            p.error(f"--json {args.json} cannot be written: {error}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return circumstances(name, getattr(args, "quick", False))


def finish(args: argparse.Namespace, result: dict, name: str = "") -> Path:
    """Writes the result, under a name that ends in `name` unless --json says where; returns the path."""
    day = result["date"].replace(":", "").replace("-", "")
    words = "-".join(filter(None, (day, result["commit"], name)))
    path = args.json or FOLDER / f"{words}.json"
    write_whole(path, result)
    print(f"\nwritten: {path}")
    return path


def write_whole(path: Path, result: dict) -> None:
    """Write the JSON, or leave what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        try:
            json.dump(result, file, indent=1, allow_nan=False)
            file.write("\n")
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read(path: Path, kind: str | None = None) -> dict:
    """A result that was written by `finish`, of a kind if one is named; exits with one line if it is none."""
    what = {None: "python -m bench", "cases": "python -m bench step"}.get(kind, f"python -m bench {kind}")
    try:
        result = json.loads(path.read_text())
        found = kind_of(result)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} is not a result of {what}: {error}") from None
    if kind not in (None, found):
        raise SystemExit(f"{path} is not a result of {what}, it has {found}")
    return result


def kind_of(result: dict) -> str:
    """Which of KINDS a result holds; ValueError if none."""
    if not isinstance(result, dict):
        raise ValueError("it holds no table")
    for key in KINDS:
        if isinstance(result.get(key), list):
            if missing := ", ".join(sorted(HEAD - result.keys())):
                raise ValueError(f"it lacks {missing}")
            return key
    raise ValueError(f"it has none of {', '.join(KINDS)}")
