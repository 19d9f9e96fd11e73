"""How far weights that should stay put move, when only their gradient is masked. Writes drift.png beside this file.

python docs/pages/pictures/drift.py [--quick] [--out FILE]
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
DENSE, MASKED = 10, 20 if args.quick else 200


def train(mode: str, weight_decay: float) -> list[float]:
    """The largest change of the masked weights after each step, the mask being set after DENSE steps."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False)
    x, target = torch.randn(512, 64), torch.randn(512, 64)
    opt = fuseopt.AdamW(layer.parameters(), lr=1e-3, weight_decay=weight_decay)
    keep = torch.arange(64)[:, None] >= 32
    moved = []
    for t in range(DENSE + MASKED):
        if t == DENSE:
            opt.mask(layer.weight, keep, mode=mode)
            start = layer.weight.detach().clone()
        opt.zero_grad()
        (layer(x) - target).square().mean().backward()
        opt.step()
        if t >= DENSE:
            moved.append(float((layer.weight.detach() - start)[:32].abs().max()))
    return moved


fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for label, mode, decay, style in (
    ("gradient masked, weight_decay=0.1", "grad", 0.1, "C3-"),
    ("gradient masked, weight_decay=0", "grad", 0.0, "C1--"),
    ('mode="freeze", weight_decay=0.1', "freeze", 0.1, "C0-"),
):
    ax.plot(range(1, MASKED + 1), train(mode, decay), style, label=label)
ax.set(xlabel="steps since the mask was set", ylabel="largest change of a masked weight", xlim=(0, MASKED))
ax.set_title("AdamW moves weights whose gradient is zero", fontsize=11)
ax.grid(alpha=0.3)
ax.legend(frameon=False)
fig.savefig(args.out, dpi=110)
