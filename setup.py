"""Builds fuseopt._C from csrc/ with a C++ compiler and ninja. Everything else about the package is in pyproject.toml.

Environment:  CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   as usual
              FUSEOPT_NATIVE=0                   do not build the module
              FUSEOPT_NATIVE=1                   a missing compiler is an error, not a warning
To rebuild in place after an edit:  python setup.py build_ext --inplace [--debug]
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    import pybind11
except ImportError:
    pybind11 = None
try:
    import ninja  # the package; a ninja on PATH does as well
except ImportError:
    ninja = None

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Without -fno-math-errno sqrtf blocks vectorising; without -fno-trapping-math mask and bf16 loops stay scalar;
# -ffp-contract=off because the arithmetic says itself where it wants an fma.
CXXFLAGS = shlex.split(
    "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp -fvisibility=hidden -fPIC -Wall"
)

NOT_BUILT = """
fuseopt: the native module fuseopt._C is NOT built. Missing: {}
fuseopt will run all the same, through its torch reference: the same results, but slowly.
"""

# The variables are quoted for the shell already; ninja itself quotes $in and $out.
BUILD_NINJA = """\
cxx = {cxx}
cxxflags = {cxxflags}
ldflags = {ldflags}
rule compile
  command = $cxx $cxxflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out $ldflags
"""


def sources():
    """Every C++ source; csrc/cuda/ needs nvcc and is not part of this module."""
    return sorted(p for p in CSRC.rglob("*.cpp") if CSRC / "cuda" not in p.parents)


def find_tools():
    """(compiler command, ninja, include folders, [what is missing and how to get it])."""
    missing, includes = [], [CSRC, Path(sysconfig.get_path("include"))]
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    if not shutil.which(cxx[0]):
        missing.append(f"a C++17 compiler, {cxx[0]!r} was not found (apt install g++, or set CXX)")
    if not (includes[1] / "Python.h").exists():
        missing.append(f"Python.h in {includes[1]} (apt install python3-dev)")
    if pybind11:
        includes.append(Path(pybind11.get_include()))
    else:
        missing.append("pybind11 (pip install pybind11)")
    ninja_exe = (ninja and shutil.which("ninja", path=ninja.BIN_DIR)) or shutil.which("ninja")
    if not ninja_exe:
        missing.append("ninja (pip install ninja)")
    return cxx, ninja_exe, includes, missing


def ninja_path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_flags(words):
    return shlex.join(map(str, words)).replace("$", "$$")


class NinjaBuild(build_ext):
    """build_ext that leaves compiling, header dependencies and parallel jobs to ninja."""

    def run(self):
        wanted = os.environ.get("FUSEOPT_NATIVE", "")
        *self.tools, missing = find_tools()
        if missing and wanted == "1":
            raise SystemExit(f"fuseopt: FUSEOPT_NATIVE=1, but this is missing: {'; '.join(missing)}")
        if missing and wanted != "0":
            print(NOT_BUILT.format("; ".join(missing)), file=sys.stderr, flush=True)
        if missing or wanted == "0":
            self.extensions = []
        super().run()

    def build_extension(self, ext):
        cxx, ninja_exe, includes = self.tools
        # Editable builds are given a throw-away build_temp; objects stay here so that the next build reuses them.
        temp = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir(parents=True, exist_ok=True)

        cxxflags = CXXFLAGS + ["-g"] * bool(self.debug) + [f"-I{i}" for i in includes]
        ldflags = ["-fopenmp"] + ["-s"] * (not self.debug)
        lines = [BUILD_NINJA.format(
            cxx=ninja_flags(cxx),
            cxxflags=ninja_flags(cxxflags + shlex.split(os.environ.get("CXXFLAGS", ""))),
            ldflags=ninja_flags(ldflags + shlex.split(os.environ.get("LDFLAGS", ""))),
        )]
        objects = []
        for source in sources():
            objects.append(ninja_path(temp / source.relative_to(ROOT).with_suffix(".o")))
            lines.append(f"build {objects[-1]}: compile {ninja_path(source)}\n")
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}\n")
        (temp / "build.ninja").write_text("".join(lines))

        jobs = self.parallel or os.environ.get("MAX_JOBS")
        command = [ninja_exe, "-C", str(temp)] + (["-j", str(jobs)] if jobs else [])
        if subprocess.call(command):
            raise SystemExit(
                f"fuseopt: compiling fuseopt._C with {shlex.join(cxx)} failed, see above. It takes C++17 and OpenMP"
                " (a recent g++ has both). FUSEOPT_NATIVE=0 installs fuseopt without the module."
            )


setup(
    packages=find_packages(include=["fuseopt", "fuseopt.*"]) + ["fuseopt.kernels"],
    package_dir={"fuseopt.kernels": "kernels"},
    ext_modules=[Extension("fuseopt._C", [str(p.relative_to(ROOT)) for p in sources()])],
    cmdclass={"build_ext": NinjaBuild},
)
