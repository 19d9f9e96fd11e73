"""On paper: what a step of a model sharded over many GPUs moves, how long that takes, and what it says to the others.

    python -m bench paper [--parameters 7e10] [--gpus 64]

Bytes a parameter are what opt.explain() counts for such an optimizer; separate passes are counted in recipes.py's
way; messages are those that a step of fully sharded parameters sends, caught on one process. Times follow from the
assumptions that stand below, none of which was measured here.
"""

import argparse
import sys
import tempfile

import recipes
import record
import report
import torch
import torch.distributed as dist
from case import SPARSITY, Case, Data
from variants import STREAMS

import fuseopt
from fuseopt.cuda_ranker import DIGITS

COPY = 4.3e12  # bytes/s, read plus write, that a copy on one H200 moves; published, not ours
LATENCY = 50e-6  # s of a small all-reduce over the GPUs of several machines
NETWORK = 50e9  # bytes/s of each GPU to the network (400 Gbit/s)

CASES = {  # what is stepped: (dtype, options of AdamW)
    "fp32 weights (the master of bf16 copies) and moments": (torch.float32, {}),
    "and clipping": (torch.float32, {"max_grad_norm": 1.0}),
    "and clipping, an EMA": (torch.float32, {"max_grad_norm": 1.0, "ema": fuseopt.EMA(0.999)}),
    "and clipping, an EMA, pruning, a mask": (
        torch.float32,
        {"max_grad_norm": 1.0, "ema": fuseopt.EMA(0.999), "prune": fuseopt.Prune(SPARSITY)},
    ),
    "bf16 weights and moments": (torch.bfloat16, {}),
    "bf16 weights and moments, an fp32 EMA": (torch.bfloat16, {"ema": fuseopt.EMA(0.999)}),
}
MASKED = "and clipping, an EMA, pruning, a mask"


def one_pass(name: str) -> float:
    """Bytes a parameter of a step of fuseopt, as explain() counts them."""
    dtype, options = CASES[name]
    p = torch.nn.Parameter(torch.randn(256, 256).to(dtype))
    p.grad = torch.randn_like(p)
    opt = fuseopt.AdamW([p], **options)
    if name == MASKED:
        opt.mask(p, torch.rand(p.shape) < 0.9)
    opt.step()
    return opt.explain().bytes_per_step / p.numel()


def separate(name: str) -> float:
    """Bytes a parameter of torch fused and a pass for everything else."""
    dtype, options = CASES[name]
    if name == MASKED:
        case = Case("full", "tiny")
        return recipes.full(case, Data(case), "float", "fused", freezes=True).bytes() / case.elements
    size = dtype.itemsize
    clip = 3 * size if "max_grad_norm" in options else 0  # the norm reads, the scaling reads and writes
    average = (12 if size == 4 else 18) if "ema" in options else 0  # in bf16 through a copy in fp32
    return STREAMS["adamw", "fused"][0] * size + clip + average


def rows(parameters: float, gpus: int) -> list[list[str]]:
    """The table of bytes and times: of a GPU's shard."""
    shard, out = parameters / gpus, []
    for name in CASES:
        ours, others = one_pass(name), separate(name)
        seconds = [shard * x / COPY for x in (ours, others)]
        cells = [f"{ours:g}", f"{shard * ours / 1e9:.1f} GB", report.duration(seconds[0])]
        out.append([name, *cells, f"{others:g}", report.duration(seconds[1]), f"x{others / ours:.2f}"])
    return out


def messages() -> dict[str, list[int]]:
    """{what: bytes of each all-reduce of a step} of parameters that processes share, caught where there is one."""
    sizes: list[int] = []
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        real = dist.all_reduce
        try:
            from torch.distributed.fsdp import fully_shard

            def caught(x, *args, **more):
                sizes.append(x.numel() * x.element_size())
                return real(x, *args, **more)

            dist.all_reduce = caught
            found = {}
            for what, options in MESSAGES.items():
                model = fully_shard(torch.nn.Linear(64, 64, bias=False), mesh=dist.init_device_mesh("cpu", (1,)))
                opt = fuseopt.AdamW(model.parameters(), **options)
                for _ in range(2):  # the first makes state
                    model(torch.ones(2, 64)).sum().backward()
                    sizes.clear()
                    opt.step()
                found[what] = list(sizes)
            pruning = next(reversed(found))
            counts = [size for size in found.pop(pruning) if size < 1024]
            found[f"{pruning}, GPU"] = counts + [8 << bits for bits in DIGITS]  # histograms of 64-bit counts
            return found
        finally:
            dist.all_reduce = real
            dist.destroy_process_group()


MESSAGES = {
    "plain": {},
    "clipping": {"max_grad_norm": 1.0},
    "statistics": {"statistics": True},
    "a step that prunes to a sparsity": {"prune": fuseopt.Prune(SPARSITY, begin=1, every=1, end=9)},
}


def talk(sizes: list[int]) -> float:
    """Seconds of these all-reduces, one after the other: each sends its bytes twice at the network's rate."""
    return sum(LATENCY + 2 * size / NETWORK for size in sizes)


def text(parameters: float, gpus: int) -> str:
    """Both tables."""
    head = ["", "bytes a parameter", "a GPU moves", "takes at least", "separate passes", "take at least", "ratio"]
    lines = report.grid(head, rows(parameters, gpus))
    told = []
    for what, sizes in messages().items():
        size = " + ".join(f"{s / 1024:.0f} KiB" if s >= 1024 else f"{s} B" for s in sizes) or "none"
        told.append([what, str(len(sizes)), size, report.duration(talk(sizes)) if sizes else "0"])
    return "\n".join([*lines, "", *report.grid(["a step with", "all-reduces", "their bytes", "take about"], told)])


def main(argv: list[str] | None = None) -> int:
    how = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("python -m bench paper", description=__doc__, formatter_class=how, allow_abbrev=False)
    p.add_argument("--parameters", type=record.count, default=70 * 10**9, help="of the model (default: 7e10)")
    p.add_argument("--gpus", type=record.count, default=64, help="that it is sharded over (default: 64)")
    args = p.parse_args(argv)
    print(text(args.parameters, args.gpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
