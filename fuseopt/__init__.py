"""fuseopt: optimizers that do weight decay, Adam, EMA, masks, pruning and clipping in one pass."""

from . import masks, verify
from .pruning import check_n_m, sparsity
from .rules import SGD, Adagrad, Adam, AdamW, Lion, NAdam
from .stages.ema import EMA
from .stages.prune import Prune

__version__ = "0.1.0"
__all__ = [
    "EMA",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "NAdam",
    "Prune",
    "check_n_m",
    "masks",
    "sparsity",
    "verify",
]
