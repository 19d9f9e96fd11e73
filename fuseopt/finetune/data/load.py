"""The options of the data, and `load`: what is read, which classes are kept, which part is the test."""

import collections
import dataclasses
import os
from pathlib import Path

import torch

from fuseopt.finetune.checks import in_range, listed
from fuseopt.finetune.data import hub, images, texts
from fuseopt.finetune.data.augment import AUGMENTATIONS
from fuseopt.finetune.data.parts import Data, split

EMBEDDED = {"digits": images.embedded_digits, "sentences": texts.embedded_sentences}
FILES = {
    ".npz": images.arrays,
    ".csv": texts.comma_separated,
    ".tsv": texts.comma_separated,
    ".jsonl": texts.json_lines,
    ".ndjson": texts.json_lines,
}
SMALLEST = 4  # pixels a side


@dataclasses.dataclass
class DataOptions:
    """Where the rows come from and how they become inputs."""

    _argument_group_name = "data"

    data: str = dataclasses.field(
        default="digits",
        metadata={
            "help": "`digits` (scikit-learn's 8x8 images), `sentences` (embedded texts on six topics), or a path: a "
            ".npz file with `images` (N, H, W) or (N, C, H, W), scaled by their largest magnitude, and integers "
            "`labels` (N,); a folder with the binary files of CIFAR-10; a folder with a folder of images for each "
            "class, or with such folders in train/ and test/ (or val/); a .csv, .tsv or .jsonl file of texts and "
            "labels; a Hugging Face data set (a folder of save_to_disk, or of parquet or arrow files). All of it is "
            "held in memory."
        },
    )
    test_data: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Test rows, as --data; None: the test part that --data has, or else --test_share of it."},
    )
    test_share: float = dataclasses.field(
        default=0.25, metadata={"help": "Share of the rows kept for the test, of each class alike, drawn by --seed."}
    )
    classes: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "Names of the classes to use; none: all that there are."}
    )
    text_column: str = dataclasses.field(default="text", metadata={"help": "Column or key of the texts."})
    label_column: str = dataclasses.field(default="label", metadata={"help": "Column or key of the labels."})
    image_column: str = dataclasses.field(
        default="image", metadata={"help": "Column of the images in a Hugging Face data set."}
    )
    image_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Make all images this many pixels high and wide; None: as they are."}
    )
    augment: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Change training images at random, in this order: shift (an eighth of each side, at most), flip "
            "(left and right, every second time), rotate (15 degrees, at most), noise (deviation 0.05 where white "
            "is 1), erase (a rectangle of at most half of each side, every second time)."
        },
    )
    max_length: int = dataclasses.field(default=128, metadata={"help": "Tokens of a text, at most; the rest is cut."})
    no_clean: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Leave texts as they are. Otherwise HTML tags and entities, URLs, control characters and repeated "
            "spaces are removed, Unicode is normalised (NFKC), and a new tokenizer lowers the case."
        },
    )


def load(options, seed):
    """The rows of --data as Data, with a test part that is its own, of --test_data, or split off by `seed`.

    Raises ValueError or OSError that names the option and what is wrong.
    """
    _check_options(options)
    source = _read(options.data, "data", options)
    names = _names(source, f"--data {options.data}", options.classes)
    rows, test, where = source.rows, source.test, f"--data {options.data}: test part"
    if options.test_data is not None:
        other = _read(options.test_data, "test_data", options)
        if other.kind != source.kind:
            raise ValueError(f"--test_data {options.test_data}: {other.kind}s, but --data has {source.kind}s")
        test, where = other.test or other.rows, f"--test_data {options.test_data}"
    if test is not None:
        _check_labels(test, {row[1] for row in rows}, where)
        test = _numbered(test, names)
        if not test:
            raise ValueError(f"{where}: no row of the classes {', '.join(names)}")
    rows = _numbered(rows, names)
    if source.kind == "image":
        rows, test = _same_shape(rows, test, source.scale, f"--data {options.data}", where)
    if test is None:
        chosen = split([label for _, label, _ in rows], options.test_share, seed, "--test_share")
        rows, test = ([rows[i] for i in part] for part in chosen)
    if options.augment and source.kind == "text":
        raise ValueError(f"--augment {' '.join(options.augment)}: for images only, --data {options.data} has texts")
    train, test = ([{source.kind: value, "labels": label} for value, label, _ in part] for part in (rows, test))
    data = Data(source.kind, train, test, names, source.note)
    data.description = _description(data)
    return data


def _description(data):
    size = "x".join(map(str, data.shape)) + " " if data.shape else ""
    rows = f"{len(data.train)} training and {len(data.test)} test {size}{data.kind}s"
    return f"{data.description}: {len(data.names)} classes, {rows}"


def _check_options(options):
    in_range("test_share", options.test_share, 0, 1, open_low=True)
    in_range("max_length", options.max_length, 1)
    if options.image_size is not None:
        in_range("image_size", options.image_size, SMALLEST)
    for name in options.augment:
        if name not in AUGMENTATIONS:
            raise ValueError(f"--augment {name}: unknown, choose from {', '.join(AUGMENTATIONS)}")


def _read(name, option, options):
    """The Source that `name` stands for. Raises ValueError or OSError."""
    where = f"--{option} {name}"
    if name in EMBEDDED:
        return EMBEDDED[name](options)
    path = Path(os.path.expanduser(name)).absolute()  # "." has no name
    try:
        source = _reader(path, where)(path, where, options)
    except OSError as error:
        raise OSError(f"{where}: cannot be read: {error.strerror or error}") from error
    if not source.rows:
        raise ValueError(f"{where}: empty, there are no rows in it")
    return source


def _reader(path, where):
    if not path.exists():
        known = ", ".join(EMBEDDED)
        raise ValueError(f"{where}: cannot be read: no such file or folder, nor one of {known}")
    if not path.is_dir():
        if path.suffix.lower() in FILES:
            return FILES[path.suffix.lower()]
        raise ValueError(f"{where}: unknown kind of file, known are {', '.join(FILES)} and folders")
    if any((path / name).exists() for name in images.CIFAR_BATCHES):
        return images.cifar10
    if hub.is_hub_folder(path):
        return hub.hub_folder
    if any(p.is_dir() for p in path.iterdir()):
        return images.image_folder
    raise ValueError(
        f"{where}: nothing known in this folder: data_batch_1.bin of CIFAR-10, a folder of images for each class, "
        "or a Hugging Face data set"
    )


def _names(source, where, chosen):
    """The classes in their order, by label. Raises ValueError for unknown, single and too small ones."""
    counts = collections.Counter(label for _, label, _ in source.rows)
    names = [name for name in source.names or _sorted(counts) if name in counts]
    chosen = [str(name) for name in chosen]  # YAML reads 5 as a number
    for name in chosen:
        if name not in counts:
            raise ValueError(f"--classes {name}: unknown, {where} has {listed(names)}")
    names = [name for name in names if not chosen or name in chosen]
    small = [f"{name} ({counts[name]})" for name in names if counts[name] < 2]
    if len(names) < 2:
        raise ValueError(f"{where}: at least two classes are needed, found only {names[0]}")
    if small:
        raise ValueError(f"{where}: at least two rows of each class are needed, found too few of {listed(small)}")
    return names


def _sorted(names):
    """By number where all are whole numbers, otherwise by letter."""
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def _check_labels(test, known, where):
    unknown = _sorted({label for _, label, _ in test} - known)
    if unknown:
        raise ValueError(f"{where}: labels that the training part does not have: {listed(unknown)}")


def _numbered(rows, names):
    """The rows of these classes, with numbers as labels."""
    numbers = {name: number for number, name in enumerate(names)}
    return [(value, numbers[label], where) for value, label, where in rows if label in numbers]


def _same_shape(rows, test, scale, where, test_where):
    """Both parts divided by the scale, finite and of one shape, gray made RGB where some are. Raises ValueError."""
    both = rows + (test or [])
    channels = {image.shape[0] for image, _, _ in both}
    number = 3 if channels == {1, 3} else None
    first, first_name = both[0][0], both[0][2]
    if min(first.shape[-2:]) < SMALLEST:
        raise ValueError(f"{where}: images must be at least {SMALLEST} pixels high and wide, {_size(first)} found")
    prepared = []
    for i, (image, label, name) in enumerate(both):
        part = where if i < len(rows) else test_where
        if image.shape[-2:] != first.shape[-2:] or (number is None and len(image) != len(first)):
            raise ValueError(
                f"{part}: images of different sizes: {name} is {_size(image)}, {first_name} is {_size(first)}: "
                "make them one size with --image_size"
            )
        if not torch.isfinite(image).all():
            raise ValueError(f"{part}: {name} contains NaN or infinite values")
        image = image.div_(scale)  # in place: a large set would not fit twice
        prepared.append((image.expand(number or -1, -1, -1), label, name))
    return prepared[: len(rows)], prepared[len(rows) :] or None


def _size(image):
    return "x".join(map(str, image.shape))
