"""The output folder: refuse, continue or replace the run that is in it; files that are whole or not there."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.trainer_utils import sort_checkpoints

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

# What a resumed run must have in common with the run that it continues.
TRAINER_OPTIONS = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
)
FREE_OPTIONS = ("backend", "verify_every", "compare_steps", "overwrite")


def resolved_options(options, args, max_grad_norm):
    """Everything that decides the bits of the run, as plain data."""
    ours = {name: v for name, v in dataclasses.asdict(options).items() if name not in FREE_OPTIONS}
    return {**ours, **{name: getattr(args, name) for name in TRAINER_OPTIONS}, "max_grad_norm": max_grad_norm}


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
        "optimizer.pt": _load,
        "scheduler.pt": _load,
        "rng_state.pth": lambda path: path.read_bytes(),
        "trainer_state.json": lambda path: json.loads(path.read_text()),
    }
    for name, read in readers.items():
        path = Path(checkpoint) / name
        if not path.is_file():
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {name} is missing")
        try:
            read(path)
        except Exception as error:  # whatever a reader makes of damaged bytes
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {name} is damaged") from error


def _load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def restore(checkpoint, model, optimizer, resolved):
    """Load a checkpoint's weights and optimizer state. The Trainer does it again; here it may be refused.

    Raises ValueError when the run was started with another option, or has another model.
    """
    saved = Path(checkpoint).parent / OPTIONS_FILE
    before = json.loads(saved.read_text()) if saved.is_file() else resolved
    for name, value in json.loads(json.dumps(resolved)).items():
        if before.get(name) != value:
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: the run was started with --{name} "
                f"{before.get(name)}, now it is {value}: repeat the same command"
            )
    try:
        model.load_state_dict(load_file(Path(checkpoint) / "model.safetensors"))
        optimizer.load_state_dict(_load(Path(checkpoint) / "optimizer.pt"))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: it does not fit this model: {error}"
        ) from error


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
