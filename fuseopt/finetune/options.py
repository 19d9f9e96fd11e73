"""The options of `fuseopt finetune`: each file's own, and those of transformers' TrainingArguments; --config."""

import argparse
import dataclasses
import difflib
import json
import os
import warnings
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from fuseopt.finetune.communication import CommunicationOptions
from fuseopt.finetune.data import DataOptions
from fuseopt.finetune.defaults import BATCH_SIZE, TRAINER_DEFAULTS
from fuseopt.finetune.folds import FoldsOptions
from fuseopt.finetune.loss import LossOptions
from fuseopt.finetune.models import ModelOptions
from fuseopt.finetune.optim import OptimizerOptions
from fuseopt.finetune.quantize import QuantizeOptions
from fuseopt.finetune.schedule import ScheduleOptions
from fuseopt.finetune.stages import StageOptions
from fuseopt.finetune.timing import TimingOptions

PROG = "fuseopt finetune"

DESCRIPTION = """
Fine-tune a classifier of images or text with a fused optimizer. Without options: a small network pretrained on
the digits 0-4 (embedded) learns all ten in some seconds. Every technique is off until its option is
given, here or in --config FILE. The folder --output_dir then holds config.yaml, metrics.json, report.txt,
plot.png, confusion.png, log.txt and the models. Exit status: 0 done, 1 the verification failed, 2 bad input,
130 interrupted (the same command with --resume_from_checkpoint ends with the same bits).
"""


@dataclasses.dataclass
class RunOptions:
    """What concerns the run as a whole."""

    _argument_group_name = "run"

    config: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A YAML file of options by name, such as the config.yaml of an earlier run; options on the command "
            "line come after it."
        },
    )
    verify: int = dataclasses.field(
        default=0,
        metadata={
            "help": "Repeat every N-th step with separate torch passes in float64 and compare; --verify alone: every "
            "step; 0: never."
        },
    )
    threads: int = dataclasses.field(
        default=1,
        metadata={"help": "CPU threads; a small model gains nothing by more, and loses on a busy machine."},
    )
    overwrite: bool = dataclasses.field(default=False, metadata={"help": "Replace the run that is in --output_dir."})


# Every group of options, in the order of the help.
GROUPS = (
    RunOptions,
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    ScheduleOptions,
    LossOptions,
    StageOptions,
    QuantizeOptions,
    CommunicationOptions,
    FoldsOptions,
    TimingOptions,
)
Options = dataclasses.make_dataclass("Options", [], bases=tuple(reversed(GROUPS)))
Options.__doc__ = "All options of ours as attributes of one object."

# The options of TrainingArguments that plain --help lists, beside those with a default of ours.
SHOWN = {
    *TRAINER_DEFAULTS,
    "learning_rate",
    "weight_decay",
    "per_device_train_batch_size",
    "label_smoothing_factor",
    "max_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "gradient_accumulation_steps",
    "eval_steps",
    "save_steps",
    "bf16",
    "disable_tqdm",
    "resume_from_checkpoint",
    "help",
    "help_all",
}

# Options of TrainingArguments that this harness cannot honour, with the reason.
REFUSED = {
    "optim": "the optimizer is chosen with --optimizer",
    "load_best_model_at_end": "the result is the model of the last step",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed",
    "push_to_hub": "nothing is uploaded",
    "prediction_loss_only": "the report needs the predictions",
    "fsdp": "the report and the averages need whole parameters",
    "deepspeed": "it brings an optimizer of its own",
}


class Training(TrainingArguments):
    """transformers' TrainingArguments under a title of their own in the help text."""

    _argument_group_name = "training, as in transformers' TrainingArguments (--help_all lists the others)"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _format_action_invocation(self, action):
        """`--learning_rate VALUE`: one spelling of the name, without the second one with hyphens."""
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else "VALUE"
        values = {0: "", "?": f"[{value}]", "+": f"{value} ...", "*": f"[{value} ...]"}.get(action.nargs, value)
        return f"{action.option_strings[0]} {values}".strip()


class _Parser(HfArgumentParser):
    def error(self, message):
        """argparse prints its whole usage here; one line is enough."""
        raise ValueError(message)


def make_parser(show_all=False):
    """The parser of every option; `--help` shows those of TrainingArguments only that SHOWN lists."""
    parser = _Parser(
        (*GROUPS, Training),
        prog=PROG,
        description=DESCRIPTION,
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        conflict_handler="resolve",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument(
        "--resume_from_checkpoint",
        "--resume-from-checkpoint",
        nargs="?",
        const="last",
        help="Continue from this checkpoint folder; without a value: from the last one in --output_dir.",
    )
    parser.add_argument(
        "--help_all",
        action="store_true",
        default=argparse.SUPPRESS,
        help="List the remaining options of transformers' TrainingArguments too.",
    )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    parser.set_defaults(**TRAINER_DEFAULTS, per_device_train_batch_size=max(1, BATCH_SIZE // processes))
    ours = {field.name for group in GROUPS for field in dataclasses.fields(group)}
    for action in parser._actions:
        if action.dest == "verify":
            action.nargs, action.const = "?", 1
        if action.dest == "learning_rate":
            action.default, action.help = None, "None: 1e-3 for the small models, 5e-5 for transformers models."
        if action.dest == "per_device_train_batch_size":
            action.help = f"Examples a process and backward pass; by default {BATCH_SIZE} over all processes."
        if not show_all and action.dest not in SHOWN | ours:
            action.help = argparse.SUPPRESS
    return parser


def parse(argv):
    """(Options, TrainingArguments) from the command line; what --config says comes before what `argv` says.

    Raises ValueError of one sentence for an unknown option or a bad value; `--help` raises SystemExit(0).
    """
    parser = make_parser(show_all="--help_all" in argv)
    if "--help_all" in argv:
        parser.print_help()
        raise SystemExit(0)
    path = _value_of(parser, argv, "config")
    arguments = _from_yaml(parser, path) if path else []
    if path:
        _parsed(parser, arguments, f"--config {path}: ")
    *groups, args = _parsed(parser, [*arguments, *argv])
    values = {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}
    return Options(**values), args


def _parsed(parser, arguments, where=""):
    """The dataclasses of these arguments; raises ValueError that begins with `where`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of an option's old name, which is refused below
            *parsed, unknown = parser.parse_args_into_dataclasses(
                arguments, return_remaining_strings=True, look_for_args_file=False
            )
    except Exception as error:  # TrainingArguments raises many types, from ImportError to NotImplementedError
        raise ValueError(f"{where}{error}") from error
    if unknown:
        raise ValueError(where + _unknown(parser, unknown[0]))
    parsed = parsed[: len(GROUPS) + 1]  # behind them: what the parser has beside the dataclasses
    for name, reason in REFUSED.items():
        given, default = getattr(parsed[-1], name, None), parser.get_default(name)
        if given != default and (given or default):  # TrainingArguments turns some None into False
            raise ValueError(f"{where}--{name} is not supported: {reason}")
    if parsed[-1].save_strategy == SaveStrategy.BEST:
        raise ValueError(f"{where}--save_strategy best is not supported: {REFUSED['load_best_model_at_end']}")
    return parsed


def _value_of(parser, argv, name):
    """The value of one option, before the others are looked at."""
    try:
        return getattr(parser.parse_known_args(argv)[0], name)
    except argparse.ArgumentError as error:
        raise ValueError(error) from error


def _from_yaml(parser, path):
    """The options of a YAML file as a command line. Raises ValueError, OSError that name the file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not a YAML file: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected options as `name: value`, found a {type(content).__name__}")
    actions = {action.dest: action for action in parser._actions}
    arguments = []
    for name, value in content.items():
        if name not in actions or name in ("config", "help", "help_all"):
            raise ValueError(f"--config {path}: {_unknown(parser, f'--{name}')}")
        if value is None or value == []:
            continue
        if name == "verify" and isinstance(value, bool):
            value = int(value)  # true: every step, as --verify alone
        values = value if isinstance(value, list) else [value]
        if actions[name].nargs not in ("+", "*") and isinstance(value, list):
            raise ValueError(f"--config {path}: {name} takes one value, found a list")
        arguments += [f"--{name}", *map(_word, values)]
    return arguments


def _word(value):
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(parser, word):
    names = [name for action in parser._actions for name in action.option_strings]
    close = difflib.get_close_matches(word, names, n=1)
    return f"unknown option {word}" + (f", did you mean {close[0]}?" if close else f" (see {PROG} --help)")
