"""Weights from a folder, a safetensors file or a torch.load(weights_only=True) file, and whether they fit."""

import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fuseopt.finetune.checks import first_sentence, listed

WRAPPERS = ("state_dict", "model")  # a training script's checkpoint holds its state dict under one of these


def read(path, option):
    """The tensors of one file by name, without DDP's "module." before them.

    Raises ValueError that names `option` and the file: missing, damaged, a pickle of other objects, no tensors.
    """
    if not Path(path).is_file():
        raise ValueError(f"{option}: there is no such file")
    try:
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # the length of the header comes first
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a pickle protocol that it may not read
            content = load_file(path) if is_safetensors else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{option}: not a file of tensors alone, and pickled objects are not loaded: save a safetensors file, "
            "or torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # whatever safetensors, zipfile and torch make of damaged bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged or not whole"
        raise ValueError(f"{option}: cannot be read as weights: {reason}") from error
    return _state_dict(content, option)


def _state_dict(content, option):
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{option}: holds a {type(content).__name__}, not a state dict of tensors")
    strange = [str(name) for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if strange:
        raise ValueError(f"{option}: {listed(sorted(strange))} is not a tensor: save model.state_dict() alone")
    if complex_ := [name for name, value in content.items() if value.is_complex()]:
        raise ValueError(f"{option}: complex numbers in {listed(sorted(complex_))}, no model here has such weights")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)


def load(model_class, config, source, head, keep):
    """A model of `config` with the weights of `source`, and the names of its parameters that have none there.

    head: names of the parameters that depend on the number of classes; they are new unless `keep`, and where the
    source has none of them. Then it is an encoder or has another task: what it has outside of its base model is left
    out, and what is missing there is new. All else must be in both, in one shape, and finite.

    Raises ValueError that names what does not fit.
    """
    try:
        model, info = model_class.from_pretrained(
            source.where,
            config=config,
            state_dict=source.tensors,
            dtype=torch.float32,
            local_files_only=source.is_local,
            ignore_mismatched_sizes=True,  # judged below
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        raise ValueError(f"{source}: holds pickled objects, which are not loaded: convert it to safetensors") from error
    except SafetensorError as error:
        raise ValueError(f"{source}: damaged or not whole ({error})") from error
    except Exception as error:  # torch's of a damaged .bin file, the library's own of a file that is not there
        raise ValueError(f"{source}: its weights cannot be read: {first_sentence(error)}") from error
    new = _judge(model, info, source, head, keep)
    state = model.state_dict()
    whole = [n for n, p in (source.tensors or {}).items() if n in state and n not in new and _is_cast(p, state[n])]
    if whole:
        raise ValueError(
            f"{source}: integers where this model has weights, as of a quantised one: {listed(sorted(whole))}"
        )
    broken = [n for n, p in state.items() if n not in new and p.is_floating_point() and not p.isfinite().all()]
    if broken:
        raise ValueError(f"{source}: NaN or infinite values in {listed(sorted(broken))}")
    return model, new


def _is_cast(found, needed):
    """Whether integers were taken for floating numbers, without the scale that would make them so."""
    return needed.is_floating_point() and not found.is_floating_point()


def _judge(model, info, source, head, keep):
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    misshapen = {name: (tuple(found), tuple(needed)) for name, found, needed in info["mismatched_keys"]}
    base = model.base_model_prefix
    headless = head <= missing and hasattr(model, base)
    new = set() if keep and not headless else set(head)
    if headless:
        new |= {name for name in missing if not name.startswith(f"{base}.") or ".pooler." in name}
        if missing <= new:
            unexpected = {name for name in unexpected if name.startswith(f"{base}.")}
    differences = {
        "missing": missing - new,
        "unknown": unexpected,
        "of another shape": [f"{n} {found} for {needed}" for n, (found, needed) in misshapen.items() if n not in new],
    }
    parts = [f"{kind}: {listed(sorted(names))}" for kind, names in differences.items() if names] + info["error_msgs"]
    if any(name.endswith(".scale") and name.removesuffix(".scale") in model.state_dict() for name in unexpected):
        raise ValueError(
            f"{source}: these are the 8-bit weights of --quantize, for inference alone: give model/ instead"
        )
    if parts:
        raise ValueError(f"{source}: not the weights of this {type(model).__name__}: {'; '.join(parts)}")
    return new
