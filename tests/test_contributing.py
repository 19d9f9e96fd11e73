"""CONTRIBUTING.md adds a rule: its edits are applied to a copy of the sources, compiled, and held to torch's class."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
EDIT = re.compile(
    r"in `(?P<file>[\w./]+)`, (?P<where>before|after|in place of) the line `(?P<line>[^`\n]+)`:\n\n```\w+\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
NEW = re.compile(r"`(?P<file>[\w./]+)` is new:\n\n```\w+\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
GENERATED = shutil.ignore_patterns("__pycache__", "*.so", "finetune")

# Runs in the copy: three tensors, with a tail, ten steps, every option of torch's class; then the checker. Triton is
# interpreted, where it is there, and has the bits of the compiled pass.
CHECK = """
import sys, torch, fuseopt
from fuseopt import triton_driver
torch.set_num_threads(1)

def trained(cls, **more):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((37, 5), (64,), ())]
    start = params[0].detach().clone()
    opt = cls(params, lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, maximize=True, **more)
    checker = fuseopt.verify.attach(opt)
    for _ in range(10):
        for p in params:
            p.grad = torch.randn(p.shape)
        opt.step()
    assert checker.report().passed, checker.report()
    assert (params[0] != start).all()
    return [*params, *(value for p in params for _, value in sorted(opt.state[p].items()))]

torchs, cpu = trained(torch.optim.Adamax), trained(fuseopt.Adamax, backend="cpu")
assert len(torchs) == len(cpu) == 12
for ours in (cpu, trained(fuseopt.Adamax, backend="torch")):
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
if triton_driver.why_not() is None:
    import interpreter
    interpreter.mend()
    fuseopt.__path__.append(sys.path[1])  # kernels/ lies beside fuseopt/
    assert all(map(torch.equal, trained(fuseopt.Adamax, backend="triton"), cpu))
print(fuseopt.__file__)
"""


def apply_the_page(copy: Path) -> int:
    """Make the page's edits in a copy of the sources; returns how many there were."""
    text, count = PAGE.read_text(), 0
    for found in NEW.finditer(text):
        assert not (copy / found["file"]).exists(), found["file"]
        (copy / found["file"]).write_text(found["code"])
        count += 1
    for found in EDIT.finditer(text):
        path, line, code = copy / found["file"], found["line"] + "\n", found["code"]
        source = path.read_text()
        assert ("\n" + source).count("\n" + line) == 1, f"{found['file']} must have this line once: {line}"
        new = {"before": code + line, "after": line + code, "in place of": code}[found["where"].lower()]
        path.write_text(("\n" + source).replace("\n" + line, "\n" + new)[1:])
        count += 1
    return count


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    copy = tmp_path_factory.mktemp("contributed")
    for name in ("csrc", "kernels", "fuseopt"):
        shutil.copytree(ROOT / name, copy / name, ignore=GENERATED)
    (copy / "tests").mkdir()
    for name in ("cases.py", "interpreter.py"):
        shutil.copy(ROOT / "tests" / name, copy / "tests")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    assert apply_the_page(copy) == PAGE.read_text().count("the line `") + 1
    return copy


def test_the_rule_that_the_page_adds_is_torchs(native, edited):
    """Compiled without optimization, which changes no bit here and takes a third of the time."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEOPT_", "CXX", "PYTHON"))}
    env |= {"FUSEOPT_CUDA": "0", "FUSEOPT_NATIVE": "1", "CXXFLAGS": "-O0 -w", "MAX_JOBS": "1", "TRITON_INTERPRET": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(edited), str(edited / "tests")])
    for command in (["setup.py", "-q", "build_ext", "--inplace"], ["-c", CHECK]):
        done = subprocess.run(
            [sys.executable, *command], cwd=edited, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, done.stdout
    assert str(edited) in done.stdout
