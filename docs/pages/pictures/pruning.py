"""Sparsity and loss while a small network is pruned, step by step and at once. Writes pruning.png beside this file.

python docs/pages/pictures/pruning.py [--quick] [--out FILE]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fuseopt

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
parser.add_argument("--out", default=Path(__file__).with_suffix(".png"))
args = parser.parse_args()
STEPS = 60 if args.quick else 600
BEGIN, END, EVERY = STEPS // 6, STEPS * 4 // 6, STEPS // 60


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """A regression that a few products of inputs explain."""
    x = torch.randn(1024, 20)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin() + x[:, 3], (x[:, 4] - x[:, 5]).tanh()], 1)
    return x, y + 0.05 * torch.randn_like(y)


def train(prune: fuseopt.Prune | None) -> tuple[list[float], list[float]]:
    """(sparsity, loss) after each step."""
    torch.manual_seed(0)
    x, y = data()
    model = torch.nn.Sequential(torch.nn.Linear(20, 128), torch.nn.ReLU(), torch.nn.Linear(128, 3))
    opt = fuseopt.AdamW(model.named_parameters(), lr=3e-3, weight_decay=0.01, prune=prune)
    shares, losses = [], []
    for _ in range(STEPS):
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        zeros = [int((p == 0).sum()) for p in model.parameters() if p.dim() == 2]
        shares.append(sum(zeros) / sum(p.numel() for p in model.parameters() if p.dim() == 2))
        losses.append(float(loss.detach()))
    return shares, losses


fig, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
for label, prune, style in (
    ("dense", None, "0.6"),
    ("cubic", fuseopt.Prune(0.9, begin=BEGIN, end=END, every=EVERY), "C0"),
    ("linear", fuseopt.Prune(0.9, begin=BEGIN, end=END, every=EVERY, schedule="linear"), "C2"),
    ("once", fuseopt.Prune(0.9, begin=(BEGIN + END) // 2, schedule="once"), "C3"),
):
    shares, losses = train(prune)
    above.plot(range(1, STEPS + 1), shares, style, label=label)
    below.plot(range(1, STEPS + 1), losses, style, label=label)
above.set(ylabel="share of zeros", ylim=(-0.03, 1))
above.set_title("Pruning a small network to 90% zeros", fontsize=11)
below.set(xlabel="step", ylabel="training loss", yscale="log", xlim=(0, STEPS))
for ax in (above, below):
    ax.grid(alpha=0.3)
above.legend(frameon=False, loc="center left", bbox_to_anchor=(0.01, 0.6))
fig.savefig(args.out, dpi=110)
