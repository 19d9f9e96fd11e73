"""The output folder: what a run leaves there, as files that are whole or not there."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import yaml

from fuseopt.finetune.defaults import TRAINER_DEFAULTS, trainer_defaults

CONFIG_FILE = "config.yaml"
OUTPUTS = (
    CONFIG_FILE,
    "metrics.json",
    "report.txt",
    "confusion.png",
    "plot.png",
    "verification.txt",
    "log.txt",
    "model",
    "model_average",
    "model_int8",
    "teacher",
    "tensorboard",
)

NOT_KEPT = {"config", "overwrite", "resume_from_checkpoint"}  # of this command, not of the run


def resolved_options(options, args):
    """Every option of ours, and those of TrainingArguments that have another default here or value, as plain data."""
    ours = {name: value for name, value in dataclasses.asdict(options).items() if name not in NOT_KEPT}
    given, defaults = args.to_dict(), trainer_defaults()
    changed = [name for name in defaults if given[name] != defaults[name] or name in TRAINER_DEFAULTS]
    theirs = {name: given[name] for name in changed if name not in NOT_KEPT}
    return json.loads(json.dumps(ours | theirs))


def refuse_used(folder, allowed, remedy):
    """Raise ValueError for an output folder that is a file, or that has something in it unless that is allowed."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder}: this is a file, not a folder")
    if not allowed and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output_dir {folder} is not empty: pass {remedy}, or --overwrite to replace it")


def clear(folder, patterns):
    """Make the folder if need be, and remove what matches these names in it; any other file stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def open_output(folder, resolved):
    """Clear the output folder for a fresh run, and write its options there."""
    clear(Path(folder), (*OUTPUTS, "checkpoint-[0-9]*"))
    write_all(folder, {CONFIG_FILE: yaml.safe_dump(resolved, sort_keys=False)})


def write_all(folder, writers):
    """Write files or folders under temporary names, then rename them all: a failure leaves none of them changed.

    writers: {name: the text of the file, or a function that writes to the path it is given}. Raises what one raises.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        for name, write in writers.items():
            path = Path(scratch) / name
            write(path) if callable(write) else path.write_text(write, encoding="utf-8")
        for name in writers:
            move(Path(scratch) / name, Path(folder) / name)


def as_json(content):
    """The text of a JSON file."""
    return json.dumps(content, indent=1) + "\n"


def move(source, target):
    """Rename a file or a folder; one that is there already makes way."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)
