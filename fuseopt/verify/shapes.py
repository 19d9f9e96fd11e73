"""`fuseopt verify --model`: the shapes and dtypes of a model's tensors, and the few of them that are run."""

import json
import warnings
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from .cases import DTYPES

Found = list[tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor

ENTRIES = 80_000  # the sweep takes about as long as without --model; half of them are the largest tensor's
TENSORS = 24
# Other types that safetensors has, which are not trained, count as bytes.
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "BOOL": torch.bool}
WEIGHTS = ("model_state_dict", "state_dict", "model")  # under which checkpoints keep them, beside other things


@dataclass(frozen=True)
class Chosen:
    """shapes, dtypes: of the tensors to run; said: lines that tell what was left out."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    said: tuple[str, ...]


def of_model(path: str) -> Chosen:
    """The tensors to run of a model. Raises ValueError or OSError that names --model, the path and the remedy.

    path: a safetensors file; a file that torch.load(weights_only=True) reads; a folder with either, in one piece or
    in several with an index; or a transformers folder with config.json alone, whose model is made without memory.
    """
    try:
        found = _of_folder(Path(path)) if Path(path).is_dir() else _of_file(Path(path))
    except OSError as error:
        raise OSError(f"--model {path}: {error.filename or ''}: {error.strerror or error}") from error
    except ImportError as error:
        raise ValueError(f"--model {path}: {error}; pip install 'fuseopt[finetune]'") from error
    except Exception as error:  # whatever a reader makes of damaged bytes
        raise ValueError(f"--model {path}: {' '.join(str(error).split())[:200]}") from error
    chosen = _choose(found)
    if not chosen.shapes:
        raise ValueError(f"--model {path}: no tensor in it is of {', '.join(DTYPES)}: there is nothing to train")
    return chosen


# ---- reading ------------------------------------------------------------------------------------------


def _of_folder(folder: Path) -> Found:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return _of_shards(folder / index)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _of_file(folder / name)
    if files := sorted(folder.glob("*.safetensors")):
        return [tensor for file in files for tensor in _of_file(file)]
    if (folder / "config.json").is_file():
        return _of_config(folder)
    raise ValueError("the folder holds no *.safetensors, pytorch_model.bin or config.json; name one that does")


def _of_file(path: Path) -> Found:
    """By content: whatever is no archive or pickle of torch is read as safetensors."""
    if path.name.endswith(".index.json"):
        return _of_shards(path)
    with open(path, "rb") as file:
        start = file.read(2)
    return _of_torch(path) if start[:1] == b"\x80" or start == b"PK" else _of_safetensors(path)


def _of_shards(index: Path) -> Found:
    files = json.loads(index.read_text())["weight_map"].values()
    return [tensor for name in sorted(set(files)) for tensor in _of_file(index.parent / name)]


def _of_safetensors(path: Path) -> Found:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]
            return [(tuple(one.get_shape()), SAFETENSORS.get(one.get_dtype(), torch.uint8)) for one in slices]
    except SafetensorError as error:
        raise ValueError(f"it is neither a safetensors file nor one that torch.load reads ({error})") from error


def _of_torch(path: Path) -> Found:
    """Nothing but shapes comes into memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of old formats
            content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(
            f"torch.load(weights_only=True) does not read it ({reason} ...); save its state_dict()"
        ) from None
    for key in WEIGHTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = content.values() if isinstance(content, dict) else [content]
    return [(tuple(x.shape), x.dtype) for x in tensors if isinstance(x, torch.Tensor) and x.layout == torch.strided]


def _of_config(folder: Path) -> Found:
    """The model that transformers makes of config.json, without a head and without memory."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=False)
    return [(tuple(p.shape), p.dtype) for p in model.parameters()]


# ---- choosing -----------------------------------------------------------------------------------------


def _choose(found: Found) -> Chosen:
    """One tensor of each shape and dtype, the largest of them cut."""
    trained = [one for one in found if one[1] in DTYPES.values() and prod(one[0])]
    distinct = sorted(set(trained), key=lambda one: (-prod(one[0]), one[0], str(one[1])))
    kept = _evenly(distinct, TENSORS)
    limits = _limits([prod(shape) for shape, _ in kept])
    shapes = tuple(cut(shape, limit) for (shape, _), limit in zip(kept, limits, strict=True))
    entries = sum(prod(shape) for shape, _ in trained)
    said = [f"{len(trained)} tensors, {entries:,} entries, {len(distinct)} different shapes"]
    if len(kept) < len(distinct):
        said.append(f"of these shapes {len(kept)} are run, from the largest to the smallest")
    if cuts := [(a, b) for (a, _), b in zip(kept, shapes, strict=True) if a != b]:
        names = ", ".join(f"{text(a)} to {text(b)}" for a, b in cuts[:2]) + (" ..." if cuts[2:] else "")
        said.append(f"{len(cuts)} cut, to stay below {ENTRIES:,} entries together: {names}")
    if others := sorted({str(d).removeprefix("torch.") for _, d in found if d not in DTYPES.values()}):
        count = sum(d not in DTYPES.values() for _, d in found)
        said.append(f"{count} tensors of {', '.join(others)} left out: fuseopt does not train them")
    return Chosen(shapes, tuple(dtype for _, dtype in kept), tuple(said))


def _evenly(items: list, count: int) -> list:
    """At most `count` of them, first and last included."""
    if len(items) <= count:
        return items
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def _limits(sizes: list[int]) -> list[int]:
    """The most entries of each tensor: half of ENTRIES for the first, a level for the others that fits in the rest."""
    low, high = 1, ENTRIES
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if sum(min(n, level) for n in sizes[1:]) <= ENTRIES // 2 else (low, level - 1)
    return ([ENTRIES // 2] + [low] * len(sizes))[: len(sizes)]


def cut(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The shape with its first dimensions shortened until it has at most `limit` entries."""
    out = list(shape)
    for k in range(len(out)):
        inner = prod(out[k + 1 :])
        out[k] = max(1, min(out[k], limit // inner))
        if inner <= limit:
            break
    return tuple(out)


def text(shape: tuple[int, ...]) -> str:
    """131x127."""
    return "x".join(map(str, shape)) or "a scalar"
