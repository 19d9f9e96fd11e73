"""What watches a run: the verification, Ctrl-C, an evaluation before pruning, times, the progress bar, the log."""

import collections
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import ProgressCallback, TrainerCallback

import fuseopt.verify
from fuseopt.finetune.stages import pruning
from fuseopt.finetune.table import spread

KEPT_STEPS = 10_000  # the newest, of which the medians of times are taken


class Verification(TrainerCallback):
    """Attaches fuseopt.verify to the optimizer once a checkpoint's state is in place. every: 0 for never."""

    def __init__(self, optimizer, every):
        self.optimizer, self.every, self.checker = optimizer, every, None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.every:
            self.checker = fuseopt.verify.attach(self.optimizer, every=self.every)

    def on_train_end(self, args, state, control, **kwargs):
        if self.checker:
            self.checker.detach()

    def report(self):
        """The report over the steps of this process; None where no step was to be verified."""
        return self.checker.report() if self.checker else None


class Interruption(TrainerCallback):
    """The first Ctrl-C finishes the step, saves a checkpoint and stops; a second one stops at once."""

    requested = False

    def __enter__(self):
        self.previous = signal.signal(signal.SIGINT, self._request)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)

    def _request(self, *_):
        self.requested = True
        signal.signal(signal.SIGINT, self.previous)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # the signal reaches the processes at different steps
            flag = torch.tensor(int(self.requested), device=args.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.requested = bool(flag)
        if self.requested:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save here, not at the step: an evaluation that is due at the end of the epoch then comes first."""
        if self.requested:
            control.should_save = True
            control.should_evaluate = control.should_evaluate and state.epoch == round(state.epoch)


class EvaluateBeforePruning(TrainerCallback):
    """Asks for an evaluation just before the first step that prunes."""

    def __init__(self, optimizer):
        prune = pruning(optimizer)
        self.last_dense_step = prune["begin"] - 1 if prune else None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last_dense_step:
            control.should_evaluate = True


class StepTimes(TrainerCallback):
    """Times every training step (forward, backward, optimizer; not the loading of data) and every optimizer step.

    On a GPU with CUDA events, which do not wait for it.
    """

    def __init__(self):
        self.steps = collections.deque(maxlen=KEPT_STEPS)  # (begin, optimizer begins, optimizer ends, end)
        self.marks, self.count, self.seconds, self.begin = [], 0, 0.0, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_gpu, self.begin = args.device.type == "cuda", time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.marks = [self._now()]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.marks.append(self._now())

    on_optimizer_step = on_pre_optimizer_step

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append([*self.marks, self._now()])
        self.count += 1

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.begin

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, first, last):
        if not self.on_gpu:
            return [(marks[last] - marks[first]) * 1e3 for marks in self.steps]
        torch.cuda.synchronize()
        return [marks[first].elapsed_time(marks[last]) for marks in self.steps]

    def summary(self):
        """Medians and quartiles in milliseconds (None without a step), steps and seconds of this process."""
        timed = len(self.steps) > 0
        return {
            "train_step_ms": spread(self._milliseconds(0, 3), "median") if timed else None,
            "optimizer_step_ms": spread(self._milliseconds(1, 2), "median") if timed else None,
            "steps": self.count,
            "seconds": self.seconds,
        }


class Progress(ProgressCallback):
    """One progress bar; the numbers stand at its end and not on lines of their own."""

    SHOWN = {"loss": "loss", "sparsity": "zeros", "eval_accuracy": "accuracy", "average_accuracy": "average"}

    def on_prediction_step(self, *args, **kwargs):
        pass

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            new = {self.SHOWN[key]: f"{value:.3f}" for key, value in logs.items() if key in self.SHOWN}
            self.numbers = getattr(self, "numbers", {}) | new
            self.training_bar.set_postfix(self.numbers)


class Log(TrainerCallback):
    """Writes what is logged to log.txt as it comes, a line each; a run that goes on appends to it."""

    def __init__(self, head):
        self.head = head

    def on_train_begin(self, args, state, control, **kwargs):
        self._write(args, state, self.head, f"begins at step {state.global_step} of {state.max_steps}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = (f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items() if k != "epoch")
        self._write(args, state, f"step {state.global_step}  epoch {state.epoch or 0:.2f}  {'  '.join(numbers)}")

    def _write(self, args, state, *lines):
        if not state.is_world_process_zero:
            return
        try:
            with open(Path(args.output_dir) / "log.txt", "a", encoding="utf-8") as file:
                file.writelines(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n" for line in lines)
        except OSError as error:  # a full disk names no file
            raise OSError(f"--output_dir {args.output_dir}: log.txt cannot be written: {error.strerror}") from error
