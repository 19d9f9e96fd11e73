"""Learning-rate schedules by one option, each after the linear warmup of --warmup_steps."""

from dataclasses import dataclass, field
from typing import Literal

from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainingArguments, get_scheduler

from fuseopt.finetune.checks import in_range, without_effect


@dataclass
class ScheduleOptions:
    """The schedules that most runs need; --lr_scheduler_type has transformers' others."""

    _argument_group_name = "learning-rate schedule"

    schedule: Literal["fixed", "step", "cosine", "linear", "plateau"] | None = field(
        default=None,
        metadata={
            "help": "fixed; step, times --step_gamma at every --step_size steps; cosine and linear, to 0 at the end; "
            "plateau, times --step_gamma where --step_size evaluations in a row brought no lower loss. "
            "None: --lr_scheduler_type."
        },
    )
    step_size: int | None = field(
        default=None,
        metadata={"help": "Of step: steps, None a third of the run's. Of plateau: evaluations, None 3."},
    )
    step_gamma: float = field(default=0.1, metadata={"help": "Factor of step and plateau, in (0, 1)."})


def check_schedule(options, args, steps):
    """Raise ValueError for a schedule that cannot be, or options that it would not heed."""
    if options.schedule not in ("step", "plateau"):
        without_effect(options, ["step_size", "step_gamma"], ScheduleOptions, "without --schedule step or plateau")
    if options.schedule is None:
        return
    for name in ("lr_scheduler_type", "lr_scheduler_kwargs"):
        value = getattr(args, name)
        if (value or None) != TrainingArguments.__dataclass_fields__[name].default:
            shown = getattr(value, "value", value)
            raise ValueError(f"--{name} {shown} with --schedule {options.schedule}: give one of the two")
    in_range("step_gamma", options.step_gamma, 0, 1, open_low=True)
    if options.step_size is not None:
        in_range("step_size", options.step_size, 1)
    if options.schedule == "plateau" and args.eval_strategy == "no":
        raise ValueError("--schedule plateau needs evaluations: pass --eval_strategy steps or epoch")
    if args.get_warmup_steps(steps) > steps:
        raise ValueError(f"--warmup_steps {args.warmup_steps:g} is more than the {steps} steps of the run")


def make_scheduler(options, args, optimizer, steps):
    """The scheduler of --schedule for a run of `steps` optimizer steps; None leaves it to the Trainer.

    For a plateau the Trainer steps it after every evaluation, with args.metric_for_best_model, which is set to the
    loss where it is None. Raises ValueError (see check_schedule).
    """
    check_schedule(options, args, steps)
    warmup, gamma = args.get_warmup_steps(steps), options.step_gamma
    if options.schedule == "step":
        size = options.step_size or max(1, steps // 3)
        return LambdaLR(optimizer, lambda t: t / warmup if t < warmup else gamma ** ((t - warmup) // size))
    if options.schedule == "plateau":
        if args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = "loss", False
        mode = "max" if args.greater_is_better else "min"
        return WarmPlateau(optimizer, warmup, mode=mode, factor=gamma, patience=(options.step_size or 3) - 1)
    if options.schedule is None:
        return None
    name = {"fixed": "constant_with_warmup"}.get(options.schedule, options.schedule)
    return get_scheduler(name, optimizer, warmup, steps)


class WarmPlateau(ReduceLROnPlateau):
    """ReduceLROnPlateau behind a linear warmup: lr * t/warmup after the optimizer's step t, until t = warmup.

    The Trainer steps this class at evaluations alone, so the warmup follows the optimizer's own steps; what is
    evaluated before its end does not count. Arguments after `warmup` as ReduceLROnPlateau's.
    """

    def __init__(self, optimizer, warmup, **kwargs):
        super().__init__(optimizer, **kwargs)
        self.warmup, self.taken = warmup, 0
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        if warmup:
            self._set(0.0)
            optimizer.register_step_post_hook(self._warm)

    def _warm(self, *_):
        if self.taken < self.warmup:
            self.taken += 1
            self._set(self.taken / self.warmup)

    def _set(self, factor):
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = rate * factor

    def step(self, metrics, epoch=None):
        """After an evaluation; `metrics` is the number to watch."""
        if self.taken >= self.warmup:
            super().step(metrics, epoch)
