"""Sums gathered on the way (stage 12).

Of the update pass, over everything stepped: grad_norm, the L2 norm of the unscaled, masked gradient
before clipping; param_norm and update_norm, of the new weights and of their change; zeros, the number
of weights that are 0; nonfinite, the number of gradient entries that are infinite or NaN. At a step on
which pruning selects, they are of the pass before the selection.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH = 5  # of a row


def row(g: Tensor, before: Tensor, after: Tensor) -> tuple[float, ...]:
    """The sums of one parameter, in double: the reference.

    g: the gradient the rule saw, before clipping; before, after: the parameter. Equal shapes.
    """
    g, before, after = g.double(), before.double(), after.double()
    return (
        float(g.square().sum()),
        float(after.square().sum()),
        float((after - before).square().sum()),
        float((after == 0).sum()),
        float((~torch.isfinite(g)).sum()),
    )


def result(total: Sequence[float]) -> dict[str, float]:
    """The mapping that `opt.statistics()` returns, of the total of the rows."""
    grad, param, update, zeros, nonfinite = map(float, total)
    return {
        "grad_norm": math.sqrt(grad),
        "param_norm": math.sqrt(param),
        "update_norm": math.sqrt(update),
        "zeros": int(zeros),
        "nonfinite": int(nonfinite),
    }
