"""Size and normalisation of images, saved beside a model as transformers does, without torchvision."""

import dataclasses
import json
from pathlib import Path

import torch
from torch.nn.functional import interpolate

FILE = "preprocessor_config.json"


def resize(image, size):
    """(C, H, W) to (C, *size), bilinear, averaging where it shrinks; the image itself if it has that size."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return interpolate(image[None], size=tuple(size), mode="bilinear", antialias=True)[0]


@dataclasses.dataclass
class Pixels:
    """`pixels(image)` is (image - mean) / std by channel, after it was resized to `size`.

    image: float32 (C, H, W) in [0, 1]. mean, std: one number a channel. size: (H, W).
    One channel serves a model of three, repeated. There is no cropping: the whole image is resized.
    """

    mean: list
    std: list
    size: tuple

    def __post_init__(self):
        self._mean = torch.tensor(self.mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(self.std, dtype=torch.float32)[:, None, None]

    def __call__(self, image):
        """float32 (len(mean), *size) from float32 (C, H, W)."""
        return (resize(image, self.size) - self._mean) / self._std  # broadcasts one channel to three

    def check(self, shape):
        """Raise ValueError if images of this shape (C, H, W) have channels that the model does not take."""
        if shape[0] not in (1, len(self.mean)):
            raise ValueError(f"the images have {shape[0]} channels, the model takes {len(self.mean)}")

    @classmethod
    def fit(cls, images):
        """Mean and standard deviation by channel of these images of one shape; 1 where a channel is constant."""
        count = len(images) * images[0][0].numel()
        mean = sum(image.double().sum((1, 2)) for image in images) / count
        squares = sum((image.double() - mean[:, None, None]).square().sum((1, 2)) for image in images)
        std = (squares / count).sqrt()
        std = torch.where(std > 1e-6, std, 1.0)
        return cls(mean.tolist(), std.tolist(), tuple(images[0].shape[-2:]))

    def save_pretrained(self, folder):
        """Write preprocessor_config.json, which transformers reads as a ViTImageProcessor of 8-bit images."""
        config = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.size[0], "width": self.size[1]},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean,
            "image_std": self.std,
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder):
        """Read preprocessor_config.json, also that of a transformers model. Raises ValueError or OSError."""
        path = Path(folder, FILE)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            factor = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
            mean, std = config.get("image_mean"), config.get("image_std")
            if not config.get("do_normalize", mean is not None):
                mean, std = [0.0] * len(mean or "RGB"), [1.0] * len(std or "RGB")
            if len(mean) != len(std) or not all(s > 0 for s in std):
                raise ValueError("image_std must be positive, one a channel of image_mean")
            # transformers normalises 255 * factor * image; dividing both by the factor is the same.
            return cls([m / factor for m in mean], [s / factor for s in std], _size(config))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the settings of an image processor: {error}") from error


def _size(config):
    """(H, W) that the model sees: the crop where there is one."""
    size = config["crop_size"] if config.get("do_center_crop") else config["size"]
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]
