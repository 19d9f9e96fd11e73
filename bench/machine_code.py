"""Reads the machine code of the GPU kernels, without a GPU: registers, spills, and how wide they read and write.

    python bench/machine_code.py                     a table of all kernels; exit status 1 if one is not as it must be
    python bench/machine_code.py --only triton       or cuda: nothing of the other is compiled or read
    python bench/machine_code.py --root FOLDER       another checkout's csrc/ and kernels/

The CUDA kernels are those of the built fuseopt._CUDA; where there is none, nvcc compiles step.cu alone. Triton's update
is compiled ahead of time, for AMD too; triton keeps that under build/. Its package brings the disassembler.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (80, 90, 100)
DTYPES = {"F32": "float32", "F64": "float64", "BF16": "bfloat16", "F16": "float16"}

# Of a thread, by dtype; 64 in all other kernels, which is 32,768 for 512 threads, so that two such blocks fit a
# multiprocessor. Triton's kernels have 128 to 256 threads.
REGISTERS = {
    "update": {"float32": 64, "float64": 80, "bfloat16": 64, "float16": 64},
    "step": {"float32": 80, "float64": 168, "bfloat16": 224, "float16": 224},
    "masked": {"float32": 128, "float64": 224, "bfloat16": 240, "float16": 240},
    "statistics": {"float32": 120, "float64": 160, "bfloat16": 120, "float16": 120},
    "norm-masked": {"float32": 96, "float64": 96, "bfloat16": 132, "float16": 132},
}
# The passes over memory: no stack, whole vectors
STREAMING = ("update", "step", "squares", "masked", "statistics", "norm", "norm-masked", "clip")
# What is not met, so that it gets no worse: Triton's masked update spills on AMD (into other registers: there is no
# stack), its masked norm two words on sm_90. Nor do 16 bits have whole vectors beside statistics, see
# kernels/aot.py; and all of these take more than 64 registers.
SPILLS = {
    ("masked", "gfx942"): {"float32": 12, "float64": 20, "bfloat16": 72, "float16": 32},
    ("norm-masked", "sm_90"): {"float32": 2},
}


@dataclass
class Kernel:
    """One kernel's machine code. loads and stores: instructions on global memory; wide_*: those of 16 bytes."""

    source: str
    name: str
    target: str
    registers: int
    stack: int  # bytes
    spills: int  # instructions on local memory; for AMD spilled registers
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    least_loads: int  # of 16 bytes
    least_stores: int

    def problems(self) -> list[str]:
        """What is not as it must be."""
        kind, *words = self.name.split()
        dtype = next((word for word in words if word in DTYPES.values()), "")
        most, spills = REGISTERS.get(kind, {}).get(dtype, 64), SPILLS.get((kind, self.target), {}).get(dtype, 0)
        out = []
        if kind in STREAMING and self.stack > 4 * spills:
            out.append(f"{self.stack} bytes of stack")
        if kind in STREAMING and self.spills > spills:
            out.append(f"{self.spills} spills" + f", more than {spills}" * bool(spills))
        if self.registers > most:
            out.append(f"{self.registers} registers, more than {most}")
        if self.wide_loads < self.least_loads:
            out.append(f"{self.wide_loads} loads of 16 bytes, not {self.least_loads}")
        if self.wide_stores < self.least_stores:
            out.append(f"{self.wide_stores} stores of 16 bytes, not {self.least_stores}")
        return out


def vectors(slots: int, dtype: str, averages: int) -> tuple[int, int]:
    """(loads, stores) of 16 bytes on the main path of an update: each stream has its own, fp32 beside 16 bits two."""
    ema = averages * (2 if dtype.endswith("16") else 1)
    return 2 + slots + ema, 1 + slots + ema


def cuda_vectors(dtype: str) -> tuple[int, int]:
    """The same of CUDA's update, one kernel for all rules: three moments, an average, and one in 16 bits too."""
    loads, stores = vectors(3, dtype, 1)
    narrow = dtype.endswith("16")
    return loads + narrow, stores + narrow - (dtype == "float64")  # nvcc stores a moment in fp64 in parts


def expected(least) -> dict[str, int]:
    return dict(zip(("least_loads", "least_stores"), least, strict=True))


# ---- NVIDIA's --------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """A disassembler of triton's package."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        raise SystemExit("machine_code: the package triton is missing, which brings cuobjdump; pip install triton")
    return str(Path(spec.origin).parent / "backends/nvidia/bin" / name)


def run(*words) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout


def accesses(sass: str) -> dict[str, int]:
    """The instructions of a kernel that reach memory."""
    loads, stores = (re.findall(rf"\b{word}(?:\.\w+)*", sass) for word in ("LDG", "STG"))
    wide = [sum(".128" in x for x in found) for found in (loads, stores)]
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    counts = {"wide_loads": wide[0], "loads": len(loads), "wide_stores": wide[1], "stores": len(stores)}
    return counts | {"spills": spills}


def dumped(path: Path, arch: int) -> list[tuple[str, dict]]:
    """(name as C++ says it, registers, stack and accesses) of each kernel of a file for an architecture."""
    only = [] if path.suffix == ".cubin" else ["-arch", f"sm_{arch}"]
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", run(tool("cuobjdump"), "-res-usage", *only, path))
    parts = re.split(r"Function : (\S+)\n", run(tool("cuobjdump"), "-sass", *only, path))
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    plain = run("c++filt", *(name for name, *_ in usage)).splitlines() if usage else []
    return [
        (said, {"registers": int(registers), "stack": int(stack), **accesses(code[name])})
        for said, (name, registers, stack) in zip(plain, usage, strict=True)
    ]


def cuda_kernels(root: Path, archs: list[int]) -> tuple[list[Kernel], str]:
    """The kernels of fuseopt._CUDA, and what it is."""
    module = next((root / "fuseopt").glob("_CUDA*.so"), None)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        paths = [module or Path(folder) / f"step.sm_{arch}.cubin" for arch in archs]
        note = f"{module.stat().st_size:,} bytes" if module else compiled(root, archs, paths, pool)
        found = list(pool.map(dumped, paths, archs))
    kernels = []
    for arch, (said, facts) in ((a, one) for a, each in zip(archs, found, strict=True) for one in each):
        match = re.search(r"::(\w+)(?:<(.*)>)?\((?!anonymous)", said.replace("fuseopt::", ""))
        name, words = match[1], (match[2] or "").split(", ")
        dtype, least = DTYPES.get(words[-1], ""), (0, 0)
        if name == "update":
            least = cuda_vectors(dtype)
        elif name == "squares":
            least = 1, 0
        label = " ".join(filter(None, (name, dtype)))
        kernels.append(Kernel("cuda", label, f"sm_{arch}", **facts, **expected(least)))
    return kernels, f"fuseopt._CUDA: {note}"


def compiled(root: Path, archs: list[int], paths: list[Path], pool: ThreadPoolExecutor) -> str:
    """Compiles step.cu; how long that took."""
    flags = re.search(r'NVCCFLAGS = shlex.split\(\s*"(.*)"', (root / "setup.py").read_text())[1]
    nvcc, start = os.environ.get("NVCC") or "nvcc", time.perf_counter()

    def compile_for(arch: int, path: Path) -> None:
        run(nvcc, *flags.split(), "-cubin", f"-arch=sm_{arch}", "-o", path, root / "csrc/cuda/step.cu")

    list(pool.map(compile_for, archs, paths))
    return f"not built; nvcc took {time.perf_counter() - start:.0f} s for step.cu"


# ---- Triton's --------------------------------------------------------------------------------------------


KINDS = ("step", "masked", "statistics", "norm", "norm-masked", "clip")  # of Triton's kernels


def triton_kernels(root: Path, archs: list[int], amd: bool = True, kinds: Sequence[str] = KINDS) -> list[Kernel]:
    """Triton's update by Adam with an average in every dtype, and by every rule in fp32; with masks, with statistics;
    the norm and the clipping factor: those of `kinds`. For NVIDIA and, with `amd`, AMD."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
    sys.path.insert(0, str(root))
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from kernels import aot, rules

    targets = [GPUTarget("cuda", arch, 32) for arch in archs] + [GPUTarget("hip", "gfx942", 64)] * amd
    cases = [("adam", dtype, 1) for dtype in DTYPES.values()] + [(rule, "float32", 0) for rule in rules.RULES]
    kernels = []
    for target, (rule, dtype, averages) in itertools.product(targets, cases if "step" in kinds else ()):
        least = [twice(dtype) * k for k in vectors(rules.RULES[rule].slots, dtype, averages)]
        name = f"step {rule} {dtype}" + " + average" * averages
        kernels.append(triton_kernel(name, aot.build(rule, dtype, target, averages=averages), target, least))
    for target, dtype in itertools.product(targets, DTYPES.values()):
        whole = [twice(dtype) * k for k in vectors(2, dtype, 0)]
        passes = {"masked": whole, "statistics": (0, 0) if dtype.endswith("16") else whole}
        for kind, least in ((kind, least) for kind, least in passes.items() if kind in kinds):
            kernels.append(
                triton_kernel(f"{kind} adam {dtype}", aot.build("adam", dtype, target, **{kind: True}), target, least)
            )
        for kind in [kind for kind in ("norm", "norm-masked") if kind in kinds]:
            built = reduction("grad_norm", dtype, target, MASKED=kind == "norm-masked", DTYPE=getattr(tl, dtype))
            kernels.append(triton_kernel(f"{kind} {dtype}", built, target, (twice(dtype), 0)))
    for target in targets if "clip" in kinds else ():
        kernels.append(triton_kernel("clip", reduction("clip", "float32", target), target, (0, 0)))
    return kernels


def twice(dtype: str) -> int:
    """Vectors of 16 bytes for the four elements that a thread has of a stream."""
    return 2 if dtype == "float64" else 1


def triton_kernel(name: str, built, target, least) -> Kernel:
    amd = target.backend == "hip"
    facts = of_amd(built.asm["amdgcn"]) if amd else of_cubin(built.asm["cubin"], target.arch)
    return Kernel("triton", name, target.arch if amd else f"sm_{target.arch}", **facts, **expected(least))


def reduction(name: str, dtype: str, target, **constants):
    """grad_norm or clip of kernels/reduce.py, compiled for a target as it is launched beside this dtype."""
    import triton

    from kernels import aot, reduce

    number = "*fp64" if dtype == "float64" else "*fp32"
    signature = {
        "grad_norm": {"table": "*i64", "tensors": "i32", "scalars": number, "sums": "*fp64"},
        "clip": dict(sums="*fp64", blocks="i32", bounds="*fp64", groups="i32", wide="*fp64", narrow="*fp32"),
    }[name] | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(getattr(reduce, name), signature, constants)
    return triton.compile(source, target=target, options=aot.options(dtype, target.warp_size))


def of_cubin(code: bytes, arch: int) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        ((_, facts),) = dumped(Path(file.name), arch)
    return facts


def of_amd(text: str) -> dict[str, int]:
    """The same facts from AMD's assembly; scalar loads, of the table, do not count."""

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    loads, stores = (re.findall(rf"\b(?:global|flat|buffer)_{word}_\w+", text) for word in ("load", "store"))
    wide = [sum("dwordx4" in x for x in found) for found in (loads, stores)]
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "wide_loads": wide[0], "loads": len(loads), "wide_stores": wide[1], "stores": len(stores),
    }  # fmt: skip


# ---- the table -------------------------------------------------------------------------------------------

COLUMNS = ("kernel", "target", "registers", "stack", "spills", "loads x16", "other", "stores x16", "other", "problems")


def table(kernels: list[Kernel]) -> str:
    """A line a kernel."""
    rows = [COLUMNS]
    for k in kernels:
        words = (k.registers, k.stack, k.spills, k.wide_loads, k.loads - k.wide_loads, k.wide_stores)
        rows.append(
            (f"{k.source} {k.name}", k.target, *map(str, words), str(k.stores - k.wide_stores), "; ".join(k.problems()))
        )
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = []
    for first, *others, last in rows:
        middle = "  ".join(x.rjust(w) for x, w in zip(others, widths[1:], strict=True))
        lines.append(f"{first.ljust(widths[0])}  {middle}  {last}".rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--only", choices=("cuda", "triton"), help="the kernels of one backend")
    p.add_argument("--archs", nargs="+", type=int, help="10 * compute capability; not AMD then")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of Triton's kernels")
    p.add_argument("--root", type=Path, default=ROOT, help="the folder that holds csrc/ and kernels/")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the table's figures there, too")
    args = p.parse_args(argv)
    kernels, notes = [], []
    if args.only != "triton":
        found, note = cuda_kernels(args.root, args.archs or list(ARCHS))
        kernels += found
        notes.append(note)
    if args.only != "cuda":
        kernels += triton_kernels(args.root, args.archs or list(ARCHS), not args.archs, args.kinds)
    print("\n".join([table(kernels), *notes]))
    if args.json:
        args.json.write_text(json.dumps([asdict(k) | {"problems": k.problems()} for k in kernels], indent=1))
    return 1 if any(k.problems() for k in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
