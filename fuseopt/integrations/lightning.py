"""Validation, testing and prediction on the moving average in Lightning."""

import sys
from contextlib import ExitStack
from typing import Any

from . import averaging, missing, swap

# `lightning` and `pytorch_lightning` are two copies of one library, each with a Callback of its own. What the
# program uses is imported already.
try:
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import Callback
    else:
        try:
            from lightning.pytorch import Callback
        except ImportError:
            from pytorch_lightning import Callback
except ImportError as error:
    raise missing("lightning", "lightning", error) from error


class EvaluateAverage(Callback):
    """Validates, tests and predicts on average `k` of the optimizers.

        Trainer(callbacks=[EvaluateAverage()])

    The weights are the model's own again when the evaluation ends, also when it raises. In the sanity check
    before the first step there is no average and the own weights are evaluated; likewise where no optimizer
    was set up, as in validate() without fit() before.

    Checkpoints hold the model's own weights, from which training goes on, and the averages among the
    optimizer states; so ModelCheckpoint's best is the one whose average scored best, saved as own weights.
    With save_average=True each checkpoint also has them averaged, as `average_state_dict`. test(ckpt_path=...)
    and its kin load the own weights and no averages: they run on the weights as they are, and so does what
    follows until the next fit().

    Args:
        k: which average, where an optimizer keeps several.
        save_average: put the averaged state_dict of the module into every checkpoint, too.

    fit() raises ValueError if no optimizer keeps an average `k`.
    """

    def __init__(self, k: int = 0, save_average: bool = False) -> None:
        self.k, self.save_average = k, save_average
        self._swapped = ExitStack()
        self._belongs = True  # the averages belong to the weights in the model

    def _enter(self, trainer: Any, *_: Any) -> None:
        self._leave()
        self._belongs &= trainer.state.fn == "fit" or trainer.ckpt_path is None
        self._swapped = self._swap(trainer)

    def _leave(self, *_: Any) -> None:
        self._swapped.close()

    def _swap(self, trainer: Any) -> ExitStack:
        usable = self._belongs and trainer.optimizers
        return swap(averaging(trainer.optimizers, self.k) if usable else [], self.k)

    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = on_exception = _leave

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._belongs = True
        averaging(trainer.optimizers, self.k)  # raise now rather than after the first epoch

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.save_average:
            with self._swap(trainer):
                state = pl_module.state_dict()
                checkpoint["average_state_dict"] = {name: value.clone() for name, value in state.items()}
