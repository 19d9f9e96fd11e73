"""The teacher of a distillation: loaded from a checkpoint, or a larger small model trained first."""

import copy
import dataclasses
import json
from pathlib import Path

import torch

from fuseopt.finetune import models
from fuseopt.finetune.loss import ready_teacher
from fuseopt.finetune.stages import StageOptions

FOLDER = "teacher"  # of the output folder


def load(options, data, new_processor):
    """The Start of --teacher, or None where none is asked for. Leaves the random numbers alone.

    new_processor: as models.start takes it, for a folder without a processor. Raises ValueError.
    """
    if not options.teacher:
        return None
    if Path(options.teacher).is_file():
        raise ValueError(f"--teacher {options.teacher}: this is a file: give the folder that it is in")
    chosen = dataclasses.replace(_plain(options), model=None, pretrained=options.teacher, head="keep")
    chosen = dataclasses.replace(chosen, depth=None, width=None, activation=None, dropout=None)
    with torch.random.fork_rng():
        try:
            return models.start(chosen, data, new_processor)
        except ValueError as error:
            raise ValueError(str(error).replace("--pretrained", "--teacher")) from error


def ready(teacher, run, option="--teacher"):
    """The teacher's model, checked against a batch of the run; raises ValueError where it does not fit."""
    if _inputs(teacher.processor) != _inputs(run.processor):
        kind = "tokens" if run.data.kind == "text" else "image sizes, means and deviations"
        raise ValueError(f"{option}: its {kind} are not those of the model, which must be the same")
    rows = [run.trainer.train_dataset[k] for k in range(2)]
    batch = run.trainer.data_collator(rows)
    return ready_teacher(teacher.model, run.model, batch, run.data.names, option)


def _inputs(processor):
    """What decides the inputs that a processor makes."""
    return processor.get_vocab() if hasattr(processor, "get_vocab") else (processor.mean, processor.std, processor.size)


def check_scale(options, model):
    """Raise ValueError where --teacher_scale cannot make a larger model of the same kind."""
    if options.teacher_scale is not None and not hasattr(model.config, "width"):
        raise ValueError("--teacher_scale: only the small models have a width; give --teacher FOLDER instead")


def train(run, train_once):
    """Train the larger model of --teacher_scale in the folder teacher/ and return it; one that is there is read."""
    folder = Path(run.args.output_dir) / FOLDER
    width = max(1, round(run.model.config.width * run.options.teacher_scale))
    options = dataclasses.replace(
        _plain(run.options), pretrained="none", width=width, model=run.start.kind, overwrite=True
    )
    if not _finished(folder):
        args = copy.copy(run.args)
        args.output_dir, args.resume_from_checkpoint = str(folder), None
        args.max_grad_norm = run.max_grad_norm
        with torch.random.fork_rng():
            train_once(options, args, run.data, run.processor)
    options = dataclasses.replace(options, teacher=str(folder / "model"))
    return ready(load(options, run.data, lambda: run.processor), run, "--teacher_scale")


def _finished(folder):
    try:
        return bool(json.loads((folder / "metrics.json").read_text())["finished"])
    except (OSError, ValueError, KeyError):
        return False


def _plain(options):
    """The options without what is for the student alone: stages, frozen and new parameters, LoRA, distillation."""
    stages = {field.name: field.default for field in dataclasses.fields(StageOptions)}
    off = {"freeze": [], "freeze_by": "mask", "quantize": False, "verify": 0, "compare_steps": 0}
    start = {"head": "auto", "head_init": "default", "reinit": []}
    lora = {"lora_rank": 0, "lora_alpha": None, "lora_dropout": 0.0, "lora_targets": []}
    loss = {"teacher": None, "teacher_scale": None, "temperature": 2.0, "distill_weight": 0.5}
    return dataclasses.replace(options, **stages, **off, **start, **lora, **loss)
