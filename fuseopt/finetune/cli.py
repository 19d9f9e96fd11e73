"""`fuseopt finetune`: what is wrong is found before anything is written, and said in one line."""

import contextlib
import dataclasses
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from fuseopt.finetune import compare, folder, report
from fuseopt.finetune.data import Data, embedded_digits, load_npz
from fuseopt.finetune.model import EMBEDDED, DigitNet, load_pretrained
from fuseopt.finetune.options import PROG, Options, parse
from fuseopt.finetune.train import FusedTrainer, build_optimizer, frozen_names, prune_schedule


@dataclasses.dataclass
class Run:
    """A run whose every part has been checked.

    frozen: {parameter: its pretrained value}.
    build: function of a model that makes the same optimizer over it.
    resolved: what decides the bits, as plain data.
    checkpoint: the folder that it continues from, or None.
    """

    options: Options
    args: TrainingArguments
    data: Data
    model: DigitNet
    optimizer: torch.optim.Optimizer
    frozen: dict
    build: Callable
    resolved: dict
    checkpoint: str | None
    trainer: FusedTrainer | None = None
    ema_model: DigitNet | None = None


def main(argv=None):
    """Parse, prepare, train, evaluate, write; returns the exit status (0, 1, 2 or 130)."""
    transformers_logging.set_verbosity_error()
    argv = sys.argv[1:] if argv is None else argv
    output_dir = None
    try:
        try:
            options, args = parse(argv)
            output_dir = args.output_dir
            run = prepare(options, args)
        except (ValueError, OSError) as error:
            print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        with _threads(options.threads):
            return execute(run)
    except KeyboardInterrupt:
        print(_interrupted(output_dir), file=sys.stderr)
        return 130


def prepare(options, args):
    """Everything that can be wrong is found here, before the last lines write. Raises ValueError, OSError."""
    checkpoint = folder.checkpoint_to_resume(args, options)
    for name in ("verify_every", "compare_steps"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} must be 0 or more, found {getattr(options, name)}")
    if options.threads < 1:
        raise ValueError(f"--threads must be 1 or more, found {options.threads}")
    set_seed(args.seed)
    data = load_npz(options.data, args.seed) if options.data else embedded_digits(5, 9, args.seed)
    model = load_pretrained(options.pretrained or EMBEDDED, len(data.names), data.image_shape[0]).to(
        args.device
    )
    _set_steps(args, len(data.train))
    prune, max_grad_norm = prune_schedule(options, args.max_steps), args.max_grad_norm
    args.max_grad_norm = 0.0  # the optimizer clips in its own pass, the Trainer must not

    def build(module):
        return build_optimizer(module, options, args, prune, max_grad_norm)

    optimizer = build(model)
    names = frozen_names(model, options.freeze)
    frozen = {p: p.detach().clone() for name, p in model.named_parameters() if name in names}
    resolved = folder.resolved_options(options, args, max_grad_norm)
    if checkpoint:
        folder.restore(checkpoint, model, optimizer, resolved)
    run = Run(options, args, data, model, optimizer, frozen, build, resolved, checkpoint)
    run.trainer = _trainer(run)
    scheduler = run.trainer.check(args.max_steps)
    if checkpoint:
        folder.restore_scheduler(checkpoint, scheduler)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)  # the checkpoint may be in another folder
    else:
        folder.open_output(args.output_dir, resolved)
    return run


def _trainer(run):
    """The Trainer, which makes the output folder at once: a scratch one, until all has been checked."""
    output_dir = run.args.output_dir
    with tempfile.TemporaryDirectory() as scratch:
        run.args.output_dir = scratch
        try:
            return FusedTrainer(run)
        finally:
            run.args.output_dir = output_dir


def _set_steps(args, images):
    """Fix max_steps before the Trainer exists, counting as it counts, so that schedules can be laid out."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be 1 or more, found {getattr(args, name)}")
    if not 0 < args.num_train_epochs < math.inf:
        raise ValueError(f"--num_train_epochs must be positive and finite, found {args.num_train_epochs}")
    batches = math.ceil(images / args.per_device_train_batch_size)
    updates = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_steps <= 0:
        args.max_steps = math.ceil(args.num_train_epochs * updates)


@contextlib.contextmanager
def _threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def execute(run):
    """Train, evaluate, compare and write; returns 0, 1 (verification failed) or 130 (interrupted)."""
    print(report.headline(run), flush=True)
    trainer = run.trainer
    trainer.train(resume_from_checkpoint=run.checkpoint)
    if trainer.interrupted:
        raise KeyboardInterrupt
    verification = trainer.verification()
    results = report.evaluate(run, trainer)
    results["step"] = compare.compare(run)
    print(report.summary(run, results, verification))
    report.write(run, results, verification)
    return 1 if verification is not None and not verification.passed else 0


def _interrupted(output_dir):
    found = output_dir and folder.last_checkpoint(output_dir)
    if not found:
        return f"{PROG}: interrupted before the first checkpoint"
    again = "continue with the same command and --resume_from_checkpoint"
    return f"{PROG}: interrupted; last checkpoint: {found}; {again}"
