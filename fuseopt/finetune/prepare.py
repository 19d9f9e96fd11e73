"""From options to a run whose every part has been checked; nothing is written until all of it has been."""

import dataclasses
import math
import os
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments, set_seed

from fuseopt.finetune import data as data_module
from fuseopt.finetune import folder, models, resume, teacher
from fuseopt.finetune.checks import in_range
from fuseopt.finetune.communication import check_communication
from fuseopt.finetune.data import Data
from fuseopt.finetune.loss import check_loss
from fuseopt.finetune.optim import build_optimizer, clips, frozen_names
from fuseopt.finetune.quantize import torchao
from fuseopt.finetune.train import FusedTrainer

SMALL_RATE, PRETRAINED_RATE = 1e-3, 5e-5  # learning rates of the small models and of transformers' own


@dataclasses.dataclass
class Run:
    """A run whose every part has been checked.

    start: the model as it was loaded, with its processor and description.
    frozen: {parameter: its value at the start}, of those that --freeze names.
    resolved: the options that config.yaml keeps, as plain data.
    checkpoint: the folder that it continues from, or None.
    averaged, int8: models with averaged and with 8-bit weights, once evaluated, or None.
    """

    options: object
    args: TrainingArguments
    data: Data
    start: models.Start
    optimizer: torch.optim.Optimizer
    frozen: dict
    resolved: dict
    checkpoint: str | None
    trainer: FusedTrainer | None = None
    averaged: PreTrainedModel | None = None
    int8: torch.nn.Module | None = None

    @property
    def model(self):
        return self.start.model

    @property
    def processor(self):
        return self.start.processor

    @property
    def max_grad_norm(self):
        """What --max_grad_norm said; args.max_grad_norm is 0 where the optimizer clips."""
        return self.resolved["max_grad_norm"]


def prepare(options, args, data=None, processor=None):
    """Everything that can be wrong is found here, before the last lines write. Raises ValueError, OSError.

    data, processor: instead of what the options say and what would be made from the training rows.
    """
    checkpoint = resume.checkpoint_to_resume(args, options)
    _check_numbers(options, args)
    check_loss(options, args)
    check_communication(options, args)
    if options.quantize:
        torchao()
    set_seed(args.seed)
    data = data_module.load(options, args.seed) if data is None else data
    run = _run(options, args, data, _new_processor(options, data, processor), checkpoint)
    if checkpoint:
        resume.restore_scheduler(checkpoint, run.trainer.check(args.max_steps))
    else:
        run.trainer.check(args.max_steps)
    PartialState().wait_for_everyone()  # all have looked at the output folder before one writes
    if args.process_index == 0:
        try:
            if checkpoint:
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)  # the checkpoint may be in another folder
            else:
                folder.open_output(args.output_dir, run.resolved)
        except OSError as error:
            raise OSError(f"--output_dir {args.output_dir}: cannot be written: {error.strerror or error}") from error
    PartialState().wait_for_everyone()
    return run


def _run(options, args, data, new_processor, checkpoint):
    """The parts of the run, each made and checked in turn."""
    teacher_start = teacher.load(options, data, new_processor)
    start = models.start(options, data, lambda: teacher_start.processor if teacher_start else new_processor())
    model = start.model.to(args.device)
    teacher.check_scale(options, model)
    if args.learning_rate is None:
        args.learning_rate = SMALL_RATE if start.kind in models.SMALL else PRETRAINED_RATE
    _set_steps(args, len(data.train))
    optimizer = build_optimizer(model, options, args, args.max_steps)
    names = frozen_names(model, options.freeze)
    frozen = {p: p.detach().clone() for name, p in model.named_parameters() if name in names}
    resolved = folder.resolved_options(options, args)
    if clips(optimizer):
        args.max_grad_norm = 0.0  # the Trainer must not clip too
    if checkpoint:
        resume.restore(checkpoint, model, optimizer, resolved)
    run = Run(options, args, data, start, optimizer, frozen, resolved, checkpoint)
    run.trainer = _trainer(run)
    if teacher_start:
        run.trainer.teacher = teacher.ready(teacher_start, run)
    return run


def _new_processor(options, data, processor):
    return lambda: data_module.new_processor(data, options) if processor is None else processor


def _trainer(run):
    """The Trainer, which makes the output folder at once: a scratch one, until all has been checked."""
    output_dir, logs = run.args.output_dir, "TENSORBOARD_LOGGING_DIR"
    before = os.environ.get(logs)
    os.environ[logs] = before or str(Path(output_dir) / "tensorboard")
    with tempfile.TemporaryDirectory() as scratch:
        run.args.output_dir = scratch
        try:
            return FusedTrainer(run)
        except (RuntimeError, ImportError) as error:  # a logger of --report_to that is not installed
            raise ValueError(f"--report_to {' '.join(run.args.report_to)}: {error}") from error
        finally:
            run.args.output_dir = output_dir
            os.environ.pop(logs) if before is None else None


def _check_numbers(options, args):
    for name in ("verify", "compare_steps"):
        in_range(name, getattr(options, name), 0)
    in_range("threads", options.threads, 1)
    in_range("seed", args.seed, 0, 2**32)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        in_range(name, getattr(args, name), 1)
    in_range("num_train_epochs", args.num_train_epochs, 0, 1e6, open_low=True)


def _set_steps(args, rows):
    """Fix max_steps before the Trainer exists, counting as it counts, so that schedules can be laid out."""
    batches = math.ceil(rows / (args.per_device_train_batch_size * args.world_size))
    updates = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * updates)
