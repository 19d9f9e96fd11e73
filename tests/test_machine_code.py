"""The kernels' machine code is as it must be, and bench/machine_code.py sees it when it is not."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which(os.environ.get("NVCC", "nvcc"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is missing, which brings the disassembler"
)

RUNTIME_BYTES = 700_000  # of CUDA's static runtime, without a kernel
MODULE_BYTES = 1_000_000

# name: backend, file, what is planted in it (old, new), what the script must say. For one GPU, of Triton Adam alone.
FAULTS = {
    "scalar loads": ("cuda", "csrc/cuda/block.h", "if (whole) {\n    v", "if (false) {\n    v", "0 loads of 16 bytes, not 6"),
    "scalar stores": ("cuda", "csrc/cuda/block.h", "if (whole) {\n    *", "if (false) {\n    *", "0 stores of 16 bytes, not 5"),
    "many threads": ("cuda", "csrc/cuda/step.cu", "? 512 : 1024", "? 512 : 2048", "spills"),
    "few threads": ("triton", "kernels/aot.py", "else 256) // size", "else 64) // size", "registers, more than"),
    "a mask": ("triton", "kernels/step.py", "at, None, s, r", "at, alive(row, at), s, r", "0 loads of 16 bytes"),
    "a mask in the norm": ("triton", "kernels/reduce.py", "lanes = squares_of_tile(lanes, row, begin + t * TILE, None, s, g, MASKED)", "lanes = squares_of_tile(lanes, row, begin + t * TILE, alive(row, begin + t * TILE), s, g, MASKED)", "0 loads of 16 bytes, not 1"),
    "no promise of alignment": (
        "triton",
        "kernels/table.py",
        "tl.multiple_of(base + at, 16)",
        "base + at",
        "0 stores of 16 bytes",
    ),
}


KINDS = {"a mask in the norm": "norm"}  # which of Triton's kernels show it; all others in the update


def run(*arguments):
    """bench/machine_code.py in a process in which triton does not interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, ROOT / "bench/machine_code.py", *arguments]
    return subprocess.run(words, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("kernels", ("cuda", "triton"))  # no `backend`, of which conftest.py leaves out Triton's
def test_vectors_and_registers(kernels):
    if kernels == "cuda" and not (NVCC or list((ROOT / "fuseopt").glob("_CUDA*.so"))):
        pytest.skip("fuseopt._CUDA is not built and nvcc was not found")
    one = ["--archs", "90"] if kernels == "triton" else []  # of four, which take a minute to compile; all: the script
    done = run("--only", kernels, *one)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"\n{kernels} ") >= 28  # a line each: 13 kernels of CUDA for three GPUs, 28 of Triton


def test_the_module_is_small():
    modules = list((ROOT / "fuseopt").glob("_CUDA*.so"))
    if not modules:
        pytest.skip("fuseopt._CUDA is not built")
    assert modules[0].stat().st_size < RUNTIME_BYTES + MODULE_BYTES


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path):
    backend, name, old, new, said = FAULTS[fault]
    if backend == "cuda" and NVCC is None:
        pytest.skip("nvcc was not found")
    for part in ("csrc", "kernels", "setup.py"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / part)
    plant(tmp_path / name, old, new)
    plant(tmp_path / "kernels/rules.py", '    "adam_amsgrad"', '}\nOTHERS = {\n    "adam_amsgrad"')
    done = run("--only", backend, "--root", tmp_path, "--archs", "90", "--kinds", KINDS.get(fault, "step"))
    assert done.returncode == 1 and said in done.stdout, done.stdout + done.stderr


def plant(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} no longer has {old!r}"
    path.write_text(text.replace(old, new))
