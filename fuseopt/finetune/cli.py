"""`fuseopt finetune`: what is wrong is found before anything is written, and said in one line."""

import contextlib
import copy
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from fuseopt.finetune import folder, folds, report, resume, teacher, timing
from fuseopt.finetune.options import PROG, parse
from fuseopt.finetune.prepare import prepare

OUT_OF_MEMORY = (
    "not enough memory: lower --per_device_train_batch_size, --per_device_eval_batch_size, --image_size, --max_length, "
    "--width or --depth, whichever applies"
)


def main(argv=None):
    """Parse, prepare, train, evaluate, write; returns the exit status (0, 1, 2 or 130)."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    argv = sys.argv[1:] if argv is None else argv
    output_dir = None
    try:
        options, args = parse(argv)
        output_dir = args.output_dir
        return run(options, args)
    except (ValueError, OSError) as error:
        if _first_process():
            print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch on the CPU has no type of its own for it, and two ways to say it.
        said = ("allocate memory", "not enough memory", "out of memory")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in said):
            raise
        if _first_process():
            print(f"{PROG}: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if _first_process():
            print(_interrupted(output_dir), file=sys.stderr)
        return 130


def run(options, args):
    """One run, or those of a cross-validation or a learning curve; returns the exit status 0 or 1."""
    if options.folds:
        return folds.cross_validate(options, args, train_once)
    if options.learning_curve:
        return folds.learning_curve(options, args, train_once)
    return 0 if passed(train_once(options, args)) else 1


def passed(metrics):
    """Whether no verification of the run failed."""
    return metrics["verification"] is None or metrics["verification"]["passed"]


def train_once(options, args, data=None, processor=None):
    """One run; returns what its metrics.json holds. data, processor: instead of what the options say.

    Raises ValueError or OSError for bad input, KeyboardInterrupt after the checkpoint of an interrupted run.
    """
    prepared = prepare(options, copy.copy(args), data, processor)
    with _threads(options.threads):
        return execute(prepared)


@contextlib.contextmanager
def _threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def execute(run):
    """Train, evaluate, compare and write; the first process alone prints and writes."""
    first, trainer = run.args.process_index == 0, run.trainer
    if first:
        print(report.headline(run), flush=True)
    if run.options.teacher_scale:
        trainer.teacher = teacher.train(run, train_once)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    if trainer.interrupted:
        raise KeyboardInterrupt
    verification = trainer.verification()
    results = report.evaluate(run, trainer)
    if first:
        results["step"] = timing.compare(run)
        _write(run, results, verification)
    PartialState().wait_for_everyone()
    return json.loads((Path(run.args.output_dir) / "metrics.json").read_text())


def _write(run, results, verification):
    try:
        report.write(run, results, verification)
    except Exception as error:  # a full disk: OSError, or whatever torch and safetensors make of it
        raise OSError(f"--output_dir {run.args.output_dir}: the results cannot be written: {error}") from error
    print(report.summary(run, results, verification))
    written = sorted(name for name in folder.OUTPUTS if (Path(run.args.output_dir) / name).exists())
    print(f"\nwritten to {run.args.output_dir}: {', '.join(written)}")


def _first_process():
    return int(os.environ.get("RANK", 0)) == 0


def _interrupted(output_dir):
    """What to say; one of several runs (folds.py) has its checkpoints in a folder of its own."""
    places = [Path(output_dir), *Path(output_dir).glob("*-*")] if output_dir else []
    found = next(filter(None, map(resume.last_checkpoint, places)), None)
    if not found:
        return f"{PROG}: interrupted before the first checkpoint"
    again = "continue with the same command and --resume_from_checkpoint"
    return f"{PROG}: interrupted; last checkpoint: {found}; {again}"
