"""The names and orders that Python and the compiled kernels share, defined once.

`fuseopt._C.schema()` exports the C++ side; `tests/test_schema.py` compares the two.
"""

import torch

RULES = ("adam", "adam_amsgrad", "sgd", "sgd_momentum", "nadam", "adagrad", "lion")

STORAGES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
BITS = 100  # storage id of packed bits (uint8)

# Scalars of the stages around the rule, in the order of StageScalars in csrc/pipeline.h.
STAGE_SCALARS = (
    "inv_grad_scale",
    "direction",
    "clip",
    "l2",
    "l1",
    "decay",
    "soft_threshold",
    "prune_below",
    "keep_moments",
)

MAX_EMA = 8
DTYPES = tuple(STORAGES)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of all arithmetic on, and of the EMA of, a parameter of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
