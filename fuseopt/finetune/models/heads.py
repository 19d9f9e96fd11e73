"""Heads: for which classes, which parameters they are, and how new layers begin."""

import copy

import torch
from torch import nn

INITS = {
    "zeros": nn.init.zeros_,
    "normal": lambda p: nn.init.normal_(p, std=0.02),
    "xavier": nn.init.xavier_uniform_,
    "kaiming": lambda p: nn.init.kaiming_uniform_(p, nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
}


def class_names(config):
    """The classes that a head was made for, in its order; None where the configuration does not name them."""
    names = [str(config.id2label[i]) for i in sorted(config.id2label)] if config.id2label else []
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def kept_names(head, own, data, source):
    """The names by label where the head is kept, None where it is replaced.

    own: the classes of the checkpoint's head, None if unknown. Raises ValueError for --head keep where the data has
    labels that the head has not.
    """
    if head == "replace" or (head == "auto" and (own is None or set(own) != set(data.names))):
        return None
    own = own or list(data.names)
    strange = [name for name in data.names if name not in own]
    if strange:
        raise ValueError(
            f"--head keep: the labels {', '.join(strange)} of the data are not in the head of {source}, which has "
            f"{', '.join(own)}: --head replace makes a new one"
        )
    return own


def relabel(data, names):
    """Number the labels of `data` as `names` does, in rows of its own; names without a row stay possible."""
    if list(data.names) == list(names):
        return
    number = [names.index(name) for name in data.names]
    data.train = [{**row, "labels": number[row["labels"]]} for row in data.train]
    data.test = [{**row, "labels": number[row["labels"]]} for row in data.test]
    data.names = list(names)


def set_names(config, names):
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification"


def skeleton(auto, config):
    """A model of `config` without memory for its parameters."""
    with torch.device("meta"):
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)


def head_of(auto, config):
    """Names of the parameters whose shape depends on the number of classes, found by asking for one class more."""
    larger = copy.deepcopy(config)
    larger.num_labels = config.num_labels + 1
    one, other = (dict(skeleton(auto, c).named_parameters()) for c in (config, larger))
    return {name for name, p in one.items() if p.shape != other[name].shape}


@torch.no_grad()
def initialise(model, names, choice):
    """Begin these parameters anew from torch's global random numbers: each layer's own way, or one of INITS.

    INITS fill matrices and larger; biases are then 0, and norms keep their own way.
    Raises ValueError for a layer that has no way of its own.
    """
    for prefix, module in model.named_modules():
        inside = {f"{prefix}.{name}".removeprefix("."): p for name, p in module.named_parameters()}
        chosen = [(n, p) for n, p in inside.items() if n in names and n.rpartition(".")[0] == prefix]
        if not chosen:
            continue
        others = [(p, p.clone()) for name, p in inside.items() if name not in names]
        for _, p in chosen:
            p.fill_(torch.nan)
            p._is_hf_initialized = False  # from_pretrained marks what it has loaded, and the library then leaves it
        model._init_weights(module)
        for name, p in chosen:
            _fill(name, p, choice)
        for p, value in others:  # a layer begins whole
            p.copy_(value)


def _fill(name, p, choice):
    if choice != "default" and p.ndim > 1:
        INITS[choice](p)
    elif choice != "default" and "bias" in name.rpartition(".")[2]:
        p.zero_()
    if p.isnan().any():
        raise ValueError(
            f"{name}: its layer has no initialisation of its own: take --head_init {'|'.join(INITS)}, or another layer"
        )
