"""The optimizer from the options, and what the Trainer does not do by itself."""

import fnmatch
import signal
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

import fuseopt.rules
import fuseopt.verify

CLASSES = {rule.__name__.lower(): rule for rule in fuseopt.rules.ALL}


def frozen_names(model, patterns):
    """The parameters that match a pattern, as a shell matches; raises ValueError for one without a match."""
    names = [name for name, _ in model.named_parameters()]
    frozen = set()
    for pattern in [] if patterns == ["none"] else patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise ValueError(f"--freeze {pattern} matches no parameter; their names are: {', '.join(names)}")
        frozen.update(matches)
    if len(frozen) == len(names):
        raise ValueError(f"--freeze {' '.join(patterns)} leaves no parameter to train")
    return frozen


def prune_schedule(options, steps):
    """fuseopt.Prune for a run of `steps` steps, or None; raises ValueError if it would fall short."""
    if options.sparsity == 0:
        return None
    every = options.prune_every
    if every < 1:
        raise ValueError(f"--prune_every must be 1 or more, found {every}")
    begin = max(1, steps // 4) if options.prune_begin is None else options.prune_begin
    end = options.prune_end
    if end is None:
        end = begin + max(0, steps * 3 // 4 - begin) // every * every
    if not 1 <= begin <= end <= steps:
        raise ValueError(f"pruning must begin and end within the {steps} steps, found {begin} to {end}")
    if (end - begin) % every:
        raise ValueError(
            f"--prune_end {end} is not a whole number of --prune_every {every} after step {begin}"
        )
    if end == begin:
        return fuseopt.Prune(options.sparsity, begin=begin)
    return fuseopt.Prune(options.sparsity, begin=begin, end=end, every=every)


def build_optimizer(model, options, args, prune, max_grad_norm):
    """The fused optimizer of `options` over `model`; raises the optimizer's ValueError for a bad value.

    Three groups: matrices (decayed, pruned), vectors (biases: neither), and the frozen parameters, which
    stay as they are even with decay, and do not count as prunable.
    """
    frozen = frozen_names(model, options.freeze)
    groups = {"matrices": [], "vectors": [], "frozen": []}
    for name, p in model.named_parameters():
        groups["frozen" if name in frozen else "matrices" if p.ndim > 1 else "vectors"].append((name, p))
    extras = {"matrices": {}, "vectors": {"weight_decay": 0.0, "l1": 0.0}, "frozen": {"prune": None}}
    ema = fuseopt.EMA(options.ema_decay, None if options.ema_warmup == "none" else options.ema_warmup)
    optimizer = CLASSES[options.optimizer](
        [{"params": members, **extras[key]} for key, members in groups.items() if members],
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        max_grad_norm=max_grad_norm or None,
        l1=options.l1,
        ema=ema if options.ema_decay else None,
        prune=prune,
        backend=options.backend,
        **_rule_options(options, args),
    )
    for _, p in groups["frozen"]:
        optimizer.mask(p, torch.zeros([1] * p.ndim, dtype=torch.bool, device=p.device))
    return optimizer


def _rule_options(options, args):
    if options.optimizer in ("adamw", "adam", "nadam"):
        return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return {"momentum": options.momentum} if options.optimizer == "sgd" else {}


def prunable(optimizer):
    """The parameters whose entries the sparsity counts."""
    groups = [group for group in optimizer.param_groups if group["prune"] is not None]
    return [p for group in groups for p in group["params"] if p.ndim > 1 and p.is_floating_point()]


def sparsity(parameters):
    """Share of zero entries, from 0 to 1; 0 for no parameters."""
    total = sum(p.numel() for p in parameters)
    return sum(int((p == 0).sum()) for p in parameters) / total if total else 0.0


class FusedTrainer(Trainer):
    """Evaluates raw and EMA weights, logs the sparsity, verifies steps, and stops cleanly on Ctrl-C."""

    def __init__(self, run):
        self.fused = run.optimizer
        self._verification = _Verification(run.optimizer, run.options.verify_every)
        self._interruption = _Interruption()
        super().__init__(
            run.model,
            run.args,
            train_dataset=run.data.train,
            eval_dataset=run.data.test,
            compute_metrics=_accuracy,
            optimizers=(run.optimizer, None),
            callbacks=[self._verification, self._interruption, _EvaluateBeforePruning(run.optimizer)],
        )
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(_Progress)

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
        return super().train(resume_from_checkpoint)

    def evaluate(self, *args, **kwargs):
        """Metrics of the raw weights as eval_*, of the EMA as ema_*; leaves the random numbers alone."""
        with torch.random.fork_rng():
            metrics = super().evaluate(*args, **kwargs)
            if self.fused.param_groups[0]["ema"]:
                with self.fused.swap_ema():
                    metrics |= super().evaluate(*args, **{**kwargs, "metric_key_prefix": "ema"})
        return metrics

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs["sparsity"] = sparsity(prunable(self.fused))
        super().log(logs, *args, **kwargs)


def _accuracy(prediction):
    return {"accuracy": accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1))}


class _Verification(TrainerCallback):
    """Attaches fuseopt.verify once a checkpoint's state is in place."""

    def __init__(self, optimizer, every):
        self.optimizer, self.every, self.checker = optimizer, every, None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.every:
            self.checker = fuseopt.verify.attach(self.optimizer, every=self.every)

    def on_train_end(self, args, state, control, **kwargs):
        if self.checker:
            self.checker.detach()

    def report(self):
        return self.checker.report() if self.checker else None


class _Interruption(TrainerCallback):
    """The first Ctrl-C finishes the step, saves a checkpoint and stops; a second one stops at once."""

    requested = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGINT, self._request)

    def _request(self, *_):
        self.requested = True
        signal.signal(signal.SIGINT, self.previous)

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save here, not at the step: an evaluation that is due at the end of the epoch then comes first."""
        if self.requested:
            control.should_save = True
            control.should_evaluate = control.should_evaluate and state.epoch == round(state.epoch)

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.previous)


class _EvaluateBeforePruning(TrainerCallback):
    """Asks for an evaluation just before the first step that prunes."""

    def __init__(self, optimizer):
        begins = [group["prune"]["begin"] for group in optimizer.param_groups if group["prune"] is not None]
        self.last_dense_step = min(begins) - 1 if begins else None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last_dense_step:
            control.should_evaluate = True


class _Progress(ProgressCallback):
    """One progress bar; the numbers stand at its end and not on lines of their own."""

    def on_prediction_step(self, *args, **kwargs):
        pass

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {"loss": "loss", "sparsity": "sparsity", "eval_accuracy": "raw", "ema_accuracy": "ema"}
        if self.training_bar is not None:
            self.numbers = getattr(self, "numbers", {}) | {
                shown[k]: f"{v:.3f}" for k, v in logs.items() if k in shown
            }
            self.training_bar.set_postfix(self.numbers)
