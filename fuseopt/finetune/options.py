"""The options of `fuseopt finetune`: ours, and those of transformers' TrainingArguments with our defaults."""

import argparse
import dataclasses
import difflib
import warnings
from typing import Literal

from transformers import HfArgumentParser, TrainingArguments

from fuseopt.finetune.train import CLASSES

PROG = "fuseopt finetune"

DESCRIPTION = """
Load a pretrained model, replace its head, and fine-tune it with a fused optimizer: clipping, masks, decay,
the update, pruning and EMA in one pass, each step repeated by separate torch passes and compared. Without
options: a small network pretrained on the digits 0-4 (embedded) learns the digits 5-9 with a frozen stem,
80% pruning and an EMA, in less than a minute. Writes model.safetensors, model_ema.safetensors, metrics.json,
classification_report.txt, verification.txt and plot.png to --output_dir. Exit status: 0 done, 1 the
verification failed, 2 bad input, 130 interrupted (the same command with --resume_from_checkpoint ends with
the same bits).
"""


@dataclasses.dataclass
class Options:
    """What the Trainer does not know. None stands for the default that the help text names."""

    _argument_group_name = "model, data, optimizer and stages"

    optimizer: Literal[tuple(CLASSES)] = dataclasses.field(
        default="adamw", metadata={"help": "The fused optimizer."}
    )
    pretrained: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Weights to start from: a safetensors file of the small digits network (DigitNet), such as "
            "the model.safetensors of an earlier run; its head is replaced by one for the classes of --data. "
            "No other architecture. None: the embedded network, pretrained on the digits 0-4."
        },
    )
    data: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A .npz file of two arrays: `images`, finite numbers of shape (N, H, W) or (N, C, H, W) with H "
            "and W at least 4, scaled by their largest magnitude, and `labels`, integers of shape (N,), two images "
            "or more of each of two classes or more. C must be that of --pretrained: 1 for the embedded network. "
            "A quarter is kept for the test. None: scikit-learn's digits 5-9."
        },
    )
    freeze: list[str] = dataclasses.field(
        default_factory=lambda: ["stem.*"],
        metadata={"help": "Parameters that keep their bits, as name patterns; `none` freezes nothing."},
    )
    ema_decay: float = dataclasses.field(
        default=0.98, metadata={"help": "Decay of the averaged weights in [0, 1); 0: no average."}
    )
    ema_warmup: Literal["timm", "none"] = dataclasses.field(
        default="timm", metadata={"help": "How the decay grows at the start."}
    )
    sparsity: float = dataclasses.field(
        default=0.8,
        metadata={"help": "Share of the prunable entries that is zero at the end, in [0, 1); 0: no pruning."},
    )
    prune_begin: int | None = dataclasses.field(
        default=None, metadata={"help": "First step that prunes; None: after a quarter of the steps."}
    )
    prune_end: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Step that reaches --sparsity; None: after three quarters of the steps."},
    )
    prune_every: int = dataclasses.field(default=10, metadata={"help": "Steps from one pruning to the next."})
    l1: float = dataclasses.field(
        default=0.0,
        metadata={"help": "L1 penalty; as --weight_decay, decoupled where the optimizer decouples it."},
    )
    momentum: float = dataclasses.field(default=0.9, metadata={"help": "Momentum of sgd."})
    verify_every: int = dataclasses.field(
        default=1,
        metadata={"help": "Repeat every N-th step with separate torch passes and compare; 0: never."},
    )
    backend: Literal["cpu", "torch"] | None = dataclasses.field(
        default=None, metadata={"help": "What runs the step; None: the fastest for the device."}
    )
    threads: int = dataclasses.field(
        default=1,
        metadata={"help": "CPU threads; a small model gains nothing by more, and loses on a busy machine."},
    )
    compare_steps: int = dataclasses.field(
        default=300, metadata={"help": "Steps timed at the end beside the torch recipe; 0: none."}
    )
    overwrite: bool = dataclasses.field(
        default=False, metadata={"help": "Replace the run that is in --output_dir."}
    )


TRAINER_DEFAULTS = dict(
    output_dir="runs/finetune",
    num_train_epochs=20,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    weight_decay=0.01,
    max_grad_norm=1.0,
    logging_steps=10,
    eval_strategy="steps",
    eval_steps=20,
    save_steps=100,
    save_total_limit=2,
    seed=0,
    use_cpu=True,
)

# The options of TrainingArguments that plain --help lists, beside those with a default of ours.
SHOWN = {
    *TRAINER_DEFAULTS,
    "max_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "gradient_accumulation_steps",
    "disable_tqdm",
    "resume_from_checkpoint",
    "help",
    "help_all",
}

# Options of TrainingArguments that this harness cannot honour, with the reason.
REFUSED = {
    "optim": "the optimizer is chosen with --optimizer",
    "load_best_model_at_end": "the result is the pruned model of the last step",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed",
    "push_to_hub": "nothing is uploaded",
    "fp16": "fp16 autocast needs a GPU",
    "label_smoothing_factor": "the loss is plain cross entropy",
    "neftune_noise_alpha": "the model has no embedding",
    "gradient_checkpointing": "the model has no checkpointed layers",
    "activation_checkpointing": "the model has no checkpointed layers",
    "prediction_loss_only": "the report needs the predictions",
}


class Training(TrainingArguments):
    """transformers' TrainingArguments under a title of their own in the help text."""

    _argument_group_name = "training, as in transformers' TrainingArguments (--help_all lists the others)"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _format_action_invocation(self, action):
        """`--learning_rate VALUE`: one spelling of the name, without the second one with hyphens."""
        value = "{" + ",".join(action.choices) + "}" if action.choices else "VALUE"
        values = {0: "", "?": f"[{value}]", "+": f"{value} ..."}.get(action.nargs, value)
        return f"{action.option_strings[0]} {values}".strip()


class _Parser(HfArgumentParser):
    def error(self, message):
        """argparse prints its whole usage here; one line is enough."""
        raise ValueError(message)


def _parser(show_all):
    parser = _Parser(
        (Options, Training),
        prog=PROG,
        description=DESCRIPTION,
        usage="%(prog)s [--OPTION VALUE ...]",
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
    parser.set_defaults(**TRAINER_DEFAULTS)
    ours = {field.name for field in dataclasses.fields(Options)}
    for action in parser._actions:
        if not show_all and action.dest not in SHOWN | ours:
            action.help = argparse.SUPPRESS
    return parser


def parse(argv):
    """Options and TrainingArguments from the command line.

    Raises ValueError of one sentence for an unknown option or a bad value; `--help` raises SystemExit(0).
    """
    parser = _parser(show_all="--help_all" in argv)
    if "--help_all" in argv:
        parser.print_help()
        raise SystemExit(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of an option's old name, which is refused below
            options, args, *_, unknown = parser.parse_args_into_dataclasses(
                argv, return_remaining_strings=True, look_for_args_file=False
            )
    except Exception as error:  # TrainingArguments raises many types, from ImportError to NotImplementedError
        raise ValueError(error) from error
    if unknown:
        raise ValueError(_unknown(parser, unknown[0]))
    for name, reason in REFUSED.items():
        given, default = getattr(args, name, None), parser.get_default(name)
        if given != default and (given or default):  # TrainingArguments turns some None into False
            raise ValueError(f"--{name} is not supported: {reason}")
    return options, args


def _unknown(parser, word):
    names = [name for action in parser._actions for name in action.option_strings]
    close = difflib.get_close_matches(word, names, n=1)
    return f"unknown option {word}" + (f", did you mean {close[0]}?" if close else f" (see {PROG} --help)")
