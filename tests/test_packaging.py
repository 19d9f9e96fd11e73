"""What is shipped, how the native module is built, and what happens on a machine that cannot build it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = [p.name for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".")]
FOLDERS = ["csrc", "kernels", "fuseopt", "tests", "bench", "examples", "docs", ".ci"]
GENERATED = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", "*.egg-info", ".*_cache")

NO_COMPILER = {
    "empty PATH": {"PATH": "/nonexistent", "CXX": ""},
    "CXX points nowhere": {"CXX": "/nonexistent/g++"},
}


def run(command, cwd, env=None, ok=True):
    """Run a command; return its output and errors together; fail the test if it ends otherwise than `ok` says."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEOPT_", "PYTHONPATH", "CXX", "LDFLAGS"))}
    keep["FUSEOPT_CUDA"] = "0"  # unless env asks for it
    done = subprocess.run(
        command, cwd=cwd, env=keep | (env or {}), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def build(kind, source, out, env=None, ok=True):
    """Build an "sdist" or a "wheel" of `source` as pip would, without build isolation; return (log, file)."""
    hook = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    log = run([sys.executable, "-c", hook], source, env, ok)
    return log, next(out.iterdir(), None) if out.exists() else None


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project as it would be cloned: sources only."""
    copy = tmp_path_factory.mktemp("project")
    for name in TOP:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=GENERATED)
    return copy


@pytest.fixture(scope="module")
def sdist(project, tmp_path_factory):
    """The unpacked source distribution."""
    out = tmp_path_factory.mktemp("sdist")
    shipped = files(project)  # before the build leaves its metadata there
    _, archive = build("sdist", project, out)
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return shipped, next(p for p in out.iterdir() if p.is_dir())


@pytest.fixture(scope="module", params=NO_COMPILER.values(), ids=NO_COMPILER.keys())
def bare(request, sdist, tmp_path_factory):
    """(log, folder): a wheel of the sdist, built and unpacked on a machine without a compiler."""
    out = tmp_path_factory.mktemp("wheel")
    log, wheel = build("wheel", sdist[1], out, request.param)
    with zipfile.ZipFile(wheel) as z:
        z.extractall(out / "site")
    return log, out / "site"


def test_sdist_holds_every_source_file(sdist):
    shipped, unpacked = sdist
    assert shipped - files(unpacked) == set()


def test_wheel_holds_packages_and_their_data(bare):
    _, site = bare
    here = {n for n in files(site) if ".dist-info/" not in n}
    expected = {f"fuseopt/{n}" for n in files(ROOT / "fuseopt") if "__pycache__" not in n and not n.endswith(".so")}
    expected |= {f"fuseopt/kernels/{n}" for n in files(ROOT / "kernels") if "__pycache__" not in n}
    assert here == expected


def test_metadata(bare):
    info = next(bare[1].glob("fuseopt-*.dist-info"))
    meta = Parser().parsestr((info / "METADATA").read_text())
    assert meta["Name"] == "fuseopt" and meta["Requires-Python"] == ">=3.10"
    needs = meta.get_all("Requires-Dist")
    assert {n for n in needs if "extra ==" not in n} == {"torch>=2.6", "numpy"}
    assert set(meta.get_all("Provides-Extra")) == {"finetune", "integrations", "examples", "docs", "test"}
    assert "fuseopt = fuseopt.__main__:main" in (info / "entry_points.txt").read_text()


def test_building_asks_for_no_torch(project):
    code = "from setuptools import build_meta as b; print(b.get_requires_for_build_wheel())"
    required = run([sys.executable, "-c", code], project)
    assert "torch" not in (ROOT / "pyproject.toml").read_text().split("build-backend")[0].split("#")[0]
    assert "torch" not in required


def test_no_compiler_is_said_once_and_clearly(bare):
    log, _ = bare
    assert log.count("fuseopt._C is NOT built") == 1
    assert "C++17 compiler" in log and "apt install g++" in log and "torch reference" in log


def test_no_compiler_still_steps_through_the_reference(bare):
    _, site = bare
    script = """
import warnings, torch, fuseopt, fuseopt.cpu, fuseopt.kernels
assert fuseopt.__file__.startswith(SITE), fuseopt.__file__
assert "_C" in fuseopt.cpu.native_error(), fuseopt.cpu.native_error()

def steps(**options):
    p = torch.nn.Parameter(torch.ones(3))
    opt = fuseopt.AdamW([p], lr=0.1, **options)
    p.grad = torch.full((3,), 2.0)
    opt.step()
    assert (p < 1).all() and opt.explain().backend == "torch", (p, opt.explain())

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    steps(backend="torch")
    assert not [w for w in seen if w.category is RuntimeWarning], seen
    steps()
    steps()
said = [str(w.message) for w in seen if w.category is RuntimeWarning]
assert len(said) == 1 and "fuseopt._C" in said[0], said
""".replace("SITE", repr(str(site)))
    # -S: no .pth file is read, so that an editable install of this very project cannot lend its compiled module.
    installed = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    run([sys.executable, "-S", "-c", script], site, {"PYTHONPATH": os.pathsep.join([str(site), *installed])})


# --- The native build, on a module of two small files that takes a second to compile. ---

MODULE = """
#include <Python.h>
#include <omp.h>
#include "answer.h"
static PyObject* threads(PyObject*, PyObject*) { return PyLong_FromLong(omp_get_max_threads()); }
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER + other()); }
static PyMethodDef methods[] = {{"threads", threads, METH_NOARGS, ""}, {"answer", answer, METH_NOARGS, ""}, {}};
static PyModuleDef def = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&def); }
"""


@pytest.fixture
def small(tmp_path):
    """A project with this one's build files and a path with a space in it."""
    home = tmp_path / "a project"
    for folder in ("csrc/cpu", "csrc/cuda", "fuseopt", "kernels"):
        (home / folder).mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, home)
    (home / "fuseopt/__init__.py").touch()
    (home / "kernels/__init__.py").touch()
    (home / "csrc/answer.h").write_text("#define ANSWER 40\nint other();\n")
    (home / "csrc/cpu/other.cpp").write_text("int other() { return 2; }\n")
    (home / "csrc/cuda/step.cpp").write_text("#error only nvcc may see this\n")
    (home / "csrc/bindings.cpp").write_text(MODULE)
    return home


needs_compiler = pytest.mark.skipif(
    not shutil.which((os.environ.get("CXX") or "g++").split()[0]), reason="needs a C++ compiler"
)


def build_inplace(home, env=None, ok=True):
    cxx = {"CXX": os.environ["CXX"]} if "CXX" in os.environ else {}
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], home, cxx | (env or {}), ok)


def in_module(home, code):
    return run([sys.executable, "-c", f"import torch, fuseopt._C as C; print({code})"], home).strip()


@needs_compiler
def test_rebuilds_only_what_changed_and_reports_errors(small):
    first = build_inplace(small)
    assert "bindings.cpp' -o" in first and "other.cpp' -o" in first
    assert in_module(small, "C.answer()") == "42"

    assert "no work to do" in build_inplace(small)

    (small / "csrc/answer.h").write_text("#define ANSWER 5\nint other();\n")
    again = build_inplace(small)
    assert "bindings.cpp' -o" in again and "other.cpp' -o" not in again
    assert in_module(small, "C.answer()") == "7"

    (small / "csrc/cpu/other.cpp").write_text("int other() { return nonsense; }\n")
    failed = build_inplace(small, ok=False)
    assert "nonsense" in failed and "FUSEOPT_NATIVE=0" in failed and "Traceback" not in failed


@needs_compiler
def test_editable_build_reuses_objects_and_wheel_is_tagged(small, tmp_path):
    build_inplace(small)
    log, wheel = build("editable", small, tmp_path / "editable")
    assert "-c " not in log  # linked again at most, never compiled again
    _, wheel = build("wheel", small, tmp_path / "wheel")
    assert sysconfig.get_config_var("EXT_SUFFIX") in "".join(zipfile.ZipFile(wheel).namelist())
    assert "none-any" not in wheel.name


@needs_compiler
def test_openmp_pool_is_torchs(small):
    build_inplace(small)
    code = "torch.set_num_threads(1) or C.threads(), torch.set_num_threads(3) or C.threads()"
    assert in_module(small, code) == "1 3"


@needs_compiler
def test_fuseopt_cuda(small):
    """What a missing nvcc, a wrong architecture and a failure say; without being asked for, none of it is fatal."""
    nowhere = {"NVCC": "/nonexistent/nvcc", "CUDA_HOME": "/nonexistent"}
    log = build_inplace(small, nowhere | {"FUSEOPT_CUDA": "1"}, ok=False)
    assert "FUSEOPT_CUDA=1, but nvcc was not found" in log and "Traceback" not in log
    build_inplace(small, nowhere | {"FUSEOPT_CUDA": ""})
    fake = small / "nvcc"
    fake.write_text("#!/bin/sh\necho 'release 13.0'\n")
    fake.chmod(0o755)
    log = build_inplace(small, {"NVCC": str(fake), "FUSEOPT_CUDA": "1", "FUSEOPT_CUDA_ARCHS": "80 hopper"}, ok=False)
    assert "FUSEOPT_CUDA_ARCHS holds 'hopper'" in log and "Traceback" not in log
    log = build_inplace(small, {"NVCC": str(fake), "FUSEOPT_CUDA": "1"}, ok=False)
    assert "only nvcc may see this" in log and "FUSEOPT_CUDA=0 leaves it out" in log and "Traceback" not in log
    assert "FUSEOPT_CUDA=0 leaves it out" in build_inplace(small, {"NVCC": str(fake), "FUSEOPT_CUDA": ""})
    assert in_module(small, "C.answer()") == "42" and not list(small.glob("fuseopt/_CUDA*"))


@needs_compiler
def test_fuseopt_native(small):
    nowhere = {"CXX": "/nonexistent/g++"}
    assert "NOT built" not in build_inplace(small, {"FUSEOPT_NATIVE": "0"})
    assert not list(small.glob("fuseopt/_C*"))
    log = build_inplace(small, nowhere | {"FUSEOPT_NATIVE": "1"}, ok=False)
    assert "/nonexistent/g++" in log and "Traceback" not in log
