"""What test_engines.py runs under torch's own distributed engines; in a module that workers can import."""

import copy
import runpy
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fuseopt
from fuseopt import EMA, Prune

FULL = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "ema": [EMA(0.9, warmup="timm"), EMA(warmup="swa", start=1)],
    "prune": Prune(0.7, begin=2, end=6, every=2),
}


def network() -> nn.Module:
    """Layers that no 3 or 4 processes divide evenly, and a last one of a single row."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 14), nn.ReLU(), nn.Linear(14, 10), nn.ReLU(), nn.Linear(10, 1))


def batch(t: int) -> torch.Tensor:
    """The same on every process, so that averaging over them changes nothing."""
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(100 + t))


def train(model: nn.Module, opt, steps: range) -> None:
    for t in steps:
        opt.zero_grad()
        model(batch(t)).square().mean().backward()
        opt.step()


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def weights(model: nn.Module) -> dict:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def shard_in_two_dimensions(model: nn.Module) -> nn.Module:
    """Tensor parallel by FSDP2: the rows of a layer are cut by both, in the other order."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["data"])


def shard_in_bf16(model: nn.Module) -> nn.Module:
    """Parameters in fp32, everything computed in bf16."""
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32))


ENGINES = {
    "one process": lambda model: model,
    "ddp": DistributedDataParallel,
    "ddp, gradients in buckets": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    "fsdp2": fully_shard,
    "fsdp2 in bf16": shard_in_bf16,
    "tensor parallel and fsdp2": shard_in_two_dimensions,
}


def ours_beside_torchs(engine: str) -> list[dict]:
    """Weights after five steps of ours, and of torch's fused, from the same gradients."""
    found = []
    for cls, options in ((fuseopt.AdamW, {}), (torch.optim.AdamW, {"fused": True})):
        model = ENGINES[engine](network())
        train(model, cls(model.parameters(), lr=0.01, weight_decay=0.1, **options), range(5))
        found.append(weights(model))
    return found


def with_everything(engine: str) -> dict:
    """Weights, averages and pruned entries after eight steps with a mask, clipping, an average and pruning."""
    model = ENGINES[engine](network())
    opt = fuseopt.AdamW(model.parameters(), **FULL)
    first = next(model.parameters())
    opt.mask(first, torch.arange(14)[:, None] % 4 > 0)
    train(model, opt, range(8))
    params = list(model.parameters())
    with opt.swap_ema():
        averages = [whole(p.detach()).clone() for p in params]
    other = network()
    opt_of_names = fuseopt.AdamW(model.named_parameters(), ema=EMA(0.5))
    train(model, opt_of_names, range(1))
    if "ddp" not in engine:  # which calls the parameters by other names
        opt_of_names.copy_ema_to(other)
    copied = [p.detach() for p in other.parameters()]
    pruned = [whole(opt.prune_mask(p)) for p in params]
    found, said = {"averages": averages, "pruned": pruned, "copied": copied}, opt.explain()
    return found | {"bytes": said.bytes_per_step, "explained": str(said)}


def forwards_around_a_swap(copied: bool) -> dict:
    """What a model sharded by FSDP2 computes in and after swap_ema, or copy_ema_to; and whole models beside it."""
    model = fully_shard(network())
    opt = fuseopt.AdamW(model.named_parameters(), lr=0.1, ema=EMA(0.9))
    train(model, opt, range(4))
    own, average = network(), network()
    own.load_state_dict(weights(model))
    average.load_state_dict({name: whole(opt.state[p]["ema_0"]) for name, p in model.named_parameters()})
    found = {}
    with torch.no_grad():
        model(batch(4))
        if copied:
            opt.copy_ema_to(model)
            model.reshard()
            return {"average": (model(batch(4)), average(batch(4))), "weights": (weights(model), weights(average))}
        with opt.swap_ema():
            found["average"] = model(batch(4)), average(batch(4))
    found["own"] = model(batch(4)), own(batch(4))
    opt.zero_grad()
    for one in (model, own):
        one(batch(4)).square().mean().backward()
    found["gradient"] = whole(model[0].weight.grad), own[0].weight.grad
    return found


def copied_average(placed: str, target_placed: str) -> list[tuple]:
    """(weight, average) of a model after copy_ema_to from an optimizer whose model is placed otherwise."""
    place = {
        "whole": lambda model: model,
        "rows": fully_shard,
        "columns": lambda model: fully_shard(model, shard_placement_fn=lambda p: Shard(p.dim() - 1)),
    }
    model, target = place[placed](network()), place[target_placed](network())
    opt = fuseopt.AdamW(model.named_parameters(), lr=0.1, ema=EMA(0.5))
    train(model, opt, range(3))
    opt.copy_ema_to(target)
    copied = weights(target)
    return [(copied[name], whole(opt.state[p]["ema_0"])) for name, p in model.named_parameters()]


def zero_redundancy(sharded: bool) -> dict:
    """ZeroRedundancyOptimizer, whose processes each step whole parameters of their own; or one process alone."""
    model = network()
    if not sharded:
        train(model, fuseopt.AdamW(model.parameters(), **FULL), range(8))
        return weights(model)
    model = DistributedDataParallel(model)
    opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fuseopt.AdamW, sharded=True, **FULL)
    train(model, opt, range(5))
    opt.consolidate_state_dict(to=0)
    saved = [copy.deepcopy(opt.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved, src=0)
    opt.load_state_dict(saved[0])
    train(model, opt, range(5, 8))
    return weights(model.module)


def saved_after(steps: int, folder: str | None, sharded: bool) -> dict:
    """Trains, saves into `folder` with torch.distributed.checkpoint half-way, goes on; the final weights."""
    import torch.distributed.checkpoint as dcp

    model, opt = model_to_save(sharded)
    train(model, opt, range(steps))
    if folder:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    train(model, opt, range(steps, 2 * steps))
    return final(model, opt)


def model_to_save(sharded: bool):
    model = fully_shard(network()) if sharded else network()
    named = list(model.named_parameters())
    opt = fuseopt.AdamW([{"params": named[:3]}, {"params": named[3:], "lr": 0.02}], **FULL | {"max_grad_norm": None})
    opt.mask("0.weight", torch.arange(14)[:, None] % 4 > 0)
    opt.mask("2.weight", torch.arange(14)[None, :] % 3 > 0, mode="grad")
    return model, opt


def resumed_from(folder: str, steps: int, sharded: bool) -> dict:
    """A new process group loads what `saved_after` wrote, and goes on."""
    import torch.distributed.checkpoint as dcp

    model, opt = model_to_save(sharded)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="torch")
        state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, opt, range(steps, 2 * steps))
    return final(model, opt)


def final(model: nn.Module, opt) -> dict:
    found = weights(model)
    for name, p in model.named_parameters():
        found[name + " pruned"] = whole(opt.prune_mask(p))
        for key in ("exp_avg", "exp_avg_sq", "ema_0", "ema_1", "step"):
            found[f"{name} {key}"] = whole(opt.state[p][key])
    found["steps"] = opt.param_groups[0]["steps"]
    return found


def overflow_on_one_process(cls) -> list[tuple]:
    """(scale, weights of the first layer) after steps of which the second overflows on process 1 alone."""
    model = fully_shard(network())
    opt = cls(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    found = []
    for t in range(3):
        opt.zero_grad()
        scaler.scale(model(batch(t)).square().mean()).backward()
        if t == 1 and dist.get_rank() == 1:
            next(model.parameters()).grad.to_local()[0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
        found.append((scaler.get_scale(), weights(model)["0.weight"]))
    return found


def example(path: str, folder: str) -> dict:
    """examples/fsdp2.py: without extras ours and torch's, with them whole and resumed half-way."""
    train = runpy.run_path(path)["train"]
    return {
        "ours": train(options={}, last=20)[0],
        "torch": train(torch.optim.AdamW, options={"fused": True}, last=20)[0],
        "whole": train(last=30),
        "first half": train(last=15, folder=folder),
        "second half": train(last=30, folder=folder),
    }


def torchs_files(folder: str) -> dict:
    """torch's AdamW saves after three steps; ours, without stage options and with an average, go on from its files."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import DefaultLoadPlanner

    options = {"lr": 0.01, "weight_decay": 0.1}
    model = fully_shard(network())
    opt = torch.optim.AdamW(model.parameters(), fused=True, **options)
    train(model, opt, range(3))
    state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
    dcp.save(state, checkpoint_id=folder)
    train(model, opt, range(3, 6))
    found = {"torch": weights(model)}
    for name, extra, partial in (("ours", {}, False), ("average", {"ema": EMA(0.9)}, True)):
        model = fully_shard(network())
        opt = fuseopt.AdamW(model.parameters(), **options, **extra)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
        dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=partial))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        train(model, opt, range(3, 4))
        if extra:
            found["average is a copy"] = all(
                torch.equal(whole(p), whole(opt.state[p]["ema_0"])) for p in model.parameters()
            )
            found["told"] = [str(w.message) for w in told if "fuseopt" in w.filename or "AdamW" in str(w.message)]
        train(model, opt, range(4, 6))
        found[name] = weights(model)
    return found
