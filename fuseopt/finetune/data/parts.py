"""A data set in memory and its stratified parts, all decided by a seed."""

import dataclasses
import math

import numpy as np
from sklearn.model_selection import StratifiedKFold, train_test_split


@dataclasses.dataclass
class Data:
    """Rows {"image": float32 tensor (C, H, W)} or {"text": str}, each with "labels": int, and the classes by label."""

    kind: str  # "image" or "text"
    train: list
    test: list
    names: list
    description: str

    @property
    def shape(self):
        """(C, H, W) of the images, which all have the same; None for texts."""
        return tuple(self.train[0]["image"].shape) if self.kind == "image" else None


def split(labels, share, seed, option):
    """Indices (train, test) of a stratified split. Raises ValueError where a class would not be in both parts.

    option: the one that gave the share, for messages.
    """
    labels = np.asarray(labels)
    try:
        train, test = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ValueError(f"{option} {share:g} of {len(labels)} rows: {error}") from error
    return train.tolist(), test.tolist()


def folds(data, k, seed):
    """K data sets over the training and test rows; each row is in the test part of exactly one, stratified.

    Raises ValueError if k < 2 or a class has fewer than k rows.
    """
    rows = data.train + data.test
    labels = np.array([row["labels"] for row in rows])
    smallest = np.bincount(labels, minlength=len(data.names)).min()
    if not 2 <= k <= smallest:
        raise ValueError(f"--folds {k}: must be from 2 to {smallest}, the rows of the smallest class, or 0 for one run")
    pairs = StratifiedKFold(k, shuffle=True, random_state=seed).split(labels, labels)
    return [
        dataclasses.replace(
            data,
            train=[rows[i] for i in train],
            test=[rows[i] for i in test],
            description=f"{data.description}; fold {number} of {k}",
        )
        for number, (train, test) in enumerate(pairs, start=1)
    ]


def shares(data, fractions, seed):
    """Data sets of these shares of the training rows, ceil(share * rows) of each class, with the same test.

    A smaller share is part of every larger one.
    """
    labels = np.array([row["labels"] for row in data.train])
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = [order[labels[order] == label] for label in range(len(data.names))]
    parts = []
    for fraction in fractions:
        chosen = np.concatenate([rows[: math.ceil(fraction * len(rows))] for rows in by_class])
        train = [data.train[i] for i in sorted(chosen)]
        text = f"{data.description}; {len(train)} training rows, a share of {fraction:g}"
        parts.append(dataclasses.replace(data, train=train, description=text))
    return parts
