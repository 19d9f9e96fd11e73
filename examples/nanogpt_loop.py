"""A small GPT and its loop in the style of nanoGPT; the optimizer is the only line that is not torch's.

The loop asks inspect.signature whether `fused` exists, decays matrices only, writes group["lr"] at every
step, clips, and saves a checkpoint from which it can go on.

Run it: python examples/nanogpt_loop.py
"""

import inspect
import math

import torch
from torch import nn
from torch.nn import functional as F

import fuseopt

TEXT = "".join(f"{a} plus {b} is {a + b}, {a} times {b} is {a * b}. " for a in range(10) for b in range(10))
CHARACTERS = sorted(set(TEXT))
DATA = torch.tensor([CHARACTERS.index(c) for c in TEXT])
BLOCK, BATCH, WIDTH, HEADS = 32, 8, 32, 4
STEPS, WARMUP, MAX_LR, MIN_LR = 40, 5, 3e-3, 3e-4


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(len(CHARACTERS), WIDTH)
        self.position = nn.Embedding(BLOCK, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.1, F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(CHARACTERS), bias=False)
        self.head.weight = self.token.weight  # tied
        for p in self.parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.05)

    def forward(self, x, y):
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.blocks(self.token(x) + self.position.weight[: x.shape[1]], causal, is_causal=True)
        return F.cross_entropy(self.head(h).flatten(0, 1), y.flatten())


def configure_optimizer(model, optimizer_class):
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    extra = {"fused": True} if "fused" in inspect.signature(optimizer_class).parameters else {}
    return optimizer_class(groups, lr=MAX_LR, betas=(0.9, 0.95), **extra)


def learning_rate(step):
    if step < WARMUP:
        return MAX_LR * step / WARMUP  # 0 at the first step
    return MIN_LR + (MAX_LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(DATA) - BLOCK - 1, (BATCH,), generator=generator)
    rows = torch.stack([DATA[i : i + BLOCK + 1] for i in starts])
    return rows[:, :-1], rows[:, 1:]


def train(optimizer_class=fuseopt.AdamW, checkpoint=None, resume=False, scale=False):
    """The loss of every step. `checkpoint`: a file to write half-way, or to go on from; `scale`: as for fp16."""
    torch.manual_seed(1337)
    model = GPT()
    scaler = torch.amp.GradScaler("cpu", enabled=scale)
    optimizer = configure_optimizer(model, optimizer_class)
    first = 0
    if resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    losses = []
    for step in range(first, STEPS):
        if step == STEPS // 2 and checkpoint and not resume:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, checkpoint)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        torch.manual_seed(step)  # of dropout, so that a resumed run draws the same
        loss = model(*batch(step))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
