"""Sections of gpu_check.py that time: a plain step beside a copy, the whole pass beside torch's recipes."""

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import check
import gpu_place as place
import measure
import torch
import variants
from gpu_place import DEVICE, DRY

import fuseopt

check.CHUNK = 2**24 if not DRY else check.CHUNK
COPY_ELEMENTS = 2**29 if not DRY else 2**16
CACHE = torch.cuda.get_device_properties(0).L2_cache_size if not DRY else 0  # bytes


def gpt2() -> list[tuple[int, ...]]:
    """The 148 tensors of GPT-2 small."""
    w = 768
    layer = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return [(50257, w), (1024, w), *layer * 12, (w,), (w,)]


def one(n: float) -> list[tuple[int]]:
    return [(int(n),)]


PLAIN = {f"one tensor of {n:.0e}": one(n) for n in (1e4, 1e5, 1e6, 1e7, 1e8)}
PLAIN |= {"GPT-2, 148 tensors": gpt2(), "1000 tensors of 64": [(8, 8)] * 1000, "one tensor of 5e+08": one(5e8)}
FULL = {"50 tensors, 67M": [(1024, 1310)] * 50, "one tensor of 67M": [(8192, 8192)], "GPT-2, 148 tensors": gpt2()}
FULL |= {"1000 tensors of 64": [(8, 8)] * 1000}
if DRY:
    PLAIN, FULL = {"one tensor": [(64, 17)]}, {"3 tensors": [(16, 16)] * 3}


@dataclass
class GpuCase(variants.Case):
    """A case of variants.py on the device, with shapes of its own."""

    sizes: list | None = None
    device = DEVICE

    @property
    def shapes(self):
        return self.sizes


def copy() -> tuple[Callable, int]:
    """(copies device memory to device memory, bytes read and written)."""
    a = torch.ones(COPY_ELEMENTS, device=DEVICE)
    b = torch.empty_like(a)
    return lambda: b.copy_(a), 8 * COPY_ELEMENTS


def timed(case: GpuCase, makers: list[Callable], limit: float) -> Iterator[dict]:
    """A row for each variant, those whose first steps are right timed beside a copy; ratios are within a round."""
    data = variants.Data(case)
    ready, untimed = measure.verified(case, data, makers(data))
    here = {"case": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
    for row in untimed:
        yield here | {"variant": row["name"], "error": row["problem"][:300]}
    copying, moved = copy()
    samples = place.alternated({"copy": copying} | {v.name: v.step for v in ready}, limit)
    per_byte = [s / moved for s in samples["copy"]]
    for name, size in {"copy": moved, **{v.name: v.bytes() for v in ready}}.items():
        own = samples[name]
        row = here | {"variant": name, "bytes": size} | place.summary(own)
        row["bytes/s"] = size / row["seconds"]
        if name != "copy":
            row |= {"ratio": measure.ratios(own, samples[ready[0].name])["median"], "to": ready[0].name}
            if size >= 2 * CACHE:  # what the cache serves is no share of the memory's bandwidth
                row["of copy"] = measure.ratios([size * b for b in per_byte], own)["median"]
        yield row


def attempted(case: GpuCase, makers: list[Callable], limit: float) -> Iterator[dict]:
    """The rows of timed(), and how it ended if it failed."""
    try:
        yield from timed(case, makers, limit)
    except Exception as error:
        traceback.print_exc(limit=-4)
        yield {"case": case.shape, "error": f"{type(error).__name__}: {error}"[:300]}
    free()


def roofline() -> Iterator[dict]:
    """Plain AdamW as a share of what a copy on the device moves, and against torch's fused one."""
    for shape, sizes in PLAIN.items():
        for name in ("adamw", "adamw-bf16"):
            case = GpuCase(name, shape, sizes=sizes)

            def makers(data, case=case):
                ours = [lambda b=b: variants.fused_pass(case, data, backend=b) for b in place.BACKENDS]
                return [*ours, lambda: variants.plain_torch(case, data, "fused")]

            yield from attempted(case, makers, 1.0 if not DRY else 0.01)


def full() -> Iterator[dict]:
    """mask + clip + decay + AdamW + prune + EMA in one pass, against torch with a pass for each."""
    for shape, sizes in FULL.items():
        case = GpuCase("full", shape, sizes=sizes)

        def makers(data, case=case):
            ours = [lambda b=b: variants.fused_pass(case, data, "grad", b) for b in place.BACKENDS]
            frozen = [lambda: variants.fused_pass(case, data, "freeze", "cuda")]
            return ours + frozen + variants.makers(case, data)[2:]

        yield from attempted(case, makers, 2.0 if not DRY else 0.01)


def select() -> Iterator[dict]:
    """A step that selects what to prune, less a step that does not: exact counts and 2:4, against torch."""
    n = 2**26 if not DRY else 2**12
    for name, prune in (
        ("80%", {"sparsity": 0.8, "begin": 1, "end": 10_000, "schedule": "linear"}),
        ("2:4", {"pattern": "2:4", "begin": 1, "end": 10_000, "regrow": True}),
    ):
        p = torch.randn(n // 1024, 1024, device=DEVICE)
        steps = {f"torch, {name}": lambda p=p, k=name: of_torch(p, k)}
        for backend in place.BACKENDS:
            for what, stages in ((name, {"prune": fuseopt.Prune(**prune)}), ("none", {})):
                what = f"fuseopt, {backend}, {what}"
                made = place.attempt(lambda b=backend, s=stages: {"step": begun(p, b, s)})
                if "step" in made:
                    steps[what] = made["step"]
                else:
                    yield {"what": what, "entries": n} | made
        samples = place.alternated(steps, 3.0 if not DRY else 0.01, least=3)
        for what, values in samples.items():
            yield {"what": what, "entries": n} | place.summary(values)
        free()


def begun(p: torch.Tensor, backend: str, stages: dict) -> Callable:
    """The step of an optimizer of a copy of p, after the first."""
    q = torch.nn.Parameter(p.clone())
    q.grad = torch.ones_like(q)
    opt = fuseopt.SGD([q], lr=1e-9, backend=backend, **stages)
    opt.step()
    return opt.step


def of_torch(p: torch.Tensor, name: str) -> torch.Tensor:
    """The mask that torch makes of |p|: by the k-th value, or the two largest of every four."""
    if name == "80%":
        return p.abs() > p.abs().flatten().kthvalue(math.ceil(0.8 * p.numel())).values
    groups = p.abs().view(-1, 4)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True)


def free() -> None:
    if not DRY:
        torch.cuda.empty_cache()
