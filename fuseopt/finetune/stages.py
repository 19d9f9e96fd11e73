"""The stages of a run's optimizer beside its rule: averages of the weights, pruning, zeros that are kept."""

from dataclasses import dataclass, field
from typing import Literal

import fuseopt
from fuseopt.finetune.checks import in_range, without_effect


@dataclass
class StageOptions:
    """Averages of the weights, and pruning; both off by default."""

    _argument_group_name = "averages and pruning"

    average: Literal["none", "ema", "mean"] = field(
        default="none",
        metadata={"help": "Average the weights while training: ema, exponentially; mean, with equal weights (SWA)."},
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Share of the old ema that a step keeps, in [0, 1)."})
    ema_warmup: Literal["timm", "diffusers", "none"] = field(
        default="timm", metadata={"help": "How that share grows at the start, so that short runs forget theirs."}
    )
    average_start: int = field(default=0, metadata={"help": "Step after which the average begins."})
    average_every: int = field(default=1, metadata={"help": "Steps from one update of the average to the next."})
    sparsity: float = field(
        default=0.0,
        metadata={"help": "Share of the entries of the matrices that is zero at the end, in [0, 1); 0: no pruning."},
    )
    prune_pattern: str = field(
        default="none",
        metadata={
            "help": "none: entries anywhere; rows: whole rows (outputs, channels); N:M, such as 2:4: all but N of "
            "every M inputs, without --sparsity."
        },
    )
    prune_scope: Literal["global", "tensor"] = field(
        default="global", metadata={"help": "Rank the entries of all matrices together, or of each alone."}
    )
    prune_schedule: Literal["cubic", "linear", "once"] = field(
        default="cubic",
        metadata={"help": "How sparsity grows from --prune_begin to --prune_end; once: at --prune_begin alone."},
    )
    prune_begin: int | None = field(
        default=None, metadata={"help": "First step that prunes; None: after a quarter of the steps."}
    )
    prune_end: int | None = field(
        default=None, metadata={"help": "Step that reaches --sparsity; None: after three quarters of the steps."}
    )
    prune_every: int = field(default=10, metadata={"help": "Steps from one pruning to the next."})
    keep_zeros: bool = field(
        default=False,
        metadata={"help": "Train on from a pruned model: matrix entries that are zero at the start stay zero."},
    )


def stages_of(model, options, steps):
    """{"ema": fuseopt.EMA or None, "prune": fuseopt.Prune or None} for a run of `steps` steps; raises ValueError."""
    average, prune = average_of(options, steps), prune_of(options, steps)
    if options.keep_zeros:
        _check_zeros(model, prune)
    if (prune or options.keep_zeros) and any(".lora_" in name for name, _ in model.named_parameters()):
        option = "--keep_zeros" if options.keep_zeros else _pruning(options)
        raise ValueError(f"{option} with --lora_rank: the merged weights would not keep their zeros; leave one out")
    return {"ema": average, "prune": prune}


# ---- averages --------------------------------------------------------------------------------------


def average_of(options, steps):
    """fuseopt.EMA for a run of `steps` steps, or None; raises ValueError."""
    if options.average == "none":
        names = ["ema_decay", "ema_warmup", "average_start", "average_every"]
        without_effect(options, names, StageOptions, "without --average ema or mean")
        return None
    start, every = options.average_start, options.average_every
    in_range("average_start", start, 0)
    in_range("average_every", every, 1)
    if start + every > steps:
        raise ValueError(
            f"--average_start {start} and --average_every {every}: no step up to the last, {steps}, would be averaged"
        )
    if options.average == "mean":
        without_effect(options, ["ema_decay", "ema_warmup"], StageOptions, "on --average mean")
        return fuseopt.EMA(warmup="swa", start=start, every=every)
    in_range("ema_decay", options.ema_decay, 0, 1)
    warmup = None if options.ema_warmup == "none" else options.ema_warmup
    return fuseopt.EMA(options.ema_decay, warmup, start, every)


# ---- pruning ---------------------------------------------------------------------------------------


def prune_of(options, steps):
    """fuseopt.Prune for a run of `steps` steps, or None; raises ValueError if it would fall short."""
    in_range("sparsity", options.sparsity, 0, 1)
    names = ["prune_scope", "prune_schedule", "prune_begin", "prune_end", "prune_every"]
    n_m = options.prune_pattern not in ("none", "rows")
    if not options.sparsity and not n_m:
        without_effect(options, ["prune_pattern", *names], StageOptions, "without --sparsity")
        return None
    pattern = {"none": "unstructured"}.get(options.prune_pattern, options.prune_pattern)
    when = _when(options, steps, n_m)
    if n_m:
        _check_n_m(options)
        return fuseopt.Prune(pattern=pattern, **when)
    return fuseopt.Prune(options.sparsity, pattern=pattern, scope=options.prune_scope, **when)


def _when(options, steps, n_m):
    """schedule, begin, end and every of fuseopt.Prune."""
    begin, end, every = options.prune_begin, options.prune_end, options.prune_every
    begin = max(1, steps // 4) if begin is None else begin
    if not 1 <= begin <= steps:
        raise ValueError(f"--prune_begin {begin}: must be a step from 1 to the last, {steps}")
    if n_m or options.prune_schedule == "once":
        why = "where --prune_begin alone prunes"
        without_effect(options, ["prune_end", "prune_every"], StageOptions, why)
        return {"begin": begin, "schedule": "once"}
    in_range("prune_every", every, 1)
    if end is None:
        end = begin + max(0, steps * 3 // 4 - begin) // every * every
    if end < begin:
        raise ValueError(f"--prune_begin {begin} is after --prune_end {end}")
    if end > steps:
        raise ValueError(f"--prune_end {end} is after the last step, {steps}")
    if (end - begin) % every:
        raise ValueError(
            f"--prune_end {end} is not a whole number of --prune_every {every} after --prune_begin {begin}"
        )
    if end == begin:
        return {"begin": begin, "schedule": "once"}
    return {"begin": begin, "end": end, "every": every, "schedule": options.prune_schedule}


def _check_n_m(options):
    """Raise ValueError unless the pattern is one and nothing is given beside it that it does not take."""
    pattern, why = options.prune_pattern, f"with --prune_pattern {options.prune_pattern}, which says it all"
    try:
        fuseopt.Prune(pattern=pattern)
    except ValueError:
        raise ValueError(f"--prune_pattern {pattern}: give none, rows, or N:M such as 2:4, 0 < N < M <= 32") from None
    without_effect(options, ["sparsity", "prune_scope", "prune_schedule"], StageOptions, why)


def _pruning(options):
    return f"--sparsity {options.sparsity:g}" if options.sparsity else f"--prune_pattern {options.prune_pattern}"


def _check_zeros(model, prune):
    """Raise ValueError where --keep_zeros has nothing to keep, or pruning keeps it anyway."""
    if prune is not None:
        raise ValueError("--keep_zeros with pruning: pruning takes the zeros first and keeps them; leave one out")
    if not any(bool((p == 0).any()) for p in model.parameters() if prunes(p)):
        raise ValueError("--keep_zeros: no matrix of this model has a zero; start from a pruned one with --pretrained")


def prunes(p):
    """Whether pruning is for a parameter: a matrix of floating numbers that is trained."""
    return p.ndim > 1 and p.is_floating_point() and p.requires_grad


def pruning(optimizer):
    """The options of fuseopt.Prune that an optimizer has, the same in all its groups that prune; or None."""
    return next((g["prune"] for g in optimizer.param_groups if g.get("prune") is not None), None)


def prunable(optimizer):
    """The parameters whose entries the sparsity counts: those that are pruned, or keep their zeros."""
    groups = [g for g in optimizer.param_groups if g.get("prune") is not None or g.get("keep_zeros")]
    return [p for group in groups for p in group["params"] if prunes(p)]


def sparsity(parameters):
    """Share of zero entries, from 0 to 1; 0 for no parameters."""
    total = sum(p.numel() for p in parameters)
    return sum(int((p == 0).sum()) for p in parameters) / total if total else 0.0
