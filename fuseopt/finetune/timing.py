"""How long an optimizer step takes beside a torch recipe of separate passes, after the training."""

import copy
import inspect
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from fuseopt.finetune.optim import TORCH_CLASSES
from fuseopt.finetune.stages import prunable
from fuseopt.finetune.table import spread
from fuseopt.stages import ema

CHECKED_STEPS = 3
TOLERANCE = 1e-2  # of the learning rate: how far the two may be apart after CHECKED_STEPS
WARMUP_STEPS = 20


@dataclass
class TimingOptions:
    """What is timed beside the training."""

    _argument_group_name = "timing"

    compare_steps: int = field(
        default=0,
        metadata={"help": "Steps timed at the end beside the same step as separate torch passes; 0: none."},
    )


def compare(run, batch_size=32):
    """Time `compare_steps` steps of each, alternated, after checking that both give the same weights.

    Returns plain data: milliseconds (median and quartiles), bytes moved a step, their ratio with
    quartiles; or {"skipped": reason}.
    """
    reason = _reason_to_skip(run)
    if reason:
        return {"skipped": reason}
    ours, recipe = Fused(run), Recipe(run)
    gradients = _gradients(run, batch_size)
    difference = _difference(ours, recipe, gradients)
    if not difference <= TOLERANCE * run.args.learning_rate:
        return {
            "skipped": f"the two differ by {difference:.1e} after {CHECKED_STEPS} steps",
            "difference": difference,
        }
    times = _alternate(ours, recipe, gradients, run.options.compare_steps)
    return {
        "fuseopt": {**spread(times[0] * 1e3, "ms"), "bytes": ours.optimizer.explain().bytes_per_step},
        "torch": {
            **spread(times[1] * 1e3, "ms"),
            "bytes": sum(recipe.passes().values()),
            "passes": recipe.passes(),
        },
        "ratio": spread(times[1] / times[0], "ratio"),
        "difference": difference,
        "steps": run.options.compare_steps,
        "threads": torch.get_num_threads(),
    }


def _reason_to_skip(run):
    options, groups = run.options, run.optimizer.param_groups
    if not options.compare_steps:
        return "--compare_steps 0"
    if options.optimizer.startswith("torch-"):
        return f"--optimizer {options.optimizer} is torch's own already"
    if f"torch-{options.optimizer}" not in TORCH_CLASSES:
        return f"torch has no {options.optimizer}"
    if run.args.world_size > 1:
        return "several processes"
    trained = [p for g in groups for p in g["params"] if p not in run.frozen]
    other = {str(p.dtype).removeprefix("torch.") for p in trained} - {"float32"}
    if other:
        return f"parameters of type {', '.join(sorted(other))}"
    if any("mask_keep" in run.optimizer.state[p] for p in trained):
        return "some parameters are frozen in part"
    if not all(run.optimizer.state[p] for p in trained):
        return "some parameters had no gradient yet"
    if any(_is_empty(a) for a in _averages(run.optimizer, trained)):
        return "the average has no value yet"
    pruned = [g for g in groups if g["prune"] is not None and g["steps"] < (g["prune"]["end"] or g["prune"]["begin"])]
    return "the pruning is not at its end" if pruned else None


def _is_empty(average):
    return bool(torch.isnan(average).all())


def _averages(optimizer, parameters):
    return [optimizer.state[p]["ema_0"] for p in parameters if "ema_0" in optimizer.state[p]]


def _copies(run):
    """A copy of the model and the optimizer over it, with the learning rates that the schedule started from."""
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
    return model, optimizer


class Fused:
    """The run's own optimizer, state included, over a copy of the model."""

    def __init__(self, run):
        model, self.optimizer = _copies(run)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        frozen = {q for p, q in zip(run.model.parameters(), model.parameters()) if p in run.frozen}
        self.free = [p for g in self.optimizer.param_groups for p in g["params"] if p not in frozen]
        self.averages = _averages(self.optimizer, self.free)

    def step(self):
        self.optimizer.step()


class Recipe:
    """The same step as one would write it with torch: its fused optimizer, and a pass for every other stage.

    Frozen parameters are left out of the optimizer and the norm, as requires_grad_(False) would. Pruned weights,
    moments and averages are 0 already and stay so where the gradient is: they need no mask of their own.
    """

    def __init__(self, run):
        model, source = _copies(run)
        frozen = {q for p, q in zip(run.model.parameters(), model.parameters()) if p in run.frozen}
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.groups = [g for g in source.param_groups if not frozen & set(g["params"])]
        self.free = [p for g in self.groups for p in g["params"]]
        self.max_grad_norm = self.groups[0]["max_grad_norm"]
        self.masks = [(p, source.prune_mask(p)) for p in prunable(source)]
        self.masks = [(p, mask) for p, mask in self.masks if mask is not None]
        self.kind = TORCH_CLASSES[f"torch-{run.options.optimizer}"]
        self.torch_decouples = "decoupled_weight_decay" in inspect.signature(self.kind).parameters
        self.optimizer = self._torch_optimizer(source)
        self.averages, self.steps = _averages(source, self.free), self.groups[0]["steps"]
        self.ema = self.groups[0]["ema"][0] if self.averages else None

    def _torch_optimizer(self, source):
        """torch's optimizer over the copies, fused where torch has that, with the moments of the run's."""
        known = inspect.signature(self.kind).parameters
        names = set(known) - {"params", "foreach", "fused"}
        plain = [{k: v for k, v in g.items() if k in names} | {"params": g["params"]} for g in self.groups]
        for group, ours in zip(plain, self.groups):
            if self._decays_apart(ours):
                group["weight_decay"] = 0.0
        optimizer = self.kind(plain, lr=plain[0]["lr"], **{"fused" if "fused" in known else "foreach": True})
        for p in self.free:
            moments = {k: v for k, v in source.state[p].items() if not k.startswith(("ema_", "prune_", "mask_"))}
            optimizer.state[p] = {k: v.clone() if torch.is_tensor(v) else v for k, v in moments.items()}
        return optimizer

    def _decays_apart(self, group):
        """Whether decoupled decay is a pass of its own, because torch's class has none."""
        return bool(group.get("decoupled_weight_decay")) and not self.torch_decouples

    def _decouples(self, group):
        return self.kind is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))

    @torch.no_grad()
    def step(self):
        for p, mask in self.masks:
            p.grad.masked_fill_(mask, 0.0)
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.free, self.max_grad_norm)
        self._penalise_before()
        self.optimizer.step()
        self._penalise_after()
        self._average()

    def _penalise_before(self):
        for group in self.groups:
            if group["l1"] and not self._decouples(group):
                for p in group["params"]:
                    p.grad.add_(p.sign(), alpha=group["l1"])
            if group.get("weight_decay") and self._decays_apart(group):
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])

    def _penalise_after(self):
        """The soft threshold of a decoupled L1 penalty."""
        for group in self.groups:
            if group["l1"] and self._decouples(group):
                for p in group["params"]:
                    p.copy_(torch.nn.functional.softshrink(p, group["lr"] * group["l1"]))

    def _average(self):
        self.steps += 1
        weight = ema.weight(self.ema, self.steps) if self.ema else -1
        if weight >= 0:
            torch._foreach_lerp_(self.averages, self.free, weight)

    def passes(self):
        """Bytes that each pass moves: 1 for a boolean mask's entry, 4 for a float32 read or written."""
        free, masked = sum(p.numel() for p in self.free), sum(p.numel() for p, _ in self.masks)
        first = self.free[0]
        slots = len([v for v in self.optimizer.state[first].values() if v.shape == first.shape])
        apart = sum(p.numel() for g in self.groups if self._decays_apart(g) for p in g["params"])
        penalised = sum(p.numel() for g in self.groups if g["l1"] for p in g["params"])
        return {
            "gradient mask": 9 * masked,
            "norm and clip": 12 * free if self.max_grad_norm else 0,
            "decay": 8 * apart,
            "L1 penalty": 20 * penalised,  # sign or threshold into a new tensor, then into the weights or gradients
            "optimizer": 4 * (3 + 2 * slots) * free,
            "average": 12 * free if self.averages else 0,
        }


def _gradients(run, batch_size):
    """The gradients of one training batch, in the order of the trained parameters; None where there is none."""
    model, trainer = copy.deepcopy(run.model).train(), run.trainer
    rows = [trainer.train_dataset[k] for k in range(min(batch_size, len(trainer.train_dataset)))]
    inputs = {name: value.to(run.args.device) for name, value in trainer.data_collator(rows).items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng():  # dropout
        return torch.autograd.grad(model(**inputs).loss, parameters, allow_unused=True)


def _step(contestant, gradients):
    """One step from these gradients; returns its seconds. Setting the gradients is not timed."""
    for p, g in zip(contestant.parameters, gradients):
        p.grad = None if g is None else g.clone()
    wait = torch.cuda.synchronize if contestant.parameters[0].is_cuda else lambda: None
    wait()
    begin = time.perf_counter()
    contestant.step()
    wait()
    return time.perf_counter() - begin


def _difference(ours, recipe, gradients):
    """The greatest difference of any weight or averaged weight after a few steps of each."""
    for _ in range(CHECKED_STEPS):
        _step(ours, gradients), _step(recipe, gradients)
    pairs = [*zip(ours.free, recipe.free), *zip(ours.averages, recipe.averages)]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _alternate(ours, recipe, gradients, steps):
    """Seconds, shape (2, steps): one step of each in turn, after a few that are not counted."""
    times = [[_step(ours, gradients), _step(recipe, gradients)] for _ in range(WARMUP_STEPS + steps)]
    return np.array(times[WARMUP_STEPS:]).T
