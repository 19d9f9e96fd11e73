"""Builds fuseopt._CUDA with g++, cuda_runtime.h of this folder standing in for CUDA; ninja compiles what changed.

python tests/emulation/build.py [--sanitize]      prints the module's path

A module built with --sanitize runs under the sanitizers only in a process that has LD_PRELOAD; see `make sanitize`.
"""

import fcntl
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Those of setup.py that matter for the arithmetic; -O1 because it is compiled more often than it is run.
FLAGS = "-std=c++17 -O1 -fno-math-errno -fno-trapping-math -ffp-contract=off -fvisibility=hidden -fPIC -Wall -Wno-unknown-pragmas"
SANITIZE = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"

NINJA = """\
rule compile
  command = {cxx} {flags} $more -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {cxx} {flags} -shared $in -o $out
"""


def sources() -> list[Path]:
    """Those of the real module; the ones in csrc/cuda see the CUDA of this folder."""
    shared = [p for p in (ROOT / "csrc").glob("*.cpp") if p.name != "bindings.cpp"]
    return sorted(shared + [p for p in (ROOT / "csrc/cuda").iterdir() if p.suffix in (".cpp", ".cu")])


def tools() -> tuple[str, str, list[str]]:
    """(compiler, ninja, folders of headers). Raises RuntimeError where something is missing."""
    import ninja
    import pybind11

    cxx, python = os.environ.get("CXX") or "g++", Path(sysconfig.get_path("include"))
    if not shutil.which(shlex.split(cxx)[0]):
        raise RuntimeError(f"the CUDA kernels cannot be tested: there is no {cxx!r}; apt install g++, or set CXX")
    if not (python / "Python.h").exists():
        raise RuntimeError(f"the CUDA kernels cannot be tested: no Python.h in {python}; apt install python3-dev")
    return cxx, str(Path(ninja.BIN_DIR) / "ninja"), [str(HERE), str(python), pybind11.get_include()]


def build(sanitize: bool = False) -> Path:
    """The module's path, once it is up to date. Raises RuntimeError without a compiler, AssertionError if it fails."""
    cxx, ninja, includes = tools()
    folder = ROOT / "build" / ("emulated-sanitized" if sanitize else "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*shlex.split(FLAGS), *shlex.split(SANITIZE * sanitize), "-DFUSEOPT_CUDA_ARCHS=75"]
    lines = [NINJA.format(cxx=cxx, flags=shlex.join(flags + [f"-I{path}" for path in includes]))]
    objects = []
    for source in sources():
        objects.append("_".join(source.relative_to(ROOT / "csrc").parts) + ".o")
        lines.append(f"build {objects[-1]}: compile {str(source).replace(' ', '$ ')}\n")
        if source.suffix == ".cu":
            lines.append("  more = -include cuda_runtime.h\n")  # as nvcc does
    name = f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines.append(f"build {name}: link {' '.join(objects)}\n")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several runs of the tests may begin at once
        (folder / "build.ninja").write_text("".join(lines))
        done = subprocess.run([ninja, "-C", folder, "--quiet"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise AssertionError(f"{cxx} cannot compile csrc/cuda with tests/emulation/cuda_runtime.h:\n{done.stdout}")
    return folder / name


def load() -> ModuleType:
    """The module, with the sanitizers where FUSEOPT_SANITIZE=1."""
    return load_from(build(os.environ.get("FUSEOPT_SANITIZE") == "1"), "emulation")


def load_from(path: Path, package: str) -> ModuleType:
    """A module under a name of its own: of one that was imported already, that would be given again."""
    spec = importlib.util.spec_from_file_location(f"{package}._CUDA", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv))
