"""LoRA through peft: small trained matrices beside frozen ones, merged into them when the model is saved."""

import re
import warnings

from torch import nn
from transformers.pytorch_utils import Conv1D

from fuseopt.finetune.checks import matching


def wrap(model, options, trained):
    """peft's model around `model`: LoRA on the target layers; the layers of the parameters `trained` are trained whole.

    Raises ValueError without peft, and for a target that matches no layer.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"--lora_rank {options.lora_rank} needs peft: run pip install peft") from error
    whole = sorted({name.rpartition(".")[0] for name in trained})
    targets = _targets(model, options.lora_targets, whole)
    modules = dict(model.named_modules())
    config = peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="|".join(map(re.escape, targets)),  # the whole of a name, as a regular expression
        modules_to_save=whole,
        fan_in_fan_out=all(isinstance(modules[name], Conv1D) for name in targets),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the layout of Conv1D, which peft then corrects
        return peft.get_peft_model(model, config)


def _targets(model, patterns, whole):
    kinds = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding) if patterns else (nn.Linear, Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds) and name not in whole]
    if not names:
        raise ValueError("--lora_rank: this model has no linear layer besides its head")
    if not patterns:
        return names
    # By the whole name or by its last part, as peft's own targets are given: encoder.*.query, query.
    both = [part for name in names for part in (name, name.rpartition(".")[2])]
    found = matching(both, patterns, "--lora_targets", "layer")
    return [name for name in names if found & {name, name.rpartition(".")[2]}]


def new_names(model, new):
    """The parameters of the wrapped `model` that begin anew: LoRA's own, and those in `new` before it was wrapped."""
    plain = {name: re.sub(r"^base_model\.model\.|modules_to_save\.default\.", "", name) for name, _ in trained(model)}
    return {name for name, before in plain.items() if "lora_" in name or before in new}


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def is_wrapped(model):
    return hasattr(model, "merge_and_unload")
