"""The methods of FusedOptimizer for its averages."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

from . import buffers, cuda_memory, ema_formats
from .base import StagedOptimizer
from .distributed import drop_gathered, local, part, placed_alike
from .ema_state import match, of
from .interrupts import held


class AverageMethods(StagedOptimizer):
    """What FusedOptimizer offers for the averages of `ema=`."""

    def swap_ema(self, k: int = 0) -> AbstractContextManager[None]:
        """Within the block the parameters hold average `k`; afterwards their own bits again, also if it raises.

        An average that has had no update yet is the weights themselves. Buffers are the model's own unless
        `average_buffers` was called.

        Args:
            k: which average, where several are kept; default 0.

        Raises ValueError where no average `k` is configured, RuntimeError when nested.
        """
        self._validate_options()
        cuda_memory.settle(self)
        return swapped(self, k)

    @torch.no_grad()
    def copy_ema_to(self, model: torch.nn.Module, k: int = 0) -> None:
        """Write average `k` into the parameters of `model`, rounded to their dtypes.

        An average that has had no update yet is the weights themselves. Buffers are left alone unless
        `average_buffers` was called.

        Args:
            model: the trained model, or another of its kind, which is matched by name; the optimizer must then have
                been given named parameters.
            k: which average, where several are kept; default 0.

        Raises ValueError, with nothing changed, where that is not so, a name or shape does
        not match, or no average `k` is configured; RuntimeError for the trained model inside swap_ema().
        """
        self._validate_options()
        cuda_memory.settle(self)
        pairs = match(self, model, k) + buffers.match(self, model, k)
        own = {id(p) for group in self.param_groups for p in group["params"]}
        if self._swapped and any(id(target) in own for target, _ in pairs):
            raise RuntimeError("copy_ema_to() of the swapped model inside swap_ema(): its end would undo the copy")
        for target, average in pairs:
            if not placed_alike(target, average):
                target, average = local(target), part(target, average)
            target.copy_(average)

    def ema_state_dict(
        self,
        model: torch.nn.Module,
        k: int = 0,
        format: Literal["model", "averaged_model", "timm", "diffusers"] = "model",
    ) -> dict[str, Any]:
        """Average `k` as a state_dict, a snapshot that no later step changes.

        Args:
            model: the trained model, or another of its kind, which is matched by name. What the optimizer has
                no average of (other parameters, and buffers unless `average_buffers` was called) is the
                model's own.
            k: which average, where several are kept.
            format: "model" (default): as model.state_dict(), in the parameters' dtypes; timm saves this as
                `state_dict_ema`. The others hold the averages in the type that they are kept in:

                - "averaged_model": as torch.optim.swa_utils.AveragedModel.state_dict();
                - "timm": as timm.utils.ModelEmaV3.state_dict();
                - "diffusers": as diffusers' EMAModel.state_dict(); it can tell every schedule but "edm2".

        Raises ValueError for an average that is not configured, an unknown format, a model that does not
        match, and, save for "model", parameters that processes share.
        """
        self._validate_options()
        cuda_memory.settle(self)
        return ema_formats.write(self, model, k, format)

    def load_ema_state_dict(
        self, state_dict: dict[str, Any], model: torch.nn.Module, k: int = 0, updates: int | None = None
    ) -> None:
        """Continue average `k` from a state_dict in one of the formats of `ema_state_dict`, told by its keys.

        Args:
            state_dict: what AveragedModel, ModelEmaV3, EMAModel, or a model of averaged weights saved.
            model: the trained model, or another of its kind, which is matched by name.
            k: which average, where several are kept. Its schedule is that of its option here.
            updates: how many updates the average has had, where the state_dict does not tell (a model's and
                timm's do not). By default as many as this optimizer has made.

        The count goes into the option of the parameter groups: `start` becomes the step now less `updates`
        times `every`, which may be negative. Buffers are read where `average_buffers` was called. Raises
        ValueError or TypeError, with nothing changed, if a name, a shape or the number of parameters does
        not match, or if the schedule needs a count and none is known.
        """
        self._validate_options()
        cuda_memory.settle(self)
        ema_formats.read(self, state_dict, model, k, updates)

    def average_buffers(self, model: torch.nn.Module) -> None:
        """From the next step on, average the floating buffers of `model` too, such as those of BatchNorm.

        They follow the weights and steps of each average (of the first group that keeps it), in fp32, fp64
        for fp64. swap_ema, copy_ema_to and ema_state_dict then carry them; buffers of other types stay the
        model's own. The values are saved with the optimizer. The model is not, and it is not kept alive:
        call this again after unpickling or copying the optimizer, before or after loading a checkpoint.

        Args:
            model: the trained model, or a part of it.

        Raises ValueError, with nothing changed, if the buffers are not those that were averaged before, or
        no average is configured.
        """
        self._validate_options()
        buffers.track(self, model)


@contextmanager
def swapped(opt: Any, k: int) -> Iterator[None]:
    """What FusedOptimizer.swap_ema returns."""
    if opt._swapped:
        raise RuntimeError("swap_ema() inside swap_ema(): leave the first with-block before another")
    saved = [(p, p.detach().clone(), average) for p, average in of(opt, k) + buffers.of(opt, k)]

    # Detached, not under torch.no_grad(): an interrupt as that begins or ends would leave gradients off for good.
    def put_back() -> None:
        drop_gathered()
        for p, own, _ in saved:
            p.detach().copy_(own)
        opt._swapped.clear()

    try:
        opt._swapped.append(k)
        drop_gathered()
        for p, _, average in saved:
            p.detach().copy_(average)
        yield
    finally:
        try:
            with held():
                put_back()
        except BaseException:  # an interrupt came before they were held, or waited until the end
            put_back()
            raise
