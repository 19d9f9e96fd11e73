"""The output folder: what a run leaves there, as files that are whole or not there."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import yaml
from transformers.trainer_utils import sort_checkpoints

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


def open_output(folder, resolved):
    """Clear the output folder for a fresh run: the files of an earlier one go, any other stays."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*sort_checkpoints(str(folder)), *(folder / name for name in OUTPUTS)]:
        _remove(Path(path))
    write_all(folder, {CONFIG_FILE: lambda path: path.write_text(yaml.safe_dump(resolved, sort_keys=False))})


def write_all(folder, writers):
    """Write files or folders under temporary names, then rename them all: a failure leaves none of them changed.

    writers: {name: function that writes to the path it is given}. Raises what a writer raises.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        for name, write in writers.items():
            write(Path(scratch) / name)
        for name in writers:
            move(Path(scratch) / name, Path(folder) / name)


def move(source, target):
    """Rename a file or a folder; one that is there already makes way."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
