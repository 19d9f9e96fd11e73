"""The loss of a run: cross entropy, label smoothing, distillation from a teacher."""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from fuseopt.finetune.checks import in_range, without_effect


@dataclass
class LossOptions:
    """Distillation; label smoothing is the Trainer's --label_smoothing_factor."""

    _argument_group_name = "distillation"

    teacher: str | None = field(
        default=None,
        metadata={"help": "Learn from the outputs of this model too: a folder, as an earlier run writes it in model/."},
    )
    teacher_scale: float | None = field(
        default=None,
        metadata={"help": "Instead of --teacher: first train one of the same kind, its width times this."},
    )
    temperature: float = field(
        default=2.0, metadata={"help": "Softens the outputs of teacher and student: logits / temperature."}
    )
    distill_weight: float = field(
        default=0.5, metadata={"help": "Share of the teacher in the loss, from 0 to 1; the labels have the rest."}
    )


def check_loss(options, args):
    """Raise ValueError for a value out of range, or one that nothing would heed."""
    in_range("label_smoothing_factor", args.label_smoothing_factor, 0, 1)
    if options.teacher and options.teacher_scale is not None:
        raise ValueError("--teacher and --teacher_scale: give one of the two")
    if not options.teacher and options.teacher_scale is None:
        without_effect(options, ["temperature", "distill_weight"], LossOptions, "without --teacher")
    if options.teacher_scale is not None:
        in_range("teacher_scale", options.teacher_scale, 0, open_low=True)
    in_range("temperature", options.temperature, 0, open_low=True)
    if not 0 <= options.distill_weight <= 1:
        raise ValueError(f"--distill_weight {options.distill_weight}: must be from 0 to 1")


def compute_loss(model, inputs, teacher, options, args, num_items=None):
    """(loss, outputs) of a batch, for Trainer.compute_loss.

    (1 - w) * CE(labels, smoothed) + w * T^2 * KL(softmax(teacher / T) || softmax(student / T)), w = --distill_weight,
    0 without a teacher. Where the model is in eval mode, the plain cross entropy, so that runs can be compared.

    num_items: labels in the whole batch of the optimizer's step, by all processes if
        args.average_tokens_across_devices; the sum over this part is divided by it, so that the gradients of the
        parts add up to that of the whole. None: the mean over this part.
    """
    labels = inputs["labels"]
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    outputs = model(**inputs)
    logits = outputs.logits.float() if outputs.logits.dtype in (torch.float16, torch.bfloat16) else outputs.logits
    if not model.training:
        return F.cross_entropy(logits, labels), outputs
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=args.label_smoothing_factor)
    if teacher is not None:
        with torch.no_grad():
            target = teacher(**inputs).logits.to(logits.dtype)
        share, t = options.distill_weight, options.temperature
        loss = (1 - share) * loss + share * t**2 * divergence(logits / t, target / t)
    if num_items is None:
        return loss / len(labels), outputs
    scale = args.world_size if args.average_tokens_across_devices else 1  # gradients are averaged over processes
    return loss * scale / num_items, outputs


def divergence(logits, target):
    """KL(softmax(target) || softmax(logits)), summed over the batch; both (N, classes)."""
    return F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)


def ready_teacher(teacher, model, batch, names, option):
    """The teacher on the model's device, in eval mode and without gradients.

    batch: one collated batch of the run; names: its classes; option: how messages call the teacher.
    Raises ValueError unless the teacher takes the batch and its classes and vocabulary are those of the run.
    """
    teacher = teacher.to(next(model.parameters()).device).eval().requires_grad_(False)
    sizes = [getattr(getattr(one, "config", None), "vocab_size", None) for one in (teacher, model)]
    if "input_ids" in batch and sizes[0] != sizes[1]:
        raise ValueError(
            f"{option}: its vocabulary has {sizes[0]} tokens, the model's {sizes[1]}; both must be the same"
        )
    inputs = {name: value.to(next(teacher.parameters()).device) for name, value in batch.items() if name != "labels"}
    try:
        with torch.no_grad():
            logits = teacher(**inputs).logits
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise ValueError(f"{option} does not take the inputs of this run ({shapes}): {error}") from error
    if tuple(logits.shape) != (len(batch["labels"]), len(names)):
        raise ValueError(f"{option} has {logits.shape[-1]} classes, the data have {len(names)}: {', '.join(names)}")
    known = list(getattr(getattr(teacher, "config", None), "id2label", {}).values())
    if known and known != list(names) and not all(name.startswith("LABEL_") for name in known):
        raise ValueError(f"{option} has the classes {', '.join(known)}, the data {', '.join(names)}, in this order")
    return teacher
