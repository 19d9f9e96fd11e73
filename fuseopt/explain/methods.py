"""The methods of FusedOptimizer that report."""

from typing import Any

from .. import backends
from ..base import StagedOptimizer
from ..stages.statistics import Statistics
from .explanation import Explanation
from .stopwatch import Stopwatch


class ReportMethods(StagedOptimizer):
    """What FusedOptimizer says of its steps."""

    # Of the instance, which optimizer.py makes: see __setstate__ there.
    _stopwatch: Stopwatch | None
    _statistics: Any

    def statistics(self) -> Statistics:
        """The sums of the last step, over all parameters that it stepped, as a mapping:

            grad_norm     L2 norm of the gradient, unscaled and masked, before clipping
            param_norm    L2 norm of the new weights
            update_norm   L2 norm of their change
            zeros         how many weights are 0
            nonfinite     how many gradient entries are infinite or NaN

        At a step on which pruning selects they are of the weights before the selection. The mapping keeps the values of
        its step, whatever comes after. On a GPU they are fetched, and the GPU waited for, when one is first read; where
        processes share the parameters step() has added up those of the whole model, and any process may read them.

        Raises RuntimeError before the first step, or without statistics=True.
        """
        if self._statistics is None:
            why = "no step has been taken yet" if self.defaults["statistics"] else "pass statistics=True"
            raise RuntimeError(f"no statistics were gathered: {why}")
        return self._statistics(self) if callable(self._statistics) else self._statistics  # a GPU's, as they are now

    def explain(self) -> Explanation:
        """What a step does here: the backend and why, launches, bytes by stage, the least time. Prints as tables."""
        self._validate_options()
        return Explanation(self)

    def time_steps(self, on: bool = True) -> None:
        """Time every step from now on, for explain() to say; on=False ends that.

        No step waits for it: on a GPU events are recorded before and after, and explain() waits for the last.
        A closure's time, and steps that a CUDA graph replays, are not timed.
        """
        if self._stopwatch is not None:
            self._stopwatch.stop()
        self._stopwatch = Stopwatch(self, backends.device_of(self)) if on else None
