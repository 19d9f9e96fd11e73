"""Evaluation on the moving average in Hugging Face's Trainer and its kin (SFTTrainer, Seq2SeqTrainer)."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from . import averaging, missing, swap

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise missing("transformers", "transformers", error) from error


class EvaluateAverage(TrainerCallback):
    """Runs every evaluate() and predict() of a Trainer on average `k` of its optimizer.

        trainer.add_callback(EvaluateAverage(trainer))

    The weights are the model's own again afterwards, also when the evaluation raises. Before the first
    step there is no average and the own weights are evaluated.

    Checkpoints hold the model's own weights, from which training goes on, and the averages in
    optimizer.pt; so the best checkpoint is the one whose average scored best, saved as own weights.
    With save_average=True each checkpoint has a folder `average` beside, for from_pretrained. After
    load_best_model_at_end the model holds the own weights of the best step and the optimizer the averages
    of the last: evaluations then run on the weights as they are.

    Args:
        trainer: the Trainer that the callback is added to. No event of a callback tells that an evaluation
            starts or fails, so its evaluation_loop is wrapped.
        k: which average, where the optimizer keeps several.
        save_average: write the averaged model into the folder `average` of every checkpoint, too.

    An evaluation raises ValueError if the optimizer keeps no average `k`, or is not fuseopt's.
    """

    def __init__(self, trainer: Trainer, k: int = 0, save_average: bool = False) -> None:
        self.trainer, self.k, self.save_average = trainer, k, save_average
        self._belongs = True  # the averages belong to the weights in the model
        evaluation_loop = trainer.evaluation_loop

        def on_average(*args: Any, **kwargs: Any) -> Any:
            active = self in trainer.callback_handler.callbacks  # it may have been removed
            with self._swap() if active else nullcontext():
                return evaluation_loop(*args, **kwargs)

        trainer.evaluation_loop = on_average

    def _swap(self) -> ExitStack:
        optimizer = self.trainer.optimizer
        usable = self._belongs and optimizer is not None  # by class, it is made when training begins
        return swap(averaging([optimizer], self.k) if usable else [], self.k)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._belongs = True
        averaging([self.trainer.optimizer], self.k)  # raise now rather than after the first epoch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.save_average:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / "average"
            with self._swap():
                self.trainer.save_model(str(folder), _internal_call=True)  # internal: nothing is pushed to a hub

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._belongs = not (args.load_best_model_at_end and state.best_model_checkpoint)
