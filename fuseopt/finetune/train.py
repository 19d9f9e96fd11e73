"""What transformers' Trainer does not do by itself."""

import shutil
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score
from transformers import ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from fuseopt.finetune import callbacks, data, folder
from fuseopt.finetune.communication import set_hook
from fuseopt.finetune.loss import compute_loss
from fuseopt.finetune.schedule import check_schedule, make_scheduler
from fuseopt.finetune.stages import prunable, sparsity


class FusedTrainer(Trainer):
    """Evaluates raw and averaged weights, logs the sparsity, verifies steps, and stops cleanly on Ctrl-C."""

    def __init__(self, run):
        self.fused, self.options, self.teacher = run.optimizer, run.options, None
        self.step_times = callbacks.StepTimes()
        self._verification = callbacks.Verification(run.optimizer, run.options.verify)
        self._interruption = callbacks.Interruption()
        before_pruning = callbacks.EvaluateBeforePruning(run.optimizer)
        log = callbacks.Log(f"{run.start.description}; {run.data.description}")
        train, test, collate = data.datasets(run.data, run.processor, run.options, run.args.seed)
        super().__init__(
            run.model,
            run.args,
            train_dataset=train,
            eval_dataset=test,
            data_collator=collate,
            processing_class=run.processor,
            compute_metrics=_accuracy,
            optimizers=(run.optimizer, None),
            callbacks=[self.step_times, self._verification, self._interruption, before_pruning, data.SetEpoch(), log],
        )
        self.model_accepts_loss_kwargs = True  # have num_items_in_batch counted for compute_loss
        set_hook(run.options, self.accelerator)
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(callbacks.Progress)

    def check(self, steps):
        """Build the data loaders and a scheduler as train() will, over a throwaway optimizer, and drop them.

        Returns the scheduler; raises ValueError for options that they do not take.
        """
        groups = [{"params": [torch.zeros(1)]} for _ in self.fused.param_groups]
        with torch.random.fork_rng():
            try:
                batches = len(self.get_train_dataloader())
                self.get_eval_dataloader()
            except Exception as error:  # torch's and accelerate's own
                raise ValueError(f"the --dataloader_ options: {error}") from error
        if not batches:
            raise ValueError("--dataloader_drop_last leaves no batch: the training set is smaller than one")
        check_schedule(self.options, self.args, steps)
        name = f"--lr_scheduler_type {self.args.lr_scheduler_type.value}"
        try:
            scheduler = self.create_scheduler(steps, torch.optim.SGD(groups, lr=self.args.learning_rate))
            for step in (0, 1, steps // 2, steps):
                for rate in getattr(scheduler, "lr_lambdas", []):
                    float(rate(step))
        except Exception as error:  # TypeError for an unknown keyword, anything for a bad value
            raise ValueError(f"{name} with --lr_scheduler_kwargs {self.args.lr_scheduler_kwargs}: {error}") from error
        self.lr_scheduler, self._created_lr_scheduler = None, False
        return scheduler

    @property
    def interrupted(self):
        return self._interruption.requested

    def verification(self):
        """The report over the steps of this process; None where no step was to be verified."""
        return self._verification.report()

    def train(self, resume_from_checkpoint=None):
        """As the Trainer's, which would take one step too many after a checkpoint of the last step."""
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)
            if state.global_step >= self.args.max_steps:
                self.state = state
                return None
        with self._interruption:
            return super().train(resume_from_checkpoint)

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            ours = self.fused if optimizer is None else optimizer  # accelerate's wrapper takes no step hooks
            self.lr_scheduler = make_scheduler(self.options, self.args, ours, num_training_steps)
            self._created_lr_scheduler = self.lr_scheduler is not None
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher = self.teacher if model.training else None
        loss, outputs = compute_loss(model, inputs, teacher, self.options, self.args, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs):
        """Metrics of the raw weights as eval_*, of their average as average_*; leaves the random numbers alone."""
        with torch.random.fork_rng():
            metrics = super().evaluate(*args, **kwargs)
            if self.fused.param_groups[0].get("ema"):
                with self.fused.swap_ema():
                    metrics |= super().evaluate(*args, **{**kwargs, "metric_key_prefix": "average"})
        return metrics

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and prunable(self.fused):
            logs["sparsity"] = sparsity(prunable(self.fused))
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        """As the Trainer's, but whole or not at all. Raises OSError for whatever a full disk makes it raise."""
        output_dir, name = Path(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        scratch = output_dir / ".writing-checkpoint"
        self.args.output_dir = str(scratch)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                folder.move(scratch / name, output_dir / name)
                rotate_checkpoints(str(output_dir), self.args.save_total_limit)
        except Exception as error:
            raise OSError(f"--output_dir {output_dir}: {name} cannot be written, is the disk full? {error}") from error
        finally:
            self.args.output_dir = str(output_dir)
            if self.args.should_save:
                shutil.rmtree(scratch, ignore_errors=True)


def _accuracy(prediction):
    return {"accuracy": accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1))}
