"""The small convolutional network and its safetensors files."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

EMBEDDED = Path(__file__).with_name("digits_0_4.safetensors")


class DigitNet(nn.Module):
    """About 98,000 parameters for images (N, channels, H, W), float32, H and W at least 4.

    stem and body (two convolutions each) - neck (a linear layer and dropout) - head (a linear layer).
    """

    def __init__(self, classes, channels=1, dropout=0.1):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.body = nn.Sequential(
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
        )
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(128, classes)

    def forward(self, images, labels=None):
        """Return {"logits": (N, classes)}, behind "loss" (mean cross entropy) where labels are given."""
        logits = self.head(self.neck(self.body(self.stem(images))))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def load_pretrained(path, classes, channels):
    """A DigitNet with the weights of the safetensors file `path` and a new head of `classes` outputs.

    Raises ValueError that names the file and the first tensor that does not fit.
    """
    tensors = _read(path)
    model = DigitNet(classes, channels)
    body = {name: p for name, p in model.state_dict().items() if not name.startswith("head.")}
    for name, p in body.items():
        if name not in tensors:
            raise ValueError(
                f"--pretrained {path}: tensor {name!r} is missing: this is not a DigitNet checkpoint"
            )
        if tensors[name].shape != p.shape:
            found, expected = tuple(tensors[name].shape), tuple(p.shape)
            raise ValueError(
                f"--pretrained {path}: {name!r} has shape {found}, this model and data need {expected}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"--pretrained {path}: {name!r} contains NaN or infinite values")
    unknown = [name for name in tensors if name not in body and not name.startswith("head.")]
    if unknown:
        raise ValueError(
            f"--pretrained {path}: unknown tensor {unknown[0]!r}: this is not a DigitNet checkpoint"
        )
    model.load_state_dict({name: tensors[name] for name in body}, strict=False)
    return model


def _read(path):
    if Path(path).is_dir():
        raise ValueError(f"--pretrained {path}: this is a folder, not a safetensors file")
    if not Path(path).is_file():
        raise ValueError(f"--pretrained {path}: there is no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"--pretrained {path}: not a whole safetensors file ({error})") from error
    except OSError as error:
        raise ValueError(f"--pretrained {path}: cannot be read: {error.strerror or error}") from error
