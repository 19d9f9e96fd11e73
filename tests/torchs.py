"""torch's classes as the measure of ours: what torch.testing lists for each, and how the two are compared.

Bit for bit with torch's fused fp32 kernels where the sizes fill its vectors; otherwise with its loop, by
tolerance.
"""

from functools import partial

import pytest
import torch
from cases import F32, TRAJECTORY, all_params, assert_close, assert_same_bits

import fuseopt
from fuseopt import rules

pytest.importorskip("expecttest", reason="torch's own test material needs it: pip install expecttest")
from torch.testing._internal.common_optimizers import optim_db

INFOS = {info.name: info for info in optim_db if any(info.name == cls.__name__ for cls in rules.ALL)}
VECTORS = [(16, 32), (64,), (128, 128)]  # of whole vectors of torch's fused kernel
RAGGED = [(5, 13), (), (0, 3), (33,), (7, 1, 2, 3)]
LOOSE = tuple(5 * bound for bound in TRAJECTORY[F32])  # several steps; torch's loop rounds its square roots oddly
CLASSES = sorted(INFOS)


def listed(function: str = "optim_inputs_func") -> list:
    """(class name, options) of every input torch lists. Those for CUDA are the longest list."""
    return [(name, item) for name in CLASSES for item in getattr(INFOS[name], function)(device="cuda")]


def by_desc(case) -> str:
    name, item = case
    return f"{name}-{item.desc.replace(' ', '_')}"


def theirs(name: str, params, fused: bool = True, **options):
    """torch's optimizer: fused where it can be and `fused` says so; capturable is nothing to it on the CPU."""
    options.pop("capturable", None)
    impl = {"fused": True} if fused and "cpu" in INFOS[name].supports_fused_on else {"foreach": False}
    return getattr(torch.optim, name)(params, **{**impl, **options})


def ours(name: str, params, **options):
    return getattr(fuseopt, name)(params, **options)


def exact(name: str, backend: str) -> bool:
    """Whether torch's bits are promised: of its fused kernels, by the compiled pass."""
    return backend == "cpu" and "cpu" in INFOS[name].supports_fused_on


def assert_agree(a, b, bits: bool, what: str = "") -> None:
    """Parameters and torch's own state of two optimizers."""
    for k, (p, q) in enumerate(zip(all_params(a), all_params(b), strict=True)):
        (assert_same_bits if bits else partial(assert_close, bound=LOOSE))(p, q, what=f"{what} parameter {k}")
        for key, value in b.state.get(q, {}).items():
            if isinstance(value, torch.Tensor):
                mine = a.state[p][key]
                assert mine.dtype == value.dtype and mine.shape == value.shape
                (assert_same_bits if bits else partial(assert_close, bound=LOOSE))(mine, value, what=f"{what} {key} {k}")
