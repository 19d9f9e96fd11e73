"""What each schedule of an average weighs, and the loss of averages under noise. Writes averages.png beside it.

python docs/pages/pictures/averages.py [--quick] [--out FILE]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import fuseopt
from fuseopt import EMA

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
parser.add_argument("--out", default=Path(__file__).with_suffix(".png"))
args = parser.parse_args()
STEPS = 40 if args.quick else 400
SCHEDULES = {
    "EMA(0.99)": EMA(0.99),
    'EMA(0.99, warmup="timm")': EMA(0.99, warmup="timm"),
    'EMA(0.99, warmup="diffusers")': EMA(0.99, warmup="diffusers"),
    'EMA(warmup="edm2", sigma_rel=0.1)': EMA(warmup="edm2", sigma_rel=0.1),
    f'EMA(warmup="swa", start={STEPS // 2})': EMA(warmup="swa", start=STEPS // 2),
}


def shares(ema: EMA) -> torch.Tensor:
    """The share of each step's weights in the average after the last: weight t is 1 at step t and 0 otherwise."""
    p = torch.nn.Parameter(torch.zeros(STEPS, 1, dtype=torch.float64))
    opt = fuseopt.SGD([p], lr=1.0, ema=ema)
    for t in range(STEPS):
        p.grad = p.detach().clone()  # a step to 0 ...
        p.grad[t] -= 1  # ... but for entry t, which becomes 1
        opt.step()
    return opt.state[p]["ema_0"].flatten()


def losses() -> dict[str, list[float]]:
    """The loss on clean data of a linear model trained on noisy batches: its weights', and each average's."""
    torch.manual_seed(0)
    x = torch.randn(512, 32)
    y = x @ torch.randn(32, 1)
    model = torch.nn.Linear(32, 1)
    opt = fuseopt.SGD(model.parameters(), lr=0.003, momentum=0.9, ema=list(SCHEDULES.values())[:4])
    found = {"the weights": [], **{name: [] for name in list(SCHEDULES)[:4]}}
    for _ in range(STEPS):
        rows = torch.randint(512, (8,))
        opt.zero_grad()
        (model(x[rows]) - y[rows] - 4 * torch.randn(8, 1)).square().mean().backward()
        opt.step()
        with torch.no_grad():
            found["the weights"].append(float((model(x) - y).square().mean()))
            for k, name in enumerate(list(SCHEDULES)[:4]):
                with opt.swap_ema(k):
                    found[name].append(float((model(x) - y).square().mean()))
    return found


fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
steps = range(1, STEPS + 1)
for k, (name, ema) in enumerate(SCHEDULES.items()):
    left.plot(steps, shares(ema), f"C{k}", label=name)
left.set(xlabel="step", ylabel=f"share in the average after step {STEPS}", xlim=(-STEPS // 50, STEPS), ylim=(0, None))
left.set_title("What an average weighs", fontsize=11)
left.legend(frameon=False, fontsize=8, loc="upper center")
for k, (name, values) in enumerate(losses().items()):
    right.plot(steps, values, "0.75" if k == 0 else f"C{k - 1}", label=name, lw=0.8 if k == 0 else 1.5)
right.set(xlabel="step", ylabel="loss on clean data", yscale="log", xlim=(0, STEPS))
right.set_title("A regression on noisy batches", fontsize=11)
right.legend(frameon=False, fontsize=8, loc="upper right")
for ax in (left, right):
    ax.grid(alpha=0.3)
fig.savefig(args.out, dpi=110)
