"""A loop of one's own under accelerate: accumulation, clipping, a scheduler, and a state to resume from.

Run it: python examples/hf_accelerate.py
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fuseopt

EPOCHS = 4


def small_model():
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 4))


def examples():
    """Points of four directions; the label is the direction that is nearest."""
    generator = torch.Generator().manual_seed(1)
    points, directions = torch.randn(128, 16, generator=generator), torch.randn(16, 4, generator=generator)
    return TensorDataset(points, (points @ directions).argmax(1))


def train(optimizer_class=fuseopt.AdamW, folder=None, resume=False, **options):
    """The loss of every micro-batch. `folder`: where to save the state half-way, or to go on from."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small_model()
    optimizer = optimizer_class(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=EPOCHS * 8)
    loader = DataLoader(examples(), batch_size=8, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    first = 0
    if resume:
        accelerator.load_state(folder)  # weights, optimizer, scheduler and random numbers
        first = EPOCHS // 2
    losses = []
    for epoch in range(first, EPOCHS):
        if epoch == EPOCHS // 2 and folder and not resume:
            accelerator.save_state(folder)
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses = train(folder=folder)
        first, last = sum(losses[:16]) / 16, sum(losses[-16:]) / 16
        print(f"loss {first:.3f} -> {last:.3f}, means of the first and the last epoch")
