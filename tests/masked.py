"""What test_masks_distributed.py runs in one process and in several: in a module of its own, which workers can import."""

import warnings

import sharded
import torch
import torch.distributed as dist
from engines import network, train
from sharded import SHAPES, gradient, spread, weights, whole
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fuseopt
from fuseopt import EMA, masks


def above_the_mean(p, g, state):
    """Of the whole parameter: its shards together."""
    return g > whole(g).mean()


READY = {
    "top": masks.TopGradient(0.3, "global"),
    "top of each": masks.TopGradient(0.3),
    "fisher": masks.Fisher(0.3, "global"),
    "movement": masks.Movement(0.3, "global"),
    "movement of each": masks.Movement(0.3),
    "random": masks.Random(0.3, 1),
    "function": above_the_mean,
}


def run(params: list, place, fn, dtype: torch.dtype, backend: str) -> dict:
    """Five steps under a mask recomputed at every second; the last parameter misses the third."""
    opt = sharded.build(fuseopt.AdamW, params, {"backend": backend, "ema": EMA(0.9)})
    opt.mask("w[0-3]", fn=fn, every=2)
    opt.mask("w[45]", fn=fn, every=2, mode="grad")
    for t in range(1, 6):
        for k, p in enumerate(params):
            p.grad = place((gradient(SHAPES[k], torch.float32, 10 * t + k) * 4).round().to(dtype) / 4)
        if t == 3:
            params[-1].grad = None
        opt.step()
    found = sharded.result(opt, params)
    for k, state in opt.state_dict()["state"].items():
        found |= {f"{k} {key}": whole(state[key]) for key in ("mask_keep", "mask_score") if key in state}
    return found


def all_cases(params, place, backends: tuple, dtypes: tuple) -> dict:
    return {
        (name, dtype, backend): run(params(dtype), place, fn, dtype, backend)
        for name, fn in READY.items()
        for dtype in dtypes
        for backend in backends
    }


def one_process() -> dict:
    make = lambda dtype: [torch.nn.Parameter(w) for w in weights(dtype)]
    return all_cases(make, lambda g: g, ("cpu", "torch"), (torch.float32, torch.bfloat16, torch.float64))


def many_processes(placement: str) -> dict:
    sizes, placements = sharded.PLACEMENTS[placement]
    mesh = init_device_mesh("cpu", sizes)
    place = lambda x: spread(x, mesh, placements)
    make = lambda dtype: [torch.nn.Parameter(place(w)) for w in weights(dtype)]
    if placement == "rows":
        return all_cases(make, place, ("cpu", "torch"), (torch.float32, torch.bfloat16, torch.float64))
    return all_cases(make, place, ("cpu",), (torch.float32,))


OWN = [
    (fn, every)
    for fn in (masks.TopGradient(0.3, "global"), masks.Movement(0.3, "global"), masks.Fisher(0.3))
    for every in (2, None)
]


def each_its_own() -> list:
    return [masks_of_own(fn, every) for fn, every in OWN]


def masks_of_own(fn, every: int | None) -> list:
    """Masks of plain parameters, dealt out among the processes, after steps with sharded=True; all in one process.

    The last process may have none at all.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    params = [torch.nn.Parameter(w) for w in weights(torch.float32)]
    first, last = rank * 3, len(params) if world == 1 else min(rank * 3 + 3, len(params))
    own = params[first:last]
    opt = fuseopt.AdamW([{"params": own}], lr=0.01, sharded=world > 1)
    opt.mask("*", fn=fn, every=every)
    for t in range(1, 6):
        for k, p in enumerate(own):
            p.grad = (gradient(SHAPES[first + k], torch.float32, 10 * t + first + k) * 4).round() / 4
        if t == 1 and rank == 0:
            own[0].grad = None
        opt.step()
    state = opt.state_dict()["state"]
    return [(p.detach(), state[k]["mask_keep"]) for k, p in enumerate(own)]


def saved_after(steps: int, folder: str | None, shard: bool) -> dict:
    """Trains with dynamic masks, saves half-way by torch.distributed.checkpoint, goes on; all there is in the end."""
    import torch.distributed.checkpoint as dcp

    model, opt = masked_model(shard)
    train(model, opt, range(steps))
    if folder:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    train(model, opt, range(steps, 8))
    return final(model, opt)


def resumed_from(folder: str, steps: int, shard: bool) -> dict:
    """A new process group loads what `saved_after` wrote, and goes on."""
    import torch.distributed.checkpoint as dcp

    model, opt = masked_model(shard)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="torch")
        state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, opt, range(steps, 8))
    return final(model, opt)


def masked_model(shard: bool):
    model = fully_shard(network()) if shard else network()
    opt = fuseopt.AdamW(model.named_parameters(), lr=0.01, ema=EMA(0.9))
    opt.mask("*.weight", fn=masks.Fisher(0.3, "global"), every=3)
    opt.mask("0.bias", fn=masks.Random(0.5), every=2)
    opt.mask("2.bias", fn=lambda p, g, state: whole(g) > 0, every=4)  # a whole mask for what is shared
    return model, opt


def final(model, opt) -> dict:
    found = {}
    for name, p in model.named_parameters():
        state = opt.state_dict()["state"][[id(q) for q in opt.param_groups[0]["params"]].index(id(p))]
        found[name] = whole(p.detach())
        found |= {f"{name} {k}": whole(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    return found
