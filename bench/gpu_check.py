"""Checks and times the GPU backends on a GPU, in one command of under eight minutes and without a network.

    python bench/gpu_check.py                        builds in place, all sections; bench/results/gpu-*.json and .md
    python bench/gpu_check.py --only bits roofline   some of them
    python bench/gpu_check.py --dry --out /tmp/dry   without a GPU: tiny, on the tests' stand-ins, to see that it runs

Each section is a process of its own and has a limit in seconds; what it found counts even if it fails or is stopped.
The results are written after each. The exit status is 1 if a section failed.
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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMITS = {  # seconds, in the order of the run
    "build": 120, "tests": 150, "bits": 60, "scalars": 30, "roofline": 110, "full": 90, "host": 40, "select": 40,
    "sanitizer": 60,
}  # fmt: skip
PROBE = """
import sys
sys.path.insert(0, "bench")
import gpu_place, gpu_bits, fuseopt
opt = gpu_bits.one_entry(lr=1e-3, max_grad_norm=1.0, ema=fuseopt.EMA(0.9), statistics=True)
for _ in range(3):
    opt.step()
print(dict(opt.statistics()))
"""


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
            "seconds for all": round(time.perf_counter() - start),
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
    """compute-sanitizer over a few steps with clipping, an average and statistics."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None or os.environ["FUSEOPT_TEST_DEVICE"] != "cuda":
        yield {
            "tool": "none",
            "result": "not run: " + ("there is no GPU" if program else "compute-sanitizer was not found"),
        }
        return
    wrong = []
    for name in ("memcheck", "racecheck"):
        words = [program, "--tool", name, "--error-exitcode", "9", sys.executable, "-c", PROBE]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        said = [line for line in (done.stdout + done.stderr).splitlines() if "SUMMARY" in line or "Error" in line]
        wrong += [name] * bool(done.returncode)
        yield {"tool": name, "result": "; ".join(said[-3:]), "exit status": done.returncode}
    if wrong:
        raise RuntimeError(f"compute-sanitizer found something with {' and '.join(wrong)}")


# ---- one section, in a process of its own -------------------------------------------------------------------


def section(name: str, path: Path) -> None:
    """Run it; a row is a line of JSON at once, so that one that is stopped leaves what it had."""
    if name in globals():
        rows = globals()[name]()
    else:
        import gpu_bits
        import gpu_speed

        rows = (getattr(gpu_bits, name, None) or getattr(gpu_speed, name))()
    with path.open("a") as file:
        for row in rows:
            print(json.dumps(row), file=file, flush=True)


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


def markdown(result: dict) -> str:
    """The result as tables, one a section."""
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in result["machine"].items())]
    for name, found in result["sections"].items():
        lines += ["", f"## {name} ({found['seconds']:g} s)", ""]
        if found["error"]:
            lines += ["FAILED:", "", "```", found["error"].strip(), "```", ""]
        columns = list(dict.fromkeys(key for row in found["rows"] for key in row))
        if columns:
            lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(str(row.get(key, "")) for key in columns) + " |" for row in found["rows"]]
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
    p.add_argument("--minutes", type=float, default=7.5, help="for all sections together (default: 7.5)")
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
