"""Times an optimizer step: fuseopt against torch's optimizers and recipes with separate passes.

    python bench/step.py                          all cases, about four minutes; JSON in bench/results/
    python bench/step.py --quick                  small tensors and few rounds, to see that it runs
    python bench/step.py --cases full --shapes one fifty
    python bench/step.py --markdown RESULT.json   the tables of a README, from a run's JSON

Every variant is verified first against float64 (check.py) and not timed if that fails; then rounds alternate
all variants and the bandwidth kernels in random order (measure.py). The exit status is 1 if a check failed.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, used for one step a variant, prints

import report
import torch
from measure import Settings, run_case
from variants import CASES, SHAPES, Case

import fuseopt
from fuseopt import cpu as compiled

HERE = Path(__file__).resolve().parent


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="small and short; writes JSON only with --json")
    p.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="where to write it (default: bench/results/DATE-COMMIT.json)",
    )
    p.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=" ".join(CASES)
    )
    p.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE", help=" ".join(SHAPES)
    )
    p.add_argument("--threads", type=int, help="threads of torch and fuseopt (default: torch's choice)")
    p.add_argument(
        "--markdown", type=Path, metavar="RESULT", help="print the tables of an earlier result and exit"
    )
    args = p.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        p.error(f"--threads {args.threads}: give at least 1")
    return args


def settings(quick: bool) -> Settings:
    """How long a case may take."""
    if quick:
        return Settings(seconds_small=0.3, least_rounds=5, most_rounds=30)
    return Settings()


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
        return subprocess.run(
            ["git", *words], cwd=HERE, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def circumstances(args: argparse.Namespace) -> dict:
    """Everything about a run but its numbers."""
    changed = git("status", "--porcelain", "--untracked-files=no")
    native = compiled.native_error()
    return {
        "command": shlex.join(["python", "bench/step.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fuseopt": fuseopt.__version__,
        "instruction_set": compiled.native.instruction_set()
        if native is None
        else f"not compiled: {native}",
        "commit": git("rev-parse", "--short", "HEAD") or "no commit",
        "uncommitted_changes": bool(changed),
        "quick": args.quick,
    }


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


def common(p: argparse.ArgumentParser) -> None:
    """The arguments that the other scripts share."""
    p.add_argument("--threads", type=int, help="threads of torch and fuseopt (default: torch's choice)")
    p.add_argument("--json", type=Path, metavar="PATH", help="where to write it (default: bench/results/)")


def begin(p: argparse.ArgumentParser, args: argparse.Namespace, script: str) -> dict:
    """Checks and sets the threads; the head of the script's result."""
    if args.threads is not None and args.threads < 1:
        p.error(f"--threads {args.threads}: give at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.quick = False
    return circumstances(args) | {"command": shlex.join(["python", f"bench/{script}.py", *sys.argv[1:]])}


def finish(args: argparse.Namespace, result: dict, name: str) -> None:
    """Writes the script's result, under `name` unless --json says where."""
    day = result["date"].replace(":", "").replace("-", "")
    path = args.json or HERE / "results" / f"{day}-{result['commit']}-{name}.json"
    write_whole(path, result)
    print(f"\nwritten: {path}")


def read(path: Path) -> dict:
    """A result that was written by `write_whole`; exits with one line if there is none."""
    try:
        result = json.loads(path.read_text())
        result["cases"]
        return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a result of bench/step.py: {error}") from None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.markdown:
        print(report.markdown(read(args.markdown)))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    result = {**circumstances(args), "cases": []}
    print(report.machine(result))
    for name in args.cases:
        for shape in args.shapes:
            result["cases"].append(run_case(Case(name, shape, args.quick), settings(args.quick)))
            print("\n" + report.table(result["cases"][-1]), flush=True)
    print("\n" + report.targets(result) + "\n\n" + report.NOTES)
    path = args.json
    if path is None and not args.quick:
        day = result["date"].replace(":", "").replace("-", "")
        path = HERE / "results" / f"{day}-{result['commit']}.json"
    if path is not None:
        write_whole(path, result)
        print(f"\nwritten: {path}")
    return 0 if all(row["verified"] for case in result["cases"] for row in case["variants"]) else 1


if __name__ == "__main__":
    sys.exit(main())
