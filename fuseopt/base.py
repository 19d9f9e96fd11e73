"""What the parts of FusedOptimizer, each with its methods in a file of its own, know of the whole."""

from typing import Any

import torch
from torch import Tensor


class StagedOptimizer(torch.optim.Optimizer):
    """The attributes that masking, pruning and averaging share. FusedOptimizer sets them, in each instance."""

    _swapped: list[int]  # the average that swap_ema has in
    _tracked: list[Any]  # the buffers that are averaged
    _dynamic: list[Any]  # masks that are recomputed
    _placeholders: dict[str, set[Tensor]]  # by state key: whose entry was made and holds no value yet

    def _validate_options(self) -> None:
        raise NotImplementedError
