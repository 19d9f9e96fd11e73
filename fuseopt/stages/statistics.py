"""Sums gathered on the way (stage 12).

Of the update pass, over everything stepped: grad_norm, the L2 norm of the unscaled, masked gradient
before clipping; param_norm and update_norm, of the new weights and of their change; zeros, the number
of weights that are 0; nonfinite, the number of gradient entries that are infinite or NaN. At a step on
which pruning selects, they are of the pass before the selection.
"""

import math

import torch
from torch import Tensor


class Sums:
    """The reference: sums in double over the parameters given to `add`."""

    def __init__(self):
        self.grad = self.param = self.update = 0.0
        self.zeros = self.nonfinite = 0

    def add(self, g: Tensor, before: Tensor, after: Tensor) -> None:
        """g: the gradient the rule saw, before clipping; before, after: the parameter. Equal shapes."""
        g, before, after = g.double(), before.double(), after.double()
        self.grad += float(g.square().sum())
        self.param += float(after.square().sum())
        self.update += float((after - before).square().sum())
        self.zeros += int((after == 0).sum())
        self.nonfinite += int((~torch.isfinite(g)).sum())

    def result(self) -> dict[str, float]:
        """The mapping that `opt.statistics()` returns."""
        return {
            "grad_norm": math.sqrt(self.grad),
            "param_norm": math.sqrt(self.param),
            "update_norm": math.sqrt(self.update),
            "zeros": self.zeros,
            "nonfinite": self.nonfinite,
        }
