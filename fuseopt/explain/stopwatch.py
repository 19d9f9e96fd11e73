"""How long the last step took: the host's clock on the CPU, events on a GPU, which no step waits for."""

import time
from typing import Any

import torch


class Stopwatch:
    """Times every step of an optimizer from now on, by torch's hooks before and after it; `stop` ends that.

    A closure's time is left out. On a GPU it is the time between two events around the step on the current stream,
    and so includes what the GPU waits for the host meanwhile. A step that raises, and one that a graph captures,
    leaves the time of the one before.
    """

    def __init__(self, opt: Any, device: torch.device):
        self.device = device
        self.spare = self._pair()  # (begin, end): seconds, or events on a GPU
        self.last: list[Any] | None = None  # the same, of the last step
        self.started = False
        self.hooks = opt.register_step_pre_hook(self._before), opt.register_step_post_hook(self._after)

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def seconds(self) -> float | None:
        """Of the last step that was timed; None if there is none. Waits for a GPU to be through with it."""
        if self.last is None:
            return None
        begin, end = self.last
        if self.device.type == "cpu":
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _pair(self) -> list[Any]:
        if self.device.type == "cpu":
            return [0.0, 0.0]
        module = getattr(torch, self.device.type)
        return [module.Event(enable_timing=True) for _ in range(2)]

    def _mark(self, which: int) -> None:
        if self.device.type == "cpu":
            self.spare[which] = time.perf_counter()
        else:
            self.spare[which].record(getattr(torch, self.device.type).current_stream(self.device))

    def _begin(self) -> None:
        self.started = self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
        if self.started:
            self._mark(0)

    def _before(self, opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Of step(self, closure=None): begins now, or when the closure has run."""
        self.started = False
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._begin()
            return None

        def timed() -> Any:
            loss = closure()
            self._begin()
            return loss

        return (args[0], timed, *args[2:]), {key: value for key, value in kwargs.items() if key != "closure"}

    def _after(self, opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.started:
            self._mark(1)
            self.last, self.spare = self.spare, self.last or self._pair()
            self.started = False
