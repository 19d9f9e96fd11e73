"""The statistics of each step, and the numbers of explain(), in TensorBoard: in a loop of one's own, and in a Trainer.

Run it: python examples/tensorboard.py; then tensorboard --logdir runs
"""

import torch
from torch.utils.tensorboard import SummaryWriter

import fuseopt

STEPS = 40


def log_statistics(writer, optimizer, step):
    """Reading the values waits for a GPU, so a long run calls this every few steps."""
    for name, value in optimizer.statistics().items():
        writer.add_scalar(f"optimizer/{name}", value, step)


def log_explanation(writer, optimizer, step):
    explanation = optimizer.explain()
    writer.add_text("optimizer/explain", f"<pre>{explanation}</pre>", step)
    writer.add_scalar("optimizer/bytes_per_step", explanation.bytes_per_step, step)
    if explanation.last_seconds is not None:
        writer.add_scalar("optimizer/step_seconds", explanation.last_seconds, step)


def train(optimizer_class=fuseopt.AdamW, folder="runs/loop"):
    """A regression; returns the losses. What is logged is there with fuseopt alone."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    x = torch.randn(256, 16)
    y = x[:, :4].prod(1, keepdim=True) + x[:, 4:5]
    ours = issubclass(optimizer_class, fuseopt.AdamW)
    optimizer = optimizer_class(model.named_parameters(), lr=1e-2, **({"statistics": True} if ours else {}))
    if ours:
        optimizer.time_steps()
    losses = []
    with SummaryWriter(folder) as writer:
        for step in range(1, STEPS + 1):
            loss = torch.nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            writer.add_scalar("train/loss", losses[-1], step)
            if ours and step % 10 == 0:
                log_statistics(writer, optimizer, step)
        if ours:
            log_explanation(writer, optimizer, STEPS)
    return losses


def trainer_with_statistics(*args, **kwargs):
    """A transformers.Trainer that logs the statistics beside its loss, to TensorBoard and wherever else it reports."""
    from transformers import Trainer

    from fuseopt.integrations import unwrap

    class WithStatistics(Trainer):
        def log(self, logs, *args, **kwargs):
            if "loss" in logs:  # of a training step; evaluations are logged here, too
                found = unwrap(self.optimizer).statistics()
                logs = {**logs, **{f"optimizer/{name}": value for name, value in found.items()}}
            super().log(logs, *args, **kwargs)

    return WithStatistics(*args, **kwargs)


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; now run: tensorboard --logdir runs")
