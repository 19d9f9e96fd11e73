"""Images and labels in, training and test sets out."""

import dataclasses

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SHARE = 0.25


@dataclasses.dataclass
class Data:
    """Two lists of {"images": float32 (C, H, W), "labels": int}, and the names of the classes by label."""

    train: list
    test: list
    names: list

    @property
    def image_shape(self):
        return tuple(self.train[0]["images"].shape)


def embedded_digits(first, last, seed):
    """scikit-learn's 8x8 digits `first` to `last` (inclusive), split by `seed`."""
    images, labels = load_digits(return_X_y=True)
    chosen = (labels >= first) & (labels <= last)
    return _split(images[chosen].reshape(-1, 8, 8), labels[chosen], seed)


def load_npz(path, seed):
    """The arrays `images` (N, H, W) or (N, C, H, W) and `labels` (N,) of a local .npz file.

    Raises ValueError or OSError that names the path and the array at fault.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except KeyError as error:
        raise ValueError(
            f"--data {path}: the arrays 'images' and 'labels' are needed: {error.args[0]}"
        ) from error
    except OSError as error:  # missing, a folder, not allowed
        raise ValueError(f"--data {path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever numpy, zipfile and zlib make of damaged bytes
        raise ValueError(f"--data {path}: not a readable .npz file of plain arrays") from error
    _check(path, images, labels)
    try:
        return _split(images, labels, seed)
    except ValueError as error:
        raise ValueError(f"--data {path}: {error}") from error


def _check(path, images, labels):
    if images.ndim not in (3, 4) or images.dtype.kind not in "fiu" or 0 in images.shape:
        raise ValueError(
            f"--data {path}: images must be numbers of shape (N, H, W) or (N, C, H, W), "
            f"found {images.dtype} {images.shape}"
        )
    if min(images.shape[-2:]) < 4:
        raise ValueError(
            f"--data {path}: images must be at least 4 pixels high and wide, found {images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"--data {path}: labels must be {images.shape[0]} integers, one an image, "
            f"found {labels.dtype} {labels.shape}"
        )
    if not np.isfinite(images).all():
        raise ValueError(f"--data {path}: images contain NaN or infinite values")
    counts = dict(zip(*np.unique(labels, return_counts=True)))
    if len(counts) < 2 or min(counts.values()) < 2:
        raise ValueError(f"--data {path}: at least two classes of two images each are needed, found {counts}")


def _split(images, labels, seed):
    """Scale to [0, 1], number the classes from 0, and split with every class in both parts."""
    images = images.astype(np.float32) / max(float(np.abs(images).max()), 1e-12)
    if images.ndim == 3:
        images = images[:, None]
    classes, targets = np.unique(labels, return_inverse=True)
    parts = train_test_split(images, targets, test_size=TEST_SHARE, stratify=targets, random_state=seed)
    train_images, test_images, train_targets, test_targets = parts
    return Data(
        _rows(train_images, train_targets), _rows(test_images, test_targets), [str(c) for c in classes]
    )


def _rows(images, targets):
    return [{"images": torch.from_numpy(i), "labels": int(t)} for i, t in zip(images, targets)]
