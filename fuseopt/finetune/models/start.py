"""The model that a run starts from: its options, its weights, its head, its processor."""

import dataclasses
from typing import Literal

import torch

from fuseopt.finetune.checks import first_sentence, in_range, listed, matching, without_effect
from fuseopt.finetune.models import heads, lora, processors, source, weights


def _field(default, text):
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class ModelOptions:
    """Which model, from which weights; None stands for the default that the help text names."""

    _argument_group_name = "model"

    model: str | None = _field(
        None,
        "cnn or rnn (images), mlp (text), or a transformers classifier or encoder: a folder, or its name on the "
        "Hugging Face hub. None: what --pretrained holds; without it cnn for images, mlp for text.",
    )
    pretrained: str | None = _field(
        None,
        "Weights to start from: a folder (such as model/ of an earlier run), a safetensors file, or a torch.save file "
        "of a state dict. `none`: random weights. None: those of --model, and for cnn of default size on images of "
        "one channel the embedded network, pretrained on the digits 0-4.",
    )
    head: Literal["auto", "keep", "replace"] = _field(
        "auto",
        "The head of the checkpoint; auto: kept if it is for the same classes, else replaced; keep: it must know the "
        "classes of the data, and may know more.",
    )
    head_init: Literal[("default", *heads.INITS)] = _field(
        "default", "How a new head and the layers of --reinit begin; default: each layer's own way."
    )
    reinit: list[str] = _field([], "Parameters to begin anew, as name patterns, for example the last block.")
    depth: int | None = _field(
        None, "Blocks of cnn (None: 2), GRU layers of rnn (2), hidden layers of mlp (1). Random weights only."
    )
    width: int | None = _field(
        None, "Channels of the first block of cnn (None: 32), units of rnn (64) and mlp (64). Random weights only."
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] | None = _field(
        None, "Of the small models (None: relu). Random weights only."
    )
    dropout: float | None = _field(
        None, "Probability in [0, 1), in every place where the model has dropout. None: the model's own (small: 0.1)."
    )
    lora_rank: int = _field(0, "Train only LoRA matrices of this rank, and the head; 0: no LoRA. Needs peft.")
    lora_alpha: float | None = _field(None, "LoRA's scale is lora_alpha / lora_rank. None: twice the rank.")
    lora_dropout: float = _field(0.0, "Dropout before the LoRA matrices, in [0, 1).")
    lora_targets: list[str] = _field([], "Layers to adapt, as name patterns. Empty: every linear one but the head.")


@dataclasses.dataclass
class Start:
    """A model to train and its processor; `kind` is cnn, rnn, mlp or transformers' model type.

    new: the names of the parameters that no checkpoint gave.
    """

    model: torch.nn.Module
    processor: object
    kind: str
    description: str
    new: set


def start(options, data, new_processor):
    """The model, its processor and what is new in it, from the options (see ModelOptions).

    new_processor() makes the processor where the checkpoint brings none. Draws from torch's global random numbers.
    Where a head is kept, `data` is relabelled in the head's order. Raises ValueError that names the option.
    """
    _check(options)
    found = source.find(options, data)
    processor = processors.find(found, data, new_processor)
    if found.config is None:
        found.config = source.small_config(options, data, processor)
    else:
        source.apply_options(found, options, data, processor)
    if data.kind == "text":
        processors.fit(processor, found)
    model, new, head = _model(found, options, data)
    _try(found, model, data, processor)
    if options.reinit:
        chosen = matching((name for name, _ in model.named_parameters()), options.reinit, "--reinit")
        heads.initialise(model, chosen, options.head_init)
        new |= chosen
    if not new:
        without_effect(options, ["head_init"], ModelOptions, "where the head is kept, without --reinit")
    text = _describe(found, model, new)
    if options.lora_rank:
        model = lora.wrap(model, options, new | head)
        new = lora.new_names(model, new)
        text += f", LoRA of rank {options.lora_rank}: {sum(p.numel() for _, p in lora.trained(model)):,} trained"
    return Start(model, processor, _kind(found.config), text, new)


def _check(options):
    for name in ("dropout", "lora_dropout"):
        value = getattr(options, name)
        if value is not None:
            in_range(name, value, 0, 1)
    in_range("lora_rank", options.lora_rank, 0)
    if not options.lora_rank:
        without_effect(options, ["lora_alpha", "lora_dropout", "lora_targets"], ModelOptions, "without --lora_rank")
    if options.lora_rank and options.reinit:
        raise ValueError("--lora_rank with --reinit: LoRA freezes these layers, they would stay random")


def _model(found, options, data):
    """The model, the names of its new parameters, and those of its head."""
    auto, config = source.AUTO[data.kind], found.config
    for asked, name in ((options.head == "keep", "--head keep"), (options.lora_rank, "--lora_rank")):
        if asked and not found.has_weights:
            raise ValueError(f"{name} needs a checkpoint, this model starts from random weights: give --pretrained")
    names = heads.kept_names(options.head, found.names, data, found) if found.has_weights else None
    heads.set_names(config, names or data.names)
    try:
        shape, head = heads.skeleton(auto, config), heads.head_of(auto, config)
    except Exception as error:  # whatever a model makes of a configuration that cannot be
        raise ValueError(f"{found}: no model has such a configuration: {first_sentence(error)}") from error
    if not found.has_weights:
        model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        heads.initialise(model, head, options.head_init)
        return model, {name for name, _ in model.named_parameters()}, head
    model, new = weights.load(type(shape), config, found, head, keep=names is not None)
    if names and head <= new and options.head == "keep":
        raise ValueError(f"--head keep: {found} has no head: leave it out")
    heads.initialise(model, new, options.head_init)
    heads.relabel(data, names or data.names)
    return model, new, head


@torch.no_grad()
def _try(found, model, data, processor):
    """One row through the model, so that what it cannot take is said before anything is trained."""
    if data.kind == "image":
        inputs = {"pixel_values": torch.zeros(1, *processors.image_shape(processor))}
    else:
        encoded = processor([data.train[0]["text"]], truncation=True, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    model.eval()
    try:
        model(**inputs)
    except Exception as error:  # whatever a model makes of inputs that it is not made for
        shape = tuple(next(iter(inputs.values())).shape)
        reason = first_sentence(error)
        raise ValueError(f"{found}: the model cannot take this data (inputs of shape {shape}): {reason}") from error


def _kind(config):
    return config.model_type.removeprefix(source.PREFIX)


def _describe(found, model, new):
    """One line: what it is, how large, from which weights, and which layers begin anew."""
    text = f"{_kind(model.config)}, {sum(p.numel() for p in model.parameters()):,} parameters, "
    if not found.has_weights:
        return text + "random weights"
    layers = sorted({name.rpartition(".")[0] for name in new})
    return text + f"from {found}, " + (f"new: {listed(layers)}" if layers else "nothing new")
