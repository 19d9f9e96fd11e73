"""The output folder: refuse, continue or replace the run that is in it; files that are whole or not there."""

import dataclasses
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import SchedulerType, sort_checkpoints

OPTIONS_FILE = "options.json"
OUTPUTS = (
    "model.safetensors",
    "model_ema.safetensors",
    "metrics.json",
    "classification_report.txt",
    "verification.txt",
    "plot.png",
    OPTIONS_FILE,
)

# A resumed run must have every option in common with the run that it continues, except these: what is
# shown and where it goes, how often a checkpoint is written, and what max_steps has settled.
FREE_OPTIONS = {"backend", "verify_every", "compare_steps", "overwrite"}
FREE_TRAINING_OPTIONS = {
    "output_dir",
    "resume_from_checkpoint",
    "num_train_epochs",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "local_rank",
    "skip_memory_metrics",
    "include_num_input_tokens_seen",
}
FREE_PREFIXES = ("log", "save_", "hub_", "push_to_hub", "trackio_")
# Free as well, unless the schedule follows the evaluations.
EVALUATION_OPTIONS = {"do_eval", "batch_eval_metrics", "per_device_eval_batch_size"}


def resolved_options(options, args, max_grad_norm):
    """Everything that decides the bits of the run, as plain data."""
    ours = {name: v for name, v in dataclasses.asdict(options).items() if name not in FREE_OPTIONS}
    free, prefixes = FREE_TRAINING_OPTIONS, FREE_PREFIXES
    if args.lr_scheduler_type != SchedulerType.REDUCE_ON_PLATEAU:
        free, prefixes = free | EVALUATION_OPTIONS, (*prefixes, "eval_")
    theirs = {name: v for name, v in args.to_dict().items() if name not in free and not name.startswith(prefixes)}
    return {**ours, **theirs, "max_grad_norm": max_grad_norm}


def checkpoint_to_resume(args, options):
    """The checkpoint folder to continue from, or None for a fresh run; writes nothing.

    Raises ValueError when there is no such checkpoint, or when a fresh run finds an earlier one in its way.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder}: this is a file, not a folder")
    if wanted is None:
        if folder.exists() and any(folder.iterdir()) and not options.overwrite:
            raise ValueError(
                f"--output_dir {folder} is not empty: pass --resume_from_checkpoint to continue the run in "
                "it, or --overwrite to replace it"
            )
        return None
    if wanted != "last":
        _check(wanted)
        return wanted
    found = last_checkpoint(folder)
    if found is None:
        raise ValueError(f"--resume_from_checkpoint: there is no whole checkpoint in {folder}")
    return found


def last_checkpoint(folder):
    """The newest checkpoint of `folder` that can be read back, as a string, or None."""
    for candidate in reversed(sort_checkpoints(str(folder)) if Path(folder).is_dir() else []):
        try:
            _check(candidate)
        except ValueError:
            continue
        return candidate
    return None


def _check(checkpoint):
    """Read every file of a checkpoint; raises ValueError that names the first that is missing or damaged."""
    readers = {
        "model.safetensors": load_file,
        "optimizer.pt": lambda path: _keys(_load(path), "state", "param_groups"),
        "scheduler.pt": lambda path: _keys(_load(path), "last_epoch"),
        "rng_state.pth": _read_rng,
        "trainer_state.json": _read_trainer_state,
    }
    for name, read in readers.items():
        path = Path(checkpoint) / name
        if not path.is_file():
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {name} is missing")
        try:
            read(path)
        except Exception as error:  # whatever a reader makes of damaged bytes
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {name} is damaged") from error


def _keys(content, *names):
    if not isinstance(content, dict) or not content.keys() >= set(names):
        raise ValueError(f"not a dictionary with {', '.join(names)}")


def _read_rng(path):
    """Set generators of our own as the Trainer sets the global ones."""
    with safe_globals():
        state = _load(path)
    random.Random().setstate(state["python"])
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["cpu"])


def _read_trainer_state(path):
    state = TrainerState.load_from_json(path)
    if not isinstance(state.global_step, int) or state.global_step < 1 or not isinstance(state.log_history, list):
        raise ValueError("not the state of a Trainer after a step")


def _load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def restore(checkpoint, model, optimizer, resolved):
    """Load a checkpoint's weights and optimizer state. The Trainer does it again; here it may be refused.

    Raises ValueError when the run was started with another option, or has another model.
    """
    saved = Path(checkpoint).parent / OPTIONS_FILE
    before = _read_options(checkpoint, saved) if saved.is_file() else resolved
    for name, value in json.loads(json.dumps(resolved)).items():
        if name not in before:
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {saved} does not say --{name}")
        if before[name] != value:
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: the run was started with --{name} "
                f"{before[name]}, now it is {value}: repeat the same command"
            )
    try:
        model.load_state_dict(load_file(Path(checkpoint) / "model.safetensors"))
        optimizer.load_state_dict(_load(Path(checkpoint) / "optimizer.pt"))
    except Exception as error:  # whatever torch makes of a state of another structure
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: it does not fit this model: {error}"
        ) from error


def restore_scheduler(checkpoint, scheduler):
    """Load the scheduler's state, as the Trainer will; raises ValueError when it is that of another kind."""
    try:
        scheduler.load_state_dict(_load(Path(checkpoint) / "scheduler.pt"))
    except Exception as error:  # as in restore()
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: scheduler.pt does not fit --lr_scheduler_type: {error}"
        ) from error


def _read_options(checkpoint, path):
    try:
        before = json.loads(path.read_text())
        _keys(before)
    except ValueError as error:  # JSON's and Unicode's too
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: {path} is damaged") from error
    return before


def open_output(folder, resolved):
    """Clear the output folder for a fresh run: the files of an earlier one go, any other stays."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for checkpoint in sort_checkpoints(str(folder)):
        shutil.rmtree(checkpoint)
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)
    write_all(folder, {OPTIONS_FILE: lambda path: path.write_text(json.dumps(resolved, indent=1) + "\n")})


def write_all(folder, writers):
    """Write files under temporary names, then rename them all: a failure leaves none of them changed.

    writers: {file name: function that writes to the path it is given}. Raises what a writer raises.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        for name, write in writers.items():
            write(Path(scratch) / name)
        for name in writers:
            os.replace(Path(scratch) / name, Path(folder) / name)
