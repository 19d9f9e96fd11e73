"""Checks and times the GPU backends on a GPU, in one command of nine minutes at most and without a network.

    python bench/gpu_check.py                        builds in place, all sections; bench/results/gpu-*.json and .md
    python bench/gpu_check.py --only bits roofline   some of them
    python bench/gpu_check.py --dry --out /tmp/dry   without a GPU: tiny, on the tests' stand-ins, to see that it runs

Each section is a process of its own and has a limit in seconds; what it found counts even if it fails or is stopped.
What fails in a section is a row with an error; the others go on. The results are written after each section, the JSON
with the raw samples. The exit status is 1 if something failed.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from report import duration

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMITS = {  # seconds, in the order of the run: the figures first, as there may be no time for the rest
    "build": 120, "bits": 60, "roofline": 110, "full": 90, "host": 40, "scalars": 30, "select": 40, "tests": 150,
    "sanitizer": 60,
}  # fmt: skip
NOTES = {
    "bits": "Entries that differ from the CPU's. A NaN equals a NaN where it is rounding that is compared.",
    "roofline": "Plain AdamW. No share of a copy where less than twice the L2 is read and written.",
    "full": "mask + clip + decay + AdamW + prune + EMA; the mode says what the mask does.",
    "host": "AdamW, and with all stages mask + clip + decay + AdamW + threshold + EMA. The arguments of a launch hold "
    "the rows of some hundred tensors, so that 1000 take several launches.",
    "scalars": "Formed on the device against formed on the host.",
}

# ---- sections that are other programs; each yields rows ----------------------------------------------------


def build() -> Iterator[dict]:
    """fuseopt._C and fuseopt._CUDA, in place."""
    start = time.perf_counter()
    words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(words, cwd=ROOT, check=True, env=os.environ | {"FUSEOPT_NATIVE": "1", "FUSEOPT_CUDA": "1"})
    for module in sorted((ROOT / "fuseopt").glob("_C*.so")):
        yield {
            "module": module.name,
            "bytes": module.stat().st_size,
            "seconds": time.perf_counter() - start,
        }


def tests() -> Iterator[dict]:
    """tests/test_gpu.py, on the GPU itself: what failed, then pytest's last line."""
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=line", "tests/test_gpu.py"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last, shown = "", 0
    for line in process.stdout:
        last = line.strip() or last
        if (" FAILED" in line or " ERROR" in line) and shown < 30:
            shown += 1
            yield {"result": last}
    yield {"result": last}
    if process.wait():
        raise RuntimeError(f"pytest ended with {process.returncode}")


def sanitizer() -> Iterator[dict]:
    """compute-sanitizer over bench/gpu_probe.py; the probe alone where there is none."""
    probe = [sys.executable, str(HERE / "gpu_probe.py")]
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None or os.environ["FUSEOPT_TEST_DEVICE"] != "cuda":
        yield ran("none: " + ("there is no GPU" if program else "compute-sanitizer was not found"), probe)
        return
    for name in ("memcheck", "racecheck"):
        yield ran(name, [program, "--tool", name, "--error-exitcode", "9", *probe])


def ran(tool: str, words: list[str]) -> dict:
    """The row of a run, with an error if it found something."""
    start = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    said = [line for line in lines if "SUMMARY" in line or "Error" in line or line.startswith("stepped")]
    row = {"tool": tool, "result": "; ".join(said[-4:]), "seconds": time.perf_counter() - start}
    return row | ({"error": f"exit status {done.returncode}"} if done.returncode else {})


# ---- one section, in a process of its own -------------------------------------------------------------------


def section(name: str, path: Path) -> None:
    """Run it; a row is a line of JSON at once, so that one that is stopped leaves what it had."""
    if name in globals():
        rows = globals()[name]()
    else:
        import gpu_bits
        import gpu_speed

        rows = (getattr(gpu_bits, name, None) or getattr(gpu_speed, name))()
    failed = 0
    with path.open("a") as file:
        for row in rows:
            print(json.dumps(row), file=file, flush=True)
            failed += any(key.endswith("error") for key in row)
    if failed:
        raise SystemExit(f"{failed} rows say what failed")


def run_section(name: str, limit: float, dry: bool, folder: Path) -> dict:
    """{"rows", "seconds", "error": None or what went wrong}."""
    path, start, error = folder / f".{name}.rows", time.perf_counter(), None
    path.write_text("")
    env = os.environ | {"FUSEOPT_TEST_DEVICE": "" if dry else "cuda", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, __file__, "--section", name, str(path)]
    process = subprocess.Popen(words, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=limit)
        if process.returncode:
            error = said[-2000:] or f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        error = f"stopped after {limit:.0f} s"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return {"rows": rows, "seconds": round(time.perf_counter() - start, 1), "error": error}


# ---- the report ------------------------------------------------------------------------------------------


def machine(args: argparse.Namespace) -> dict:
    """What was checked, and where."""
    import torch

    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip() if smi else ""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    found = {"dry run, on stand-ins: no figure here means anything": True} if args.dry else {}
    return found | {
        "GPU, driver": gpu or "none",
        "torch": torch.__version__, "CUDA of torch": torch.version.cuda, "triton": version,
        "nvcc": (re.findall(r"release [\d.]+", output("nvcc", "--version")) or ["not found"])[0],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": args.commit or output("git", "-C", str(ROOT), "describe", "--always", "--dirty").strip() or "unknown",
        "command": shlex.join(["python", "bench/gpu_check.py", *sys.argv[1:]]),
    }  # fmt: skip


def output(*words: str) -> str:
    program = shutil.which(words[0]) or shutil.which(words[0], path="/usr/local/cuda/bin")
    return subprocess.run([program, *words[1:]], capture_output=True, text=True).stdout if program else ""


FORMATS = {
    "seconds": duration,
    "quartiles": lambda values: " .. ".join(map(duration, values)),
    "ratio": "{:.3g}".format,
    "of copy": "{:.1%}".format,
    "bytes": "{:,.0f}".format,
    "bytes/s": lambda value: f"{value / 1e9:.4g} GB/s",
}


def cell(row: dict, key: str) -> str:
    """One value as the table shows it; errors have lines and bars."""
    value = row.get(key)
    text = "" if value is None else FORMATS.get(key, str)(value)
    return " ".join(text.split()).replace("|", "/")


def markdown(result: dict) -> str:
    """The result as tables, one a section."""
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in result["machine"].items())]
    for name, found in result["sections"].items():
        lines += ["", f"## {name} ({found['seconds']:g} s)", ""]
        if found["error"]:
            lines += ["FAILED:", "", "```", found["error"].strip(), "```", ""]
        lines += [NOTES[name], ""] if name in NOTES else []
        columns = [key for key in dict.fromkeys(key for row in found["rows"] for key in row) if key != "samples"]
        if columns:
            lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(cell(row, key) for key in columns) + " |" for row in found["rows"]]
    return "\n".join(lines) + "\n"


def write(result: dict, folder: Path, name: str) -> None:
    """Both files, whole: under another name first."""
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", markdown(result))):
        path = folder / f".{name}{suffix}.tmp"
        path.write_text(text)
        os.replace(path, folder / f"{name}{suffix}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="SECTION", help=" ".join(LIMITS))
    p.add_argument("--minutes", type=float, default=9.0, help="for all sections together (default: 9)")
    p.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results (default: bench/results)")
    p.add_argument("--commit", help="what to record where there is no git repository")
    p.add_argument("--dry", action="store_true", help="without a GPU, tiny, on stand-ins; needs --out; builds nothing")
    p.add_argument("--section", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.section:
        section(args.section[0], Path(args.section[1]))
        return 0
    if args.dry and args.out == HERE / "results":
        p.error("--dry: its figures mean nothing; name another folder with --out")
    args.out.mkdir(parents=True, exist_ok=True)
    start, result = time.perf_counter(), {"machine": machine(args), "sections": {}}
    name = time.strftime("gpu-%Y%m%dT%H%M%SZ", time.gmtime())
    for one in [s for s in LIMITS if s in args.only and not (args.dry and s in ("build", "tests"))]:
        limit = min(LIMITS[one], 60 * args.minutes - (time.perf_counter() - start))
        rows = (
            run_section(one, limit, args.dry, args.out)
            if limit > 5
            else {"rows": [], "seconds": 0, "error": "no time was left"}
        )
        result["sections"][one] = rows
        said = (rows["error"] or "done").strip().splitlines()[-1]
        print(f"{one}: {said} ({len(rows['rows'])} rows, {rows['seconds']} s)", flush=True)
        write(result, args.out, name)
    print(markdown(result) + f"\nwritten: {args.out / name}.json, .md")
    return 1 if any(s["error"] for s in result["sections"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
