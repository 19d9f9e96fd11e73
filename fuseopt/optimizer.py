"""FusedOptimizer: what every fuseopt optimizer shares. Data flow of a step:

class in rules/ -> FusedOptimizer.step (closure, step count) -> plan.Step (checks, missing state, scalars
in double) -> backends (compiled pass or torch reference) -> pruning, if this step selects.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import averages, backends, checkpoint, cuda_memory, distributed, ema_state, explain, masking, plan, pruning
from .options import (
    GROUP_OPTIONS,
    WHOLE_OPTIONS,
    StageOptions,
    Unpack,
    drop_whole,
    fill_in,
    normalise,
    refuse_differentiable,
    snapshot,
)

__all__ = ["FusedOptimizer", "StageOptions", "Unpack"]

Loss = TypeVar("Loss")  # what a closure returns: a float or a tensor


class FusedOptimizer(masking.MaskMethods, pruning.PruneMethods, averages.AverageMethods, explain.ReportMethods):
    """Base of the optimizers: one pass over memory a step, whatever is switched on.

    Each takes torch's arguments, then these stage options by keyword. The first four may differ between parameter
    groups, and count from the next step on when edited in `param_groups`.

    Parameters may be fp32, fp64, bf16 or fp16, of any shape and strides, on one device; arithmetic is in fp32 (fp64 for
    fp64) and each result is rounded once when it is stored. Gradients are read, never written.

    Keyword Args:
        max_grad_norm (float | None): clip the gradient by its global L2 norm over all groups, scaling by
            min(1, max_grad_norm / (norm + 1e-6)). None (default): no clipping.
        l1 (float): L1 penalty, coupled or decoupled as weight_decay is. 0 (default): none.
        ema (EMA | list[EMA] | None): averages of the weights, at most 8. None (default): none.
        prune (Prune | None): None (default): none.
        statistics (bool): gather the sums that `statistics()` returns. False by default.
        backend (str | None): "cpu" or "cuda" (compiled), "triton", "torch" (plain torch operations), or None (default)
            to choose by device.
        sharded (bool): True where the parameters are this process's part of the model's, each on one process
            alone, as ZeroRedundancyOptimizer makes them: norm, statistics and pruning are then those of
            all processes together. Equal magnitudes are pruned by rank before order, and swap_ema and
            copy_ema_to reach the parameters of this process. DTensors need no such hint. Default: False.

    Raises TypeError for an unknown option, ValueError for a value outside these and RuntimeError for a backend that is
    not there. A rule provides kernel, slots, counters, hyper, update.
    """

    # Remade on demand after unpickling or deepcopy, which keep defaults, state and groups alone.
    _stage_defaults: dict[str, Any] | None = None
    _table: Any = None
    _kept: Any = None  # of the last step, for the next; see cpu.py
    _valid: list[Any] | None = None  # the groups' stage options when they were last validated
    _fused_asked = False

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """torch's mark of a step that unscales and skips by itself: True to a GradScaler, which then leaves it to us.

        Lightning takes the mark for a reason to refuse gradient_clip_val under any mixed precision, bf16 too, and
        unscales by itself without it. So others than a GradScaler get what torch would say: whether fused=True was
        passed.
        """
        return self._fused_asked or isinstance(sys._getframe(1).f_locals.get("self"), torch.amp.GradScaler)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:  # torch's constructor sets it for fused=True
        self._fused_asked = value

    # ---- what a rule provides -------------------------------------------------------------------

    @staticmethod
    def kernel(group: dict[str, Any]) -> str:
        """The rule's name in schema.RULES for these options."""
        raise NotImplementedError

    @staticmethod
    def slots(group: dict[str, Any]) -> tuple[str, ...]:
        """State keys of the moments, in the order of the kernel."""
        raise NotImplementedError

    @staticmethod
    def counters(group: dict[str, Any]) -> tuple[str, ...]:
        """State keys of the 0-dim counters, in the order of the kernel."""
        raise NotImplementedError

    @staticmethod
    def hyper(group: dict[str, Any]) -> tuple[float, ...]:
        """The rule's numbers as doubles, in the order of the kernel."""
        raise NotImplementedError

    @staticmethod
    def initial(defaults: dict[str, Any]) -> float | None:
        """The value that new moments start from; as in torch, the constructor's, whatever a group says.

        None: the first pass writes them whatever they hold, and zeros where no pass follows at once.
        """
        return 0.0

    @staticmethod
    def update(
        p: Tensor, g: Tensor, slot: dict[str, Tensor], counter: dict[str, float], hyper: tuple[float, ...]
    ) -> Tensor:
        """The formula, in torch: returns the new p; replaces the entries of slot and counter."""
        raise NotImplementedError

    # ---- construction ---------------------------------------------------------------------------

    def _set_stage_defaults(self, stages: StageOptions, differentiable: bool, **more: Any) -> None:
        """Validate the stage options; called before torch's constructor looks at the parameters."""
        refuse_differentiable(differentiable)
        allowed = {**GROUP_OPTIONS, **WHOLE_OPTIONS}
        for name in stages:
            if name not in allowed:
                raise TypeError(
                    f"{type(self).__name__} got an unknown option {name!r}; beside torch's: {', '.join(allowed)}"
                )
        defaults = {**allowed, **stages, **more}
        backends.check_name(defaults["backend"])
        if not isinstance(defaults["sharded"], bool):
            raise TypeError(f"Invalid sharded: {defaults['sharded']!r}; give True or False")
        normalise(defaults)
        self._stage_defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group may also carry max_grad_norm, l1, ema and prune.

        Args:
            param_group: a dict with "params" and what differs from the optimizer's defaults.

        Raises ValueError for a group with other values of `statistics`, `backend` or `sharded` than the
        optimizer's: they hold for the whole of it.
        """
        self.__dict__.setdefault("_placeholders", {})
        self.__dict__.setdefault("_dynamic", [])  # masks that are recomputed
        if self._stage_defaults is not None:  # during construction
            self.defaults.update(self._stage_defaults)
            self.__dict__.pop("_stage_defaults")
        if isinstance(param_group, dict):
            for name in WHOLE_OPTIONS:
                if param_group.get(name, self.defaults[name]) != self.defaults[name]:
                    raise ValueError(f"{name!r} belongs to the optimizer, not to a parameter group; pass it by keyword")
            fill_in(param_group, self.defaults)
            normalise(param_group)
            self._valid = [*(self._valid or ()), snapshot(param_group)]
            cuda_memory.settle(self)
            param_group["steps"] = self._steps()  # not what another optimizer left in the caller's dict
        super().add_param_group(param_group)
        drop_whole(param_group)
        self._statistics = None
        self.__dict__.setdefault("_stopwatch", None)
        self.__dict__.setdefault("_swapped", [])
        self.__dict__.setdefault("_tracked", [])

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of `step`, for hooks and profilers. Left out without either: it outlasts a small step."""
        wrapped = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            hooked = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            hooked = hooked or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
            run = wrapped if hooked or profiler._is_profiler_enabled else func
            return run(self, *args, **kwargs)

        return step

    def __getstate__(self) -> dict[str, Any]:
        cuda_memory.settle(self)
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Not class attributes: Lightning's wrapper subclasses the class and finds ours only where it has none itself.
        self.__dict__.setdefault("_statistics", None)
        self.__dict__.setdefault("_stopwatch", None)
        self.__dict__.setdefault("_placeholders", {})
        self.__dict__.setdefault("_dynamic", [])
        self.__dict__.setdefault("_swapped", [])  # the average that swap_ema has in
        self.__dict__.setdefault("_tracked", [])  # the buffers that are averaged
        for group in self.param_groups:
            fill_in(group, self.defaults)
            drop_whole(group)
        untouched = all(group.get("steps") == 0 for group in self.param_groups)  # torch's say nothing
        steps = max(self._steps(), checkpoint.steps_of(self))  # torch keeps our count and does not advance it
        for group in self.param_groups:
            group["steps"] = steps
        ema_state.find_placeholders(self, untouched and steps == 0)

    def _steps(self) -> int:
        return max([group.get("steps", 0) for group in self.param_groups], default=0)

    def _validate_options(self) -> None:
        """Validate stage options that were edited in param_groups, and make plain data of them."""
        now = [tuple(map(group.get, GROUP_OPTIONS)) for group in self.param_groups]
        if now == self._valid:
            return
        edited = [dict(zip(GROUP_OPTIONS, values, strict=True)) for values in now]
        for options in edited:
            normalise(options)
        for group, options in zip(self.param_groups, edited, strict=True):
            group.update(options)
        self._valid = list(map(snapshot, edited))

    # ---- the step -------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; returns the closure's loss, if one is given.

        The order of its stages is that of the table in docs/pages/together.md. A step is whole or not at all: signals
        wait.

        Args:
            closure: evaluates the model anew and returns the loss; called once, with gradients enabled.

        Raises ValueError or TypeError, with nothing changed, if a parameter, gradient or state cannot be
        stepped; the message names it and the remedy. Raises RuntimeError inside swap_ema().
        """
        if torch.compiler.is_compiling():  # one graph break: there is nothing in a step that a graph could hold
            return _eager_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._swapped:
            raise RuntimeError("step() inside swap_ema(): leave the with-block first, or the step would be lost")
        self._validate_options()
        step = backends.begin(self)
        if step is not None and step.t == 1 and not step.captured and self._is_dry_run():
            plan.make_state(self, prune_masks=True)
        elif step is not None:
            backends.run(self, step)
        return loss

    @property
    def _on_gpu(self) -> bool:
        """Whether CUDA kernels step, which keep the counters on the GPU."""
        return backends.choose(self) == "cuda"

    def _is_dry_run(self) -> bool:
        """Whether this first step is torch.distributed.checkpoint's, to make state: lr 0, zero gradients."""
        if any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"]]

        def count(members: list[int]) -> Tensor:  # of nonzero gradients
            gradients = [distributed.local(params[k].grad) for k in members if params[k].grad is not None]
            return torch.tensor(sum(bool(g.any()) for g in gradients))

        return not distributed.Parts(params, self.defaults["sharded"]).total(count)

    # ---- checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with masks (boolean tensors) and averages (`ema_0`, `ema_1`, ...) among the state.

        Tensors, numbers, strings, lists and dicts only, so that torch.load(weights_only=True) reads it. torch's class
        of the same name loads it. Waits for a GPU.
        """
        self._validate_options()
        cuda_memory.settle(self)
        return checkpoint.outgoing(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state_dict of this class or of its torch counterpart.

        Averages, masks and counters come back in the type they were kept in. Hyper-parameters follow the
        checkpoint, as in torch, but stage options and masks that it has not (torch's, or saved without
        them) stay as they are here, and a UserWarning tells what starts anew.

        Args:
            state_dict: what `state_dict()` returned, here or in torch.

        Raises ValueError or TypeError, with nothing changed, if the checkpoint is malformed or its groups or shapes
        differ.
        """
        checkpoint.load(self, state_dict, super().load_state_dict)


_eager_step: Callable[..., Any] = torch._disable_dynamo(FusedOptimizer.step)  # type: ignore[attr-defined]
