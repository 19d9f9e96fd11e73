"""Continuing a run: which checkpoint, whether it is whole, and whether the command is the same."""

import os
import random
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, load_model
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import SchedulerType, sort_checkpoints

from fuseopt.finetune.defaults import trainer_defaults
from fuseopt.finetune.folder import CONFIG_FILE, refuse_used

MODEL_FILES = ("model.safetensors", "adapter_model.safetensors")

# A resumed run must have every option in common with the run that it continues, except these: what is
# shown and where it goes, how often a checkpoint is written, and what max_steps has settled.
FREE_OPTIONS = {"config", "backend", "verify", "compare_steps", "overwrite", "quantize"}
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


def _deciding(resolved):
    """Of resolved options, those that decide the bits of the run."""
    plateau = SchedulerType.REDUCE_ON_PLATEAU.value
    follows = resolved.get("lr_scheduler_type") == plateau or resolved.get("schedule") == "plateau"
    free = FREE_OPTIONS | FREE_TRAINING_OPTIONS | (set() if follows else EVALUATION_OPTIONS)
    prefixes = FREE_PREFIXES if follows else (*FREE_PREFIXES, "eval_")
    return {name: v for name, v in resolved.items() if name not in free and not name.startswith(prefixes)}


def checkpoint_to_resume(args, options):
    """The checkpoint folder to continue from, or None for a fresh run; writes nothing.

    Raises ValueError when there is no such checkpoint, or when a fresh run finds an earlier one in its way.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    refuse_used(folder, options.overwrite or wanted, "--resume_from_checkpoint to continue the run in it")
    if wanted is None:
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
    folder = Path(checkpoint)
    adapter = not (folder / MODEL_FILES[0]).is_file() and (folder / MODEL_FILES[1]).is_file()
    readers = {
        MODEL_FILES[adapter]: load_file,
        "optimizer.pt": lambda path: _keys(_load(path), "state", "param_groups"),
        "scheduler.pt": lambda path: _keys(_load(path), "last_epoch"),
        _rng_file(): _read_rng,
        "trainer_state.json": _read_trainer_state,
    }
    for name, read in readers.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {name} is missing")
        try:
            read(path)
        except Exception as error:  # whatever a reader makes of damaged bytes
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {name} is damaged") from error


def _rng_file():
    """The name of this process's file of random states, as the Trainer gives it."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return f"rng_state_{os.environ['RANK']}.pth" if several else "rng_state.pth"


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
    _compare_options(checkpoint, resolved)
    try:
        if (path := Path(checkpoint) / MODEL_FILES[0]).is_file():
            load_model(model, path)
        else:
            model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)
        optimizer.load_state_dict(_load(Path(checkpoint) / "optimizer.pt"))
    except Exception as error:  # whatever torch makes of a state of another structure
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: it does not fit this model: {error}") from error


def _compare_options(checkpoint, resolved):
    saved, defaults = Path(checkpoint).parent / CONFIG_FILE, trainer_defaults()
    if not saved.is_file():
        return
    before, now = _deciding(defaults | _read_options(checkpoint, saved)), _deciding(defaults | resolved)
    if unsaid := now.keys() - before.keys():
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: {saved} does not say --{min(unsaid)}")
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: the run was started with --{name} "
                f"{before[name]}, now it is {value}: repeat the same command"
            )


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
        before = yaml.safe_load(path.read_text())
        _keys(before)
    except (ValueError, yaml.YAMLError) as error:  # Unicode's too
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: {path} is damaged") from error
    return before
