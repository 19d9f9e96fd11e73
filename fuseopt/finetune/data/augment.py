"""Changes of training images, drawn from (seed, epoch, row) alone, so that a resumed run sees the same ones."""

import math

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample, pad

SHIFT = 1 / 8  # of each side, at most
ANGLE = 15.0  # degrees either way, at most
NOISE = 0.05  # standard deviation, where images are in [0, 1]
ERASED = 1 / 2  # of each side, at most


def shift(image, rng):
    """Move by up to an eighth of the height and width; the edge is repeated."""
    height, width = image.shape[-2:]
    dy, dx = math.ceil(height * SHIFT), math.ceil(width * SHIFT)
    top, left = rng.integers(2 * dy + 1), rng.integers(2 * dx + 1)
    return pad(image[None], (dx, dx, dy, dy), mode="replicate")[0, :, top : top + height, left : left + width]


def flip(image, rng):
    """Mirror left and right, every second time."""
    return image.flip(-1) if rng.random() < 0.5 else image


def rotate(image, rng):
    """Turn by up to 15 degrees about the centre, bilinear; the edge is repeated."""
    angle = math.radians(rng.uniform(-ANGLE, ANGLE))
    height, width = image.shape[-2:]
    cos, sin = math.cos(angle), math.sin(angle)
    # The coordinates of the grid run from -1 to 1 along both sides, whatever their lengths.
    turn = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
    grid = affine_grid(turn, [1, *image.shape], align_corners=False)
    return grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


def noise(image, rng):
    """Add normal noise of standard deviation 0.05."""
    return image + NOISE * torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype=np.float32))


def erase(image, rng):
    """Fill a rectangle of up to half of each side with the mean of the image, every second time."""
    if rng.random() < 0.5:
        return image
    height, width = image.shape[-2:]
    h, w = 1 + rng.integers(int(height * ERASED)), 1 + rng.integers(int(width * ERASED))
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    image = image.clone()
    image[:, top : top + h, left : left + w] = image.mean((1, 2), keepdim=True)
    return image


AUGMENTATIONS = {f.__name__: f for f in (shift, flip, rotate, noise, erase)}


def augment(image, names, seed, epoch, index):
    """The image (C, H, W) after these changes in this order, as a pure function of (seed, epoch, index)."""
    rng = np.random.default_rng([seed, epoch, index])
    for name in names:
        image = AUGMENTATIONS[name](image, rng)
    return image
