"""fuseopt.integrations.transformers: evaluation on the average in Hugging Face's Trainer."""

import importlib

import pytest
import torch
from torch import nn
from weights import average, same, weights

import fuseopt
from fuseopt.integrations import unwrap

pytestmark = pytest.mark.usefixtures("accelerate_afresh")


class Line(nn.Module):
    """y = a x + b, which tells a recorder the weights that it runs with in eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.seen = nn.Linear(1, 1), []

    def forward(self, x, labels=None):
        if not self.training:
            self.seen.append(weights(self))
        y = self.line(x)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


def hf_trainer(folder, cls=fuseopt.AdamW, callback=None, metrics=None, evals=None, **more):
    """(trainer, its EvaluateAverage) that evaluates every second of six steps."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    module = importlib.import_module("fuseopt.integrations.transformers")
    rows = [{"x": torch.tensor([k / 8]), "labels": torch.tensor([3 - k / 8])} for k in range(8)]
    options = dict(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=0.1, eval_strategy="steps",
        eval_steps=2, save_steps=2, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    args = transformers.TrainingArguments(**options | more)
    extra = {"ema": fuseopt.EMA(0.5)} if cls is fuseopt.AdamW else {}
    trainer = transformers.Trainer(
        Line(), args, train_dataset=rows, eval_dataset=evals or rows, compute_metrics=metrics,
        optimizer_cls_and_kwargs=(cls, {"lr": 0.1, **extra}),
    )  # fmt: skip
    callback = module.EvaluateAverage(trainer, **callback or {})
    trainer.add_callback(callback)
    return trainer, callback


def test_trainer_evaluates_on_the_average_and_goes_on_from_its_own(tmp_path):
    trainer, callback = hf_trainer(tmp_path / "on")
    trainer.train()
    plain, plain_callback = hf_trainer(tmp_path / "off")
    plain.remove_callback(plain_callback)  # which must not stay half active
    plain.train()
    assert same(trainer.model.parameters(), plain.model.parameters())
    averaged, own = trainer.model.seen, plain.model.seen
    assert len(averaged) == len(own) == 3
    for step, (a, b) in enumerate(zip(averaged, own, strict=True)):
        assert not same(a, b), step
    assert same(averaged[-1], average(unwrap(trainer.optimizer)))
    assert same(own[-1], plain.model.parameters())


def test_trainer_predicts_on_the_average_after_training(tmp_path):
    trainer, _ = hf_trainer(tmp_path)
    trainer.train()
    before = weights(trainer.model)
    trainer.predict(trainer.eval_dataset)
    assert same(trainer.model.seen[-1], average(unwrap(trainer.optimizer)))
    assert same(trainer.model.parameters(), before)


def test_trainer_evaluates_several_sets_on_the_average(tmp_path):
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}]
    trainer, _ = hf_trainer(tmp_path, evals={"a": rows, "b": rows}, eval_steps=6)
    trainer.train()
    assert len(trainer.model.seen) == 2
    assert all(same(seen, average(unwrap(trainer.optimizer))) for seen in trainer.model.seen)


@pytest.mark.parametrize("eval_on_start", [True, False])
def test_trainer_before_the_first_step_evaluates_its_own_weights(tmp_path, eval_on_start):
    trainer, _ = hf_trainer(tmp_path, eval_on_start=eval_on_start)
    start = weights(trainer.model)
    if eval_on_start:
        trainer.train()
    else:
        trainer.evaluate()
    assert same(trainer.model.seen[0], start)


def test_trainer_has_its_own_weights_after_a_failed_evaluation(tmp_path):
    failed = []

    def metrics(_):
        if not failed:
            failed.append(weights(trainer.model))
            raise ArithmeticError("planted")
        return {}

    trainer, _ = hf_trainer(tmp_path, metrics=metrics)
    with pytest.raises(ArithmeticError, match="planted") as held:
        trainer.train()
    optimizer = unwrap(trainer.optimizer)
    assert held.tb  # it keeps the frames alive: the swap was left, not collected as garbage
    assert same(failed[0], average(optimizer))  # it failed inside
    assert not optimizer._swapped and not same(trainer.model.parameters(), average(optimizer))
    trainer.train()  # and goes on
    assert len(trainer.model.seen) > 3


def test_trainer_leaves_a_swap_of_the_users_own_alone(tmp_path):
    trainer, _ = hf_trainer(tmp_path)
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    with optimizer.swap_ema():
        trainer.evaluate()
        assert same(trainer.model.parameters(), average(optimizer))
    assert not same(trainer.model.parameters(), average(optimizer))


def test_trainers_best_checkpoint_is_own_weights_and_the_average_beside(tmp_path):
    from safetensors.torch import load_file

    trainer, _ = hf_trainer(
        tmp_path, callback={"save_average": True}, load_best_model_at_end=True, metric_for_best_model="step",
        greater_is_better=False, metrics=lambda _: {"step": trainer.state.global_step},
    )  # fmt: skip
    trainer.train()  # the first evaluation is the "best" one
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    files = (load_file(folder / "model.safetensors") for folder in (best, best / "average"))
    own, averaged = ([saved[name] for name, _ in trainer.model.named_parameters()] for saved in files)
    assert same(averaged, trainer.model.seen[0]) and not same(own, averaged)
    assert same(own, trainer.model.parameters())
    trainer.evaluate()  # the averages in the optimizer are those of step 6: leave the best weights alone
    assert same(trainer.model.seen[-1], own)


@pytest.mark.parametrize("cls, callback", [(torch.optim.AdamW, {}), (fuseopt.AdamW, {"k": 1}), (fuseopt.SGD, {})])
def test_trainer_refuses_at_the_start_what_has_no_average(tmp_path, cls, callback):
    trainer, _ = hf_trainer(tmp_path, cls, callback)
    start = weights(trainer.model)
    with pytest.raises(ValueError, match="no optimizer keeps an average . to evaluate on: pass ema=fuseopt.EMA"):
        trainer.train()
    assert same(trainer.model.parameters(), start)
