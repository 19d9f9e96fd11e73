"""Readers of images."""

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from sklearn.datasets import load_digits

from fuseopt.finetune.data.pixels import resize
from fuseopt.finetune.data.source import Source, refuse

FORMATS = {
    "PNG": [".png"],
    "JPEG": [".jpg", ".jpeg"],
    "BMP": [".bmp"],
    "GIF": [".gif"],
    "TIFF": [".tif", ".tiff"],
    "WEBP": [".webp"],
    "PPM": [".ppm", ".pgm"],
}
SUFFIXES = {suffix for suffixes in FORMATS.values() for suffix in suffixes}
TEST_FOLDERS = ("test", "val", "valid", "validation")

CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORD = 1 + 3 * 32 * 32  # a byte for the label, then the planes of red, green and blue
CIFAR_BATCHES = [f"data_batch_{number}.bin" for number in range(1, 6)]
CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def _rows(images, labels, options, where="image"):
    """Rows from images (N, H, W) or (N, C, H, W), unscaled, with N labels."""
    images = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if images.ndim == 3:
        images = images[:, None]
    return [
        (_sized(image, options), str(label), f"{where} {i}") for i, (image, label) in enumerate(zip(images, labels))
    ]


def _sized(image, options):
    return resize(image, (options.image_size,) * 2) if options.image_size else image


def embedded_digits(options):
    """scikit-learn's 1797 handwritten digits, 8x8 in 17 shades."""
    images, labels = load_digits(return_X_y=True)
    return Source("image", _rows(images.reshape(-1, 8, 8), labels, options), "scikit-learn's digits", scale=16.0)


def arrays(path, where, options):
    """The arrays `images` (N, H, W) or (N, C, H, W) and `labels` (N,) of a .npz file, scaled by the largest value.

    Raises ValueError or OSError that names the array at fault.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            images, labels = found["images"], found["labels"]
    except KeyError as error:
        raise ValueError(f"{where}: the arrays 'images' and 'labels' are needed: {error.args[0]}") from error
    except OSError:  # said by the caller
        raise
    except Exception as error:  # whatever numpy, zipfile and zlib make of damaged bytes
        raise ValueError(f"{where}: not a readable .npz file of plain arrays") from error
    if images.ndim not in (3, 4) or images.dtype.kind not in "fiu" or 0 in images.shape:
        raise ValueError(
            f"{where}: images must be numbers of shape (N, H, W) or (N, C, H, W), found {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: labels must be {len(images)} integers, one an image, found {labels.dtype} {labels.shape}"
        )
    scale = max(float(np.abs(images.astype(np.float64)).max()), 1e-12)  # abs(-128) does not fit in int8
    return Source("image", _rows(images, labels, options), f"images of {path.name}", scale=scale)


def cifar10(path, where, options):
    """The published binary files of CIFAR-10 in a folder; batches that are not there are named in the note.

    Raises ValueError for a file whose size is not a whole number of images, or a label that has no name.
    """
    meta = path / "batches.meta.txt"
    names = meta.read_text(encoding="utf-8").split() if meta.exists() else CIFAR_NAMES
    here = [name for name in CIFAR_BATCHES if (path / name).exists()]
    rows = [row for name in here for row in _cifar_batch(path / name, names, where, options)]
    test = path / "test_batch.bin"
    missing = [name for name in [*CIFAR_BATCHES, test.name] if not (path / name).exists()]
    note = f"CIFAR-10 of {path.name}" + (f" (without {', '.join(missing)})" if missing else "")
    test_rows = _cifar_batch(test, names, where, options) if test.exists() else None
    return Source("image", rows, note, test_rows, names, scale=255.0)


def _cifar_batch(file, names, where, options):
    content = np.frombuffer(file.read_bytes(), np.uint8)
    if content.size == 0 or content.size % CIFAR_RECORD:
        raise ValueError(f"{where}: {file.name} has {content.size} bytes, not a multiple of {CIFAR_RECORD} an image")
    records = content.reshape(-1, CIFAR_RECORD)
    labels = records[:, 0]
    if labels.max() >= len(names):
        raise ValueError(f"{where}: {file.name} has the label {labels.max()}, there are {len(names)} classes")
    images = records[:, 1:].reshape(-1, *CIFAR_SHAPE)
    return _rows(images, [names[label] for label in labels], options, f"{file.name}, image")


def image_folder(path, where, options):
    """Images in one folder a class; also in train/ and test/ (or val/). Raises ValueError naming unreadable files."""
    train = path / "train" if (path / "train").is_dir() else path
    tests = [path / name for name in TEST_FOLDERS if train != path and (path / name).is_dir()]
    rows = _class_folders(train, where, options)
    test = _class_folders(tests[0], where, options) if tests else None
    return Source("image", rows, f"images of {path.name}", test)


def _class_folders(path, where, options):
    rows, problems = [], []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not files:
            problems.append(f"{folder.name}: no images ({' '.join(sorted(SUFFIXES))}) in this folder of a class")
        for file in files:
            name = str(file.relative_to(path))
            try:
                with PIL.Image.open(file, formats=list(FORMATS)) as image:
                    rows.append((from_pil(image, options), folder.name, name))
            except Exception as error:  # whatever Pillow makes of damaged bytes
                problems.append(f"{name}: {_reason(error)}")
    refuse(problems, where, "files")
    return rows


def _reason(error):
    """Pillow's own message repeats the path."""
    return "not an image" if isinstance(error, PIL.UnidentifiedImageError) else str(error)


def from_pil(image, options):
    """float32 (1 or 3, H, W) in [0, 1], upright. Raises ValueError for an image of more than 8 bits a channel."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {image.mode}: save it with 8 bits a channel")
    image = PIL.ImageOps.exif_transpose(image)
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return _sized(torch.from_numpy(pixels), options)
