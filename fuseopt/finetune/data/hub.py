"""Reader of Hugging Face data sets in a local folder."""

import tempfile

from fuseopt.finetune.data.images import from_pil
from fuseopt.finetune.data.source import Source, label_text, refuse
from fuseopt.finetune.data.texts import text_row

SAVED = ("dataset_dict.json", "state.json")  # written by save_to_disk
FILES = ("*.parquet", "*.arrow")
TEST_SPLITS = ("test", "validation", "valid", "val", "dev")


def is_hub_folder(path):
    """Whether save_to_disk wrote the folder, or there are parquet or arrow files in it."""
    return any((path / name).exists() for name in SAVED) or any(next(path.rglob(p), None) for p in FILES)


def hub_folder(path, where, options):
    """Texts or images, with the names of its ClassLabel where it has one. Raises ValueError."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{where}: needs the package datasets: run pip install datasets") from error
    shown, level = datasets.utils.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would say what the error says
    try:
        with tempfile.TemporaryDirectory() as cache:  # all rows are read before it is removed
            try:
                if any((path / name).exists() for name in SAVED):
                    found = datasets.load_from_disk(str(path), keep_in_memory=True)
                else:
                    found = datasets.load_dataset(str(path), cache_dir=cache, keep_in_memory=True)
            except Exception as error:  # of many libraries
                raise ValueError(f"{where}: not a readable data set: {error}") from error
            return _source(datasets, found, path, where, options)
    finally:
        datasets.logging.set_verbosity(level)
        if not shown:
            datasets.enable_progress_bars()


def _source(datasets, found, path, where, options):
    parts = found if isinstance(found, dict) else {"train": found}
    if "train" not in parts and len(parts) > 1:
        raise ValueError(f"{where}: no part named 'train', found {', '.join(parts)}")
    train = parts["train"] if "train" in parts else next(iter(parts.values()))
    test = next((parts[name] for name in TEST_SPLITS if name in parts and parts[name] is not train), None)
    features = train.features
    if isinstance(features.get(options.image_column), datasets.Image):
        kind = "image"
    elif options.text_column in features:
        kind = "text"
    else:
        found = ", ".join(features)
        raise ValueError(
            f"{where}: no column {options.image_column!r} of images and no column {options.text_column!r}, "
            f"found {found}: name it with --image_column or --text_column"
        )
    if options.label_column not in features:
        raise ValueError(
            f"{where}: no column {options.label_column!r}, found {', '.join(features)}: name it with --label_column"
        )
    names = getattr(features[options.label_column], "names", None)
    read = _images if kind == "image" else _texts
    rows = read(train, names, where, options)
    test_rows = read(test, names, where, options) if test is not None else None
    return Source(kind, rows, f"{kind}s of {path.name}", test_rows, names)


def _labels(part, names, options):
    """The names of the classes, None for a label that is missing or, as in unlabelled test parts, -1."""
    labels = part[options.label_column]
    if not names:
        return [label_text(label) for label in labels]
    return [names[label] if label is not None and 0 <= label < len(names) else None for label in labels]


def _texts(part, names, where, options):
    texts, labels, problems = part[options.text_column], _labels(part, names, options), []
    rows = [
        text_row({options.text_column: text, options.label_column: label}, f"row {i}", options, problems)
        for i, (text, label) in enumerate(zip(texts, labels))
    ]
    refuse(problems, where)
    return rows


def _images(part, names, where, options):
    rows, problems = [], []
    for i, label in enumerate(_labels(part, names, options)):
        try:
            if label is None:
                raise ValueError(f"no label in {options.label_column!r}")
            rows.append((from_pil(part[i][options.image_column], options), label, f"row {i}"))
        except Exception as error:  # whatever Pillow makes of damaged bytes
            problems.append(f"row {i}: {error}")
    refuse(problems, where)
    return rows
