"""fuseopt in other libraries; each file imports its own when it is imported, and `import fuseopt` none.

transformers.py  a callback: the Trainer evaluates on the moving average
lightning.py     the same for Lightning
timm.py          the optimizers in timm's registry
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from ..optimizer import FusedOptimizer


def missing(module: str, package: str, error: ImportError) -> ImportError:
    """What to raise, `from` error, where the library of `module`, or one that it needs, cannot be imported."""
    return ImportError(
        f"fuseopt.integrations.{module} needs {package}, which cannot be imported ({error}): "
        f"pip install {package}, or 'fuseopt[integrations]'"
    )


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and Lightning."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def averaging(optimizers: Iterable[Any], k: int) -> list[FusedOptimizer]:
    """Those of the optimizers that keep an average `k`, unwrapped. Raises ValueError if none does."""
    found = []
    for optimizer in map(unwrap, optimizers):
        if isinstance(optimizer, FusedOptimizer):
            optimizer._validate_options()
            if any(0 <= k < len(group["ema"]) for group in optimizer.param_groups):
                found.append(optimizer)
    if not found:
        raise ValueError(f"no optimizer keeps an average {k} to evaluate on: pass ema=fuseopt.EMA(decay) to fuseopt's")
    return found


def swap(optimizers: Iterable[FusedOptimizer], k: int) -> ExitStack:
    """Enter swap_ema(k) of each; close what is returned to leave them.

    Left alone: an optimizer that is inside a swap already.
    """
    with ExitStack() as stack:
        for optimizer in optimizers:
            if not optimizer._swapped:
                stack.enter_context(optimizer.swap_ema(k))
        return stack.pop_all()
