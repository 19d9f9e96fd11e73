"""That the CUDA kernels are right is seen in the emulation; here, that it shows when they are not."""

import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from cases import all_params, assert_same_bits, like, parameters, run

import fuseopt
from fuseopt import cpu, cuda

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(bool(emulated.why_not or cpu.native_error()), reason=str(emulated.why_not))

FAULTS = {  # in csrc/cuda: file, what becomes what
    "the last elements of a tensor are left out": ("step.cu", "if (i >= head.n) break;", "if (i + n > head.n) break;"),
    "the norm is read before all have added to it": ("block.h", "  __syncthreads();\n", "  \n"),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A module with both faults: one takes half a minute to compile. Each is looked for where the other is not."""
    folder = tmp_path_factory.mktemp("broken")
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in FAULTS.values():
        file = folder / "csrc/cuda" / name
        text = file.read_text()
        assert old in text, f"{name} no longer has {old!r}"
        file.write_text(text.replace(old, new))
    done = subprocess.run([sys.executable, folder / "tests/emulation/build.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from emulation import build

    right = cuda.native
    emulated.put_in_place(build.load_from(Path(done.stdout.strip()), "broken"))
    yield
    emulated.put_in_place(right)


def bits_agree(shapes, **options) -> bool:
    """Whether two steps on the CPU and on CUDA end with the same bits."""
    a = parameters(shapes)
    b = like(a)
    opts = [fuseopt.AdamW(x, lr=0.1, backend=name, **options) for x, name in ((a, "cpu"), (b, "cuda"))]
    for opt in opts:
        run(opt, all_params(opt), 2)
    try:
        for p, q in zip(a, b, strict=True):
            assert_same_bits(p, q)
    except AssertionError:
        return False
    return True


def test_a_missing_tail_and_a_missing_barrier_are_seen(broken):
    assert bits_agree([(4096,), (64, 128)])
    assert not bits_agree([(4097,)]), "a missing tail"
    assert not bits_agree([(4096,), (64, 128)], max_grad_norm=0.1), "a missing barrier"
