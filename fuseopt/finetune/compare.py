"""One step of the run's optimizer beside the same step as a torch recipe of separate passes."""

import copy
import inspect
import time

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fuseopt.finetune.train import prunable

TORCH_CLASSES = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "nadam": torch.optim.NAdam,
    "adagrad": torch.optim.Adagrad,
}
CHECKED_STEPS = 3
TOLERANCE = 1e-2  # of the learning rate: how far the two may be apart after CHECKED_STEPS
WARMUP_STEPS = 20


def compare(run, batch_size=32):
    """Time `compare_steps` steps of each, alternated, after checking that both give the same weights.

    Returns plain data: milliseconds (median and quartiles), bytes moved a step, their ratio with
    quartiles; or {"skipped": reason}.
    """
    options = run.options
    if not options.compare_steps:
        return {"skipped": "--compare_steps 0"}
    if options.optimizer not in TORCH_CLASSES or options.l1:
        return {"skipped": "torch has no " + ("L1 penalty" if options.l1 else options.optimizer)}
    ours, recipe = Fused(run), Recipe(run)
    gradients = _gradients(run, batch_size)
    difference = _difference(ours, recipe, gradients)
    if not difference <= TOLERANCE * run.args.learning_rate:
        return {
            "skipped": f"the two differ by {difference:.1e} after {CHECKED_STEPS} steps",
            "difference": difference,
        }
    times = _alternate(ours, recipe, gradients, options.compare_steps)
    ratio = times[1] / times[0]
    return {
        "fuseopt": {**_spread(times[0] * 1e3, "ms"), "bytes": ours.bytes_per_step()},
        "torch": {
            **_spread(times[1] * 1e3, "ms"),
            "bytes": sum(recipe.passes().values()),
            "passes": recipe.passes(),
        },
        "ratio": _spread(ratio, "ratio"),
        "difference": difference,
        "steps": options.compare_steps,
        "threads": torch.get_num_threads(),
    }


class Fused:
    """The run's own optimizer, state included, over a copy of the model."""

    def __init__(self, run):
        self.model = copy.deepcopy(run.model)
        self.optimizer = run.build(self.model)
        self.optimizer.load_state_dict(run.optimizer.state_dict())
        for group in self.optimizer.param_groups:
            group["lr"] = run.args.learning_rate

    def step(self):
        self.optimizer.step()

    def bytes_per_step(self):
        return self.optimizer.explain().bytes_per_step

    def averages(self):
        state = self.optimizer.state
        return [state[p]["ema_0"] for p in self.model.parameters() if "ema_0" in state[p]]


class Recipe:
    """The same step as one would write it with torch: its fused optimizer, and a pass for every other stage.

    Frozen parameters are left out of the optimizer and the norm, as requires_grad_(False) would.
    """

    def __init__(self, run):
        self.model = copy.deepcopy(run.model)
        copies = dict(zip(run.model.parameters(), self.model.parameters()))
        groups = [g for g in run.optimizer.param_groups if not run.frozen.keys() & set(g["params"])]
        self.free = [copies[p] for g in groups for p in g["params"]]
        self.max_grad_norm = groups[0]["max_grad_norm"]
        self.masks = [(copies[p], run.optimizer.prune_mask(p)) for p in prunable(run.optimizer)]
        self.masks = [(p, mask) for p, mask in self.masks if mask is not None]
        self.optimizer = _torch_optimizer(run, groups, copies)
        self.average = self._average(run, groups[0]["ema"], groups[0]["steps"])

    def _average(self, run, averages, steps):
        if not averages:
            return None
        decay, warmup = averages[0]["decay"], averages[0]["warmup"]

        def update(ema, parameters, updates):
            s = steps + int(updates) - 1  # updates starts at 1: AveragedModel has its first copy already
            now = min(decay, 1 - (1 + s) ** (-2 / 3)) if warmup == "timm" else decay
            get_ema_multi_avg_fn(now)(ema, parameters, updates)

        average = AveragedModel(self.model, multi_avg_fn=update)
        average.n_averaged.fill_(1)
        with torch.no_grad():
            for p, q in zip(average.module.parameters(), run.model.parameters()):
                p.copy_(run.optimizer.state[q]["ema_0"])
        return average

    def step(self):
        with torch.no_grad():
            for p, mask in self.masks:
                p.grad.masked_fill_(mask, 0.0)
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.free, self.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            for p, mask in self.masks:
                p.masked_fill_(mask, 0.0)
        if self.average:
            self.average.update_parameters(self.model)

    def averages(self):
        return list(self.average.module.parameters()) if self.average else []

    def passes(self):
        """Bytes that each pass moves: 1 for a boolean mask's entry, 4 for a float32 read or written."""
        free, masked = sum(p.numel() for p in self.free), sum(p.numel() for p, _ in self.masks)
        slots = len([v for v in self.optimizer.state[self.free[0]].values() if v.shape == self.free[0].shape])
        everything = sum(p.numel() for p in self.model.parameters())
        return {
            "gradient mask": 9 * masked,
            "norm and clip": 12 * free if self.max_grad_norm else 0,
            "optimizer": 4 * (3 + 2 * slots) * free,
            "weight mask": 9 * masked,
            "average": 12 * everything if self.average else 0,
        }


def _torch_optimizer(run, groups, copies):
    """torch's optimizer over the copies, fused where torch has that, with the moments of the run's."""
    kind = TORCH_CLASSES[run.options.optimizer]
    names = set(inspect.signature(kind).parameters) - {"params", "foreach", "fused"}
    plain = [
        {"params": [copies[p] for p in g["params"]], **{k: v for k, v in g.items() if k in names}}
        for g in groups
    ]
    for group in plain:
        group["lr"] = run.args.learning_rate
    speed = "fused" if "fused" in inspect.signature(kind).parameters else "foreach"
    optimizer = kind(plain, lr=run.args.learning_rate, **{speed: True})
    for p, q in copies.items():
        if any(q is free for g in plain for free in g["params"]):
            state = run.optimizer.state[p]
            optimizer.state[q] = {
                k: v.clone() if torch.is_tensor(v) else v
                for k, v in state.items()
                if not k.startswith(("ema_", "prune_", "mask_"))
            }
    return optimizer


def _gradients(run, batch_size):
    """The gradients of one training batch, in the order of the parameters."""
    model = copy.deepcopy(run.model).train()
    batch = run.data.train[:batch_size]
    images = torch.stack([row["images"] for row in batch]).to(run.args.device)
    labels = torch.tensor([row["labels"] for row in batch], device=run.args.device)
    return torch.autograd.grad(model(images, labels)["loss"], list(model.parameters()))


def _step(contestant, gradients):
    """One step from these gradients; returns its seconds. Setting the gradients is not timed."""
    for p, g in zip(contestant.model.parameters(), gradients):
        p.grad = g.clone()
    begin = time.perf_counter()
    contestant.step()
    return time.perf_counter() - begin


def _difference(ours, recipe, gradients):
    """The greatest difference of any weight or averaged weight after a few steps of each."""
    for _ in range(CHECKED_STEPS):
        _step(ours, gradients), _step(recipe, gradients)
    pairs = [
        *zip(ours.model.parameters(), recipe.model.parameters()),
        *zip(ours.averages(), recipe.averages()),
    ]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _alternate(ours, recipe, gradients, steps):
    """Seconds, shape (2, steps): one step of each in turn, after a few that are not counted."""
    times = [[_step(ours, gradients), _step(recipe, gradients)] for _ in range(WARMUP_STEPS + steps)]
    return np.array(times[WARMUP_STEPS:]).T


def _spread(values, unit):
    low, median, high = np.percentile(values, [25, 50, 75])
    return {unit: float(median), "quartiles": [float(low), float(high)]}
