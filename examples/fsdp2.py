"""A model sharded by FSDP2 on several processes, saved and resumed with torch.distributed.checkpoint.

Clipping, pruning and the moving average are those of the whole model, as in one process. Resume on as many
processes as you like.

Run it: torchrun --nproc-per-node 2 examples/fsdp2.py runs/fsdp2
        torchrun --nproc-per-node 3 examples/fsdp2.py runs/fsdp2   # goes on from what the first has saved
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import fuseopt

STEPS = 60
EXTRAS = {
    "max_grad_norm": 1.0,
    "ema": fuseopt.EMA(0.99, warmup="timm"),
    "prune": fuseopt.Prune(0.5, begin=10, end=50, every=10),
}


def batch(step):
    """A part for each process of a batch of 48: is the sum of the first half larger than that of the second?"""
    x = torch.randn(48, 20, generator=torch.Generator().manual_seed(step))
    y = (x[:, :10].sum(1) > x[:, 10:].sum(1)).long()
    return (part.tensor_split(dist.get_world_size())[dist.get_rank()] for part in (x, y))


def train(optimizer_class=fuseopt.AdamW, options=EXTRAS, folder=None, last=STEPS):
    """(mean loss of every step until `last`, share of zeros); goes on from the checkpoint in `folder`, if any."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 2))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_class(model.parameters(), lr=3e-3, weight_decay=0.01, **options)

    progress = {"step": torch.tensor(0)}
    if folder and (Path(folder) / ".metadata").exists():
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state | progress, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    losses = []
    for step in range(int(progress["step"]), last):
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())

    if folder:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state | {"step": torch.tensor(last)}, storage_writer=dcp.FileSystemWriter(folder, overwrite=True))
    matrices = [p.full_tensor() for p in model.parameters() if p.dim() == 2]
    return losses, float(sum((w == 0).sum() for w in matrices) / sum(w.numel() for w in matrices))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    resuming = folder and (Path(folder) / ".metadata").exists()
    losses, zeros = train(folder=folder, last=2 * STEPS if resuming else STEPS)
    if dist.get_rank() == 0 and not losses:
        print(f"{folder} holds a finished run; remove it to start again")
    elif dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps, {zeros:.0%} of the matrices zero")
    dist.barrier()  # gloo may abort a process that ends while another still talks to it
    dist.destroy_process_group()
