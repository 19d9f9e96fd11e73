"""Builds fuseopt._C and, where nvcc is there, fuseopt._CUDA from csrc/ with ninja. The rest is in pyproject.toml.

Environment:  CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   as usual
              FUSEOPT_NATIVE=0                   do not build any module
              FUSEOPT_NATIVE=1                   a missing compiler is an error, not a warning
              NVCC, CUDA_HOME                    where nvcc is, if it is not on PATH
              FUSEOPT_CUDA=0                     do not build fuseopt._CUDA
              FUSEOPT_CUDA=1                     a missing nvcc is an error
              FUSEOPT_CUDA_ARCHS="80 90+PTX"     GPUs to compile for, as 10 * compute capability
To rebuild in place after an edit:  python setup.py build_ext --inplace [--debug]
"""

import os
import re
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
CUDA = CSRC / "cuda"

# Without -fno-math-errno sqrtf blocks vectorising; without -fno-trapping-math mask and bf16 loops stay scalar;
# -ffp-contract=off because the arithmetic says itself where it wants an fma.
CXXFLAGS = shlex.split(
    "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp -fvisibility=hidden -fPIC -Wall"
)

# As the CPU: no contraction, division and square root correctly rounded (nvcc's default).
NVCCFLAGS = shlex.split("-std=c++17 -O3 --fmad=false -Xcompiler -fPIC,-fvisibility=hidden")
ARCHS = "75 80 90 100 120+PTX"  # machine code of x0 serves every x; PTX serves all others
OLDER_ARCHS = "75 80 90+PTX"  # those that an nvcc before 12.8 knows, which has no --compress-mode either

NOT_BUILT = """
fuseopt: the native module fuseopt._C is NOT built. Missing: {}
fuseopt will run all the same, through its torch reference: the same results, but slowly.
"""

# The variables are quoted for the shell already; ninja itself quotes $in and $out.
BUILD_NINJA = """\
cxx = {cxx}
cxxflags = {cxxflags}
nvcc = {nvcc}
nvccflags = {nvccflags}
rule compile
  command = $cxx $cxxflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule compile_cuda
  command = $nvcc $nvccflags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {link}
"""


def sources(name):
    """The files of a module: what lies directly in csrc/, bindings.cpp apart, is in both."""
    shared = [p for p in CSRC.glob("*.cpp") if p.name != "bindings.cpp"]
    if name == "fuseopt._CUDA":
        return sorted(shared + [p for p in CUDA.iterdir() if p.suffix in (".cpp", ".cu")])
    return sorted(shared + [CSRC / "bindings.cpp", *(CSRC / "cpu").glob("*.cpp")])


def find_tools():
    """(compiler command, ninja, include folders, [what is missing and how to get it])."""
    missing, includes = [], [Path(sysconfig.get_path("include"))]
    cxx = shlex.split(os.environ.get("CXX") or "g++")
    if not shutil.which(cxx[0]):
        missing.append(f"a C++17 compiler, {cxx[0]!r} was not found (apt install g++, or set CXX)")
    if not (includes[0] / "Python.h").exists():
        missing.append(f"Python.h in {includes[0]} (apt install python3-dev)")
    if pybind11:
        includes.append(Path(pybind11.get_include()))
    else:
        missing.append("pybind11 (pip install pybind11)")
    ninja_exe = (ninja and shutil.which("ninja", path=ninja.BIN_DIR)) or shutil.which("ninja")
    if not ninja_exe:
        missing.append("ninja (pip install ninja)")
    return cxx, ninja_exe, includes, missing


def find_nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(os.environ.get("NVCC") or "nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def release(nvcc):
    """nvcc's version, as (12, 8); (0, 0) if it does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else (0, 0)


def cuda_headers(nvcc):
    """The folder of cuda_runtime.h: nvcc, which may be a script elsewhere, says where it lives."""
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    top = [line.partition("TOP=")[2] for line in said.splitlines() if "TOP=" in line]
    home = Path(top[0]) if top else Path(nvcc).resolve().parent.parent
    return home.resolve() / "include"


def architectures(default):
    """[(number, with PTX)] of FUSEOPT_CUDA_ARCHS. Raises SystemExit for what is not one."""
    words = (os.environ.get("FUSEOPT_CUDA_ARCHS") or default).replace(",", " ").split()
    found = [(word.removesuffix("+PTX"), word.endswith("+PTX")) for word in words]
    for number, _ in found:
        if not number.isdigit() or int(number) < 75:
            raise SystemExit(
                f"fuseopt: FUSEOPT_CUDA_ARCHS holds {number!r}; give 10 * compute capability, at least 75: {ARCHS!r}"
            )
    return [(int(number), ptx) for number, ptx in found]


def ninja_path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_flags(words):
    return shlex.join(map(str, words)).replace("$", "$$")


class NinjaBuild(build_ext):
    """build_ext that leaves compiling, header dependencies and parallel jobs to ninja."""

    def run(self):
        wanted, cuda = os.environ.get("FUSEOPT_NATIVE", ""), os.environ.get("FUSEOPT_CUDA", "")
        *self.tools, missing = find_tools()
        if missing and wanted == "1":
            raise SystemExit(f"fuseopt: FUSEOPT_NATIVE=1, but this is missing: {'; '.join(missing)}")
        if missing and wanted != "0":
            print(NOT_BUILT.format("; ".join(missing)), file=sys.stderr, flush=True)
        self.nvcc = None if cuda == "0" else find_nvcc()
        if cuda == "1" and not self.nvcc:
            raise SystemExit("fuseopt: FUSEOPT_CUDA=1, but nvcc was not found; install CUDA, or set CUDA_HOME")
        if missing or wanted == "0":
            self.extensions = []
        elif not self.nvcc:
            self.extensions = [ext for ext in self.extensions if ext.name != "fuseopt._CUDA"]
        super().run()

    def build_extension(self, ext):
        try:
            self.compile(ext)
        except subprocess.CalledProcessError:
            message = (
                f"fuseopt: compiling {ext.name} with {shlex.join(self.tools[0])} failed, see above. It takes C++17 and"
                " OpenMP (a recent g++ has both). FUSEOPT_NATIVE=0 installs fuseopt without its modules."
            )
            if ext.name != "fuseopt._CUDA":
                raise SystemExit(message) from None
            message = (
                f"fuseopt: compiling {ext.name} with {self.nvcc} failed, see above. It takes CUDA 12.1 or newer;"
                " FUSEOPT_CUDA=0 leaves it out."
            )
            if os.environ.get("FUSEOPT_CUDA") == "1":
                raise SystemExit(message) from None
            print(message, file=sys.stderr, flush=True)
            self.extensions.remove(ext)

    def compile(self, ext):
        """Write build.ninja for a module and run it."""
        cxx, ninja_exe, includes = self.tools
        cuda = ext.name == "fuseopt._CUDA"
        # Editable builds are given a throw-away build_temp; objects stay here so that the next build reuses them.
        temp = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}" / ext.name
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        temp.mkdir(parents=True, exist_ok=True)

        more = shlex.split(os.environ.get("CXXFLAGS", "")) + ["-g"] * bool(self.debug)
        cxxflags, nvccflags, link = self.flags(cxx, includes, cuda)
        lines = [BUILD_NINJA.format(
            cxx=ninja_flags(cxx), cxxflags=ninja_flags(cxxflags + more),
            nvcc=ninja_flags([self.nvcc]), nvccflags=ninja_flags(nvccflags), link=link,
        )]
        objects = []
        for source in sources(ext.name):
            objects.append(ninja_path(temp / source.relative_to(ROOT).with_suffix(source.suffix + ".o")))
            rule = "compile_cuda" if source.suffix == ".cu" else "compile"
            lines.append(f"build {objects[-1]}: {rule} {ninja_path(source)}\n")
            if cuda and source.name == "bindings.cpp":
                lines.append("  cxxflags = $cxxflags -Os\n")  # a third of its size, and only a call a step
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}\n")
        (temp / "build.ninja").write_text("".join(lines))

        jobs = self.parallel or os.environ.get("MAX_JOBS")
        subprocess.run([ninja_exe, "-C", str(temp)] + (["-j", str(jobs)] if jobs else []), check=True)

    def flags(self, cxx, includes, cuda):
        """(flags of the compiler, of nvcc, the command that links)."""
        strip, cxxflags = ["-s"] * (not self.debug), CXXFLAGS + [f"-I{i}" for i in includes]
        ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
        if not cuda:
            return cxxflags, [], f"$cxx -shared $in -o $out {ninja_flags(['-fopenmp', *strip, *ldflags])}"
        old = release(self.nvcc) < (12, 8)
        archs = architectures(OLDER_ARCHS if old else ARCHS)
        # One PTX, of the oldest: it is half the time to compile, the same machine code up to sm_90, and on Blackwell
        # code that takes a fifth fewer registers. It serves all that comes after.
        oldest = min(number for number, _ in archs)
        codes = [f"sm_{number}" for number, _ in archs] + [f"compute_{oldest}"] * any(ptx for _, ptx in archs)
        nvccflags = [*NVCCFLAGS, *["--compress-mode=size"] * (not old), "-ccbin", cxx[0]]
        nvccflags += ["-gencode", f"arch=compute_{oldest},code=[{','.join(codes)}]"]
        numbers = ",".join([str(n) for n, _ in archs] + [f"-{oldest}"] * any(ptx for _, ptx in archs))
        cxxflags += [f"-DFUSEOPT_CUDA_ARCHS={numbers}", f"-I{cuda_headers(self.nvcc)}"]
        passed = ["-Xlinker", ",".join(strip + ldflags)] if strip + ldflags else []
        ldflags = ninja_flags(["-ccbin", cxx[0], *passed])
        return cxxflags, nvccflags, f"$nvcc -shared -cudart static $in -o $out {ldflags}"


setup(
    packages=find_packages(include=["fuseopt", "fuseopt.*"]) + ["fuseopt.kernels"],
    package_dir={"fuseopt.kernels": "kernels"},
    ext_modules=[
        Extension(name, [str(p.relative_to(ROOT)) for p in sources(name)]) for name in ("fuseopt._C", "fuseopt._CUDA")
    ],
    cmdclass={"build_ext": NinjaBuild},
)
