"""What test_distributed.py runs in one process and in several: in a module of its own, which workers can import."""

from functools import partial

import emulated
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fuseopt
from fuseopt import EMA, Prune

# Rows that no number of processes divides, a shard of one row and so an empty one, vectors, a convolution.
SHAPES = [(13, 40), (1, 33), (5, 7), (40,), (6, 5, 3, 3), (1,)]

PLACEMENTS = {
    "rows": ((2,), [Shard(0)]),
    "columns": ((2,), [Shard(-1)]),
    "replicated": ((2,), [Replicate()]),
    "rows over 3": ((3,), [Shard(0)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(-1)]),
    "rows twice": ((2, 2), [Shard(0), Shard(0)]),
    "rows, replicated": ((2, 2), [Shard(0), Replicate()]),
}


def weights(dtype: torch.dtype) -> list[Tensor]:
    """Many equal magnitudes, so that pruning has ties to break."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(-9, 10, shape, generator=generator) / 8).to(dtype) for shape in SHAPES]


def gradient(shape: tuple, dtype: torch.dtype, t: int) -> Tensor:
    """Zero in half of the last dimension: what is equal there stays equal under AdamW without decay."""
    generator = torch.Generator().manual_seed(t)
    g = torch.randn(shape, generator=generator).to(dtype)
    g[..., : shape[-1] // 2] = 0
    return g


def spread(x: Tensor, mesh, placements: list) -> DTensor:
    """x over a mesh; a negative dimension counts from the end."""
    placed = [Shard(p.dim % x.dim()) if isinstance(p, Shard) else p for p in placements]
    return distribute_tensor(x, mesh, placed)


def whole(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def build(cls, params: list, options: dict):
    named = [(f"w{k}", p) for k, p in enumerate(params)]
    return cls(
        [{"params": named[:3]}, {"params": named[3:], "lr": 0.02}], **{"lr": 0.01, "weight_decay": 0.1} | options
    )


def set_masks(opt, params: list) -> None:
    """Rows frozen, a column mask, single entries, a mask along a dimension that one process may not hold."""
    generator = torch.Generator().manual_seed(1)
    opt.mask(params[0], torch.arange(13)[:, None] % 3 > 0)
    opt.mask(params[1], (torch.arange(33) % 4 > 0)[None, :], mode="grad")
    opt.mask(params[2], torch.rand(5, 7, generator=generator) > 0.3)
    opt.mask(params[4], torch.rand(6, 1, 3, 1, generator=generator) > 0.3)


def train(opt, params: list, place, steps: range, dtype: torch.dtype) -> None:
    for t in steps:
        for k, p in enumerate(params):
            p.grad = place(gradient(SHAPES[k], dtype, 10 * t + k))
        opt.step()


def result(opt, params: list) -> dict:
    """Parameters, their state and what is pruned, whole."""
    found = {}
    for k, p in enumerate(params):
        found[f"w{k}"] = whole(p.detach())
        found[f"w{k} pruned"] = whole(opt.prune_mask(p))
        for key, value in opt.state[p].items():
            if not key.startswith(("mask_", "prune_")):
                found[f"w{k} {key}"] = whole(value) if isinstance(value, Tensor) else value
    if opt.defaults["statistics"]:
        found["statistics"] = dict(opt.statistics())
    return found


def one_process(cls, options: dict, dtype: torch.dtype, masked: bool) -> dict:
    params = [torch.nn.Parameter(w) for w in weights(dtype)]
    opt = build(cls, params, options)
    if masked:
        set_masks(opt, params)
    train(opt, params, lambda g: g, range(1, 6), dtype)
    return result(opt, params)


def many_processes(placement: str, cls, options: dict, dtype: torch.dtype, masked: bool) -> dict:
    sizes, placements = PLACEMENTS[placement]
    mesh = init_device_mesh("cpu", sizes)
    params = [torch.nn.Parameter(spread(w, mesh, placements)) for w in weights(dtype)]
    opt = build(cls, params, options)
    if masked:
        set_masks(opt, params)
    train(opt, params, lambda g: spread(g, mesh, placements), range(1, 6), dtype)
    return result(opt, params)


EVERYTHING = {"ema": [EMA(0.9), EMA(0.5)], "l1": 1e-3, "prune": Prune(0.6, begin=2, end=4), "statistics": True}
CASES = {
    "plain": (fuseopt.AdamW, {}),
    "everything": (fuseopt.AdamW, EVERYTHING),
    "ties": (fuseopt.AdamW, {"prune": Prune(0.37), "weight_decay": 0.0}),
    "each tensor": (
        fuseopt.SGD,
        {"momentum": 0.9, "dampening": 0.5, "prune": Prune(0.6, scope="tensor"), "ema": EMA(0.9)},
    ),
    "threshold": (fuseopt.Adagrad, {"prune": Prune(threshold=0.3), "ema": EMA(0.9)}),
    "clipped": (fuseopt.AdamW, EVERYTHING | {"max_grad_norm": 0.7}),
    "nadam": (fuseopt.NAdam, {"ema": EMA(0.9)}),
    "lion": (fuseopt.Lion, EVERYTHING),
}


def placements_over(world: int) -> list[str]:
    return [name for name, (sizes, _) in PLACEMENTS.items() if torch.Size(sizes).numel() == world]


BACKENDS = ("cpu", "torch") if emulated.why_not else ("cpu", "cuda", "torch")


def cases(place, backends: tuple = BACKENDS) -> dict:
    """The result of place(class, options, dtype, masked) for every case, type and backend."""
    return {
        (name, dtype, backend): place(cls, options | {"backend": backend}, dtype, name not in ("plain", "ties"))
        for name, (cls, options) in CASES.items()
        for dtype in (torch.float32, torch.bfloat16)
        for backend in backends
    }


def many_processes_all_cases(world: int) -> dict:
    backends = BACKENDS if world == 2 else ("cpu",)
    return {name: cases(partial(many_processes, name), backends) for name in placements_over(world)}


def refusals() -> dict[str, str]:
    """What each wrong use of shared parameters says; it must not change the parameter."""
    mesh = init_device_mesh("cpu", (2,))

    def error(options: dict, change) -> str:
        p = torch.nn.Parameter(spread(torch.ones(4, 4), mesh, [Shard(0)]))
        opt = fuseopt.AdamW([("w", p)], **options)
        p.grad = spread(torch.ones(4, 4), mesh, [Shard(0)])
        if not options:
            opt.step()
        before = p.full_tensor().clone()
        try:
            change(opt, p)
            opt.step()
        except (TypeError, ValueError) as e:
            assert torch.equal(p.full_tensor(), before)
            return f"{type(e).__name__}: {e}"
        return "nothing"

    def load_whole(opt, p):
        saved = opt.state_dict()
        for state in saved["state"].values():
            state["exp_avg"] = state["exp_avg"].full_tensor()
        opt.load_state_dict(saved)

    return {
        "sharded": error({"sharded": True}, lambda opt, p: None),
        "plain state": error({}, lambda opt, p: opt.state[p].update(exp_avg=torch.zeros(4, 4))),
        "whole moments": error({}, load_whole),
        "mask": error({}, lambda opt, p: opt.mask("w", torch.ones(3, 4, dtype=torch.bool))),
        "verify": error({}, lambda opt, p: fuseopt.verify.attach(opt)),
    }


def gradient_placed_otherwise() -> Tensor:
    """AdamW on a parameter split by rows whose gradient is split by columns: torch redistributes it."""
    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(spread(torch.ones(4, 4), mesh, [Shard(0)]))
    opt = fuseopt.AdamW([p])
    for t in range(1, 3):
        p.grad = spread(gradient((4, 4), torch.float32, t), mesh, [Shard(1)])
        opt.step()
    return p.full_tensor()
