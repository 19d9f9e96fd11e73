"""Where a model comes from: its configuration and its weights, from the options."""

import dataclasses
import re
from pathlib import Path

import huggingface_hub
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from fuseopt.finetune.checks import first_sentence, in_range
from fuseopt.finetune.models import heads, processors, weights
from fuseopt.finetune.models.small import SMALL

EMBEDDED = Path(__file__).with_name("digits_0_4")
AUTO = {"image": AutoModelForImageClassification, "text": AutoModelForSequenceClassification}
SIZES = ("depth", "width", "activation")
PREFIX = "fuseopt-"  # of a small model's type in its configuration


@dataclasses.dataclass
class Source:
    """A configuration, and weights in `where` (a folder, or a name on the Hugging Face hub), in `tensors`, or nowhere.

    named: the option and its value, for messages.
    names: the classes of the weights' head by label; None where nothing says them.
    processors: the places that may have the tokenizer or the normalisation that the weights were trained with.
    """

    named: str
    config: object = None
    where: str | None = None
    tensors: dict | None = None
    names: list | None = None
    processors: list = dataclasses.field(default_factory=list)

    def __str__(self):
        return self.named

    @property
    def is_local(self):
        return self.where is None or Path(self.where).is_dir()

    @property
    def has_weights(self):
        return self.where is not None or self.tensors is not None


def find(options, data):
    """The Source that --model and --pretrained ask for; config is None where the options give that of a small model.

    Raises ValueError for what is not there, cannot be read, or is another kind of model than asked for.
    """
    model, kind = options.model, data.kind
    if options.pretrained is None and model in (None, *SMALL):
        return _embedded(options, data, model or _default(data))
    config, places = None, []
    if model not in (None, *SMALL):
        config, places = read_config(model, f"--model {model}", kind), [model]
    if options.pretrained is None:
        return Source(f"--model {model}", config, model, names=heads.class_names(config), processors=places)
    if options.pretrained == "none":
        return Source("--pretrained none", config, processors=places)
    named = f"--pretrained {options.pretrained}"
    if not Path(options.pretrained).is_dir():
        return Source(named, config, tensors=weights.read(options.pretrained, named), processors=places)
    return _folder(options.pretrained, named, config, model, kind)


def _folder(folder, named, config, model, kind):
    """The Source of a folder of weights, which must be of the type of --model where that is given."""
    own = read_config(folder, named, kind)
    wanted = SMALL[model].config_class.model_type if model in SMALL else getattr(config, "model_type", own.model_type)
    if own.model_type != wanted:
        raise ValueError(f"{named}: holds a model of type {own.model_type}, --model {model} is of type {wanted}")
    places = [folder] if config is None else [folder, model]
    return Source(named, config or own, folder, names=heads.class_names(own), processors=places)


def _default(data):
    return "cnn" if data.kind == "image" else "mlp"


def _embedded(options, data, model):
    """The embedded network where it fits, otherwise no weights."""
    if model == "cnn" and data.kind == "image":
        config = read_config(EMBEDDED, "the embedded network", data.kind)
        asked = {name: getattr(options, name) for name in SIZES}
        if data.shape[0] == config.num_channels and all(v in (None, getattr(config, n)) for n, v in asked.items()):
            # Not its processor, which would make all images 8x8: this network takes them as large as they are.
            names = heads.class_names(config)
            return Source("the embedded network (digits 0-4)", config, str(EMBEDDED), names=names)
    return Source("random weights")


def read_config(where, named, kind):
    """The configuration of a folder, or of a model by its name on the Hugging Face hub; ValueError otherwise."""
    where = str(where)
    path = Path(where)
    if path.is_file():
        raise ValueError(f"{named}: this is a file: --model takes a folder, --pretrained the file of its weights")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{named}: there is no config.json in this folder{_hint(path)}")
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where):
        raise ValueError(f"{named}: there is no such folder, and no model of the Hugging Face hub has such a name")
    verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # it would print each attempt to connect
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=path.is_dir(), trust_remote_code=False)
    except Exception as error:  # OSError without a network or for broken JSON, ValueError for an unknown type
        here = "" if path.is_dir() else f"not a folder, nor one of {', '.join(SMALL)}, and from the hub: "
        raise ValueError(f"{named}: {here}{first_sentence(error)}") from error
    finally:
        huggingface_hub.logging.set_verbosity(verbosity)
    if type(config) not in AUTO[kind]._model_mapping:
        raise ValueError(f"{named}: a model of type {config.model_type} cannot classify data of kind {kind!r}")
    return config


def _hint(path):
    if (path / "adapter_config.json").is_file():
        return ", only a LoRA adapter: give the folder of the merged model"
    return f", but there is one in {path / 'model'}" if (path / "model" / "config.json").is_file() else ""


def small_config(options, data, processor):
    """The configuration of a small model from the options, their None being the model's own default."""
    name = options.model or _default(data)
    model_class = SMALL[name]
    if (name == "mlp") != (data.kind == "text"):
        raise ValueError(f"--model {name} cannot classify data of kind {data.kind!r}")
    given = {n: getattr(options, n) for n in (*SIZES, "dropout") if getattr(options, n) is not None}
    for n in ("depth", "width"):
        in_range(n, given.get(n, 1), 1)
    if name == "mlp":
        given |= {"vocab_size": len(processor), "pad_token_id": processor.pad_token_id}
    else:
        given["num_channels"], _, width = processors.image_shape(processor)
    if name == "rnn":
        given["image_width"] = width
    return model_class.config_class(**given)


def apply_options(found, options, data, processor):
    """Put the options that a configuration of its own takes into it; raises ValueError for those it does not."""
    config = found.config
    small = config.model_type.startswith(PREFIX)
    for name in SIZES:
        value = getattr(options, name)
        if value is not None and not small:
            raise ValueError(f"--{name} {value}: only the small models ({', '.join(SMALL)}) take it, not {found}")
        if value is not None and value != getattr(config, name):
            raise ValueError(
                f"--{name} {value}: {found} has {name} {getattr(config, name)}: leave --{name} out, or start with "
                "--pretrained none"
            )
    if options.dropout is not None:
        _set_dropout(found, options.dropout)
    if data.kind == "image":
        _fit_channels(found, processors.image_shape(processor)[0])


def _fit_channels(found, channels):
    takes = getattr(found.config, "num_channels", channels)
    if takes != channels and found.has_weights:
        raise ValueError(f"{found}: takes images of {takes} channels, those of the data have {channels}")
    found.config.num_channels = channels


def _set_dropout(found, value):
    """Every probability of dropout that the configuration has, whatever it is called there."""
    config = found.config
    named = {n: v for n, v in config.to_dict().items() if "dropout" in n or n.endswith("pdrop")}
    fields = [n for n, v in named.items() if v is None or (isinstance(v, (int, float)) and not isinstance(v, bool))]
    if not fields:
        raise ValueError(f"--dropout {value}: the configuration of {found} has no dropout")
    for name in fields:
        setattr(config, name, value)
