"""fuseopt.integrations.lightning: evaluation on the average in either copy of Lightning."""

import importlib
import pickle
import sys

import pytest
import torch
from torch import nn
from weights import average, same, weights

import fuseopt

EMA = {"ema": fuseopt.EMA(0.5)}


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request, tmp_path, monkeypatch):
    """Either copy of Lightning, in a folder of its own, with the callback that belongs to it."""
    library = pytest.importorskip(request.param)
    monkeypatch.chdir(tmp_path)
    for other in ("lightning.pytorch", "pytorch_lightning"):
        if other != request.param:
            monkeypatch.delitem(sys.modules, other, raising=False)
    monkeypatch.delitem(sys.modules, "fuseopt.integrations.lightning", raising=False)
    library.EvaluateAverage = importlib.import_module("fuseopt.integrations.lightning").EvaluateAverage
    assert issubclass(library.EvaluateAverage, library.Callback)
    yield library
    del library.EvaluateAverage


def lightning_run(pl, callbacks, fit=True, cls=fuseopt.AdamW, fail_at=None, sanity=2, checkpointing=False, **options):
    """(module, trainer) of two epochs, with an evaluation after each; `seen` holds the weights of evaluations."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.line, self.seen, self.statistics = nn.Linear(1, 1), [], []

        def training_step(self, batch, _):
            return ((self.line(batch) - 3) ** 2).mean()

        def on_train_batch_end(self, *_):
            if self.optimizers().defaults.get("statistics"):
                self.statistics.append(self.optimizers().statistics()["grad_norm"])

        def validation_step(self, batch, _):
            self.seen.append(weights(self))
            self.log("step", float(self.trainer.global_step))
            if fail_at is not None and self.trainer.global_step == fail_at:
                raise ArithmeticError("planted")

        def test_step(self, *_):
            self.seen.append(weights(self))

        def predict_step(self, *_):
            self.seen.append(weights(self))

        def configure_optimizers(self):
            return cls(self.parameters(), lr=0.1, **options)

    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, enable_checkpointing=checkpointing, gradient_clip_val=1.0,
        num_sanity_val_steps=sanity,
    )  # fmt: skip
    module = Module()
    if fit:
        trainer.fit(module, *loaders())
    return module, trainer


def loaders():
    return torch.utils.data.DataLoader(torch.ones(8, 1), 4), torch.utils.data.DataLoader(torch.ones(2, 1), 2)


def test_lightning_evaluates_on_the_average_and_goes_on_from_its_own(pl):
    module, trainer = lightning_run(pl, [pl.EvaluateAverage()], **EMA)
    plain, _ = lightning_run(pl, [], **EMA)
    assert same(module.parameters(), plain.parameters())
    assert len(module.seen) == len(plain.seen) == 3
    assert same(module.seen[0], plain.seen[0])  # the sanity check: there is no average yet
    assert not same(module.seen[1], plain.seen[1])
    assert same(module.seen[2], average(trainer.optimizers[0]))


def test_lightning_tests_and_predicts_on_the_average(pl):
    module, trainer = lightning_run(pl, [pl.EvaluateAverage()], **EMA)
    own = weights(module)
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        evaluate(module, loaders()[1])
        assert same(module.seen[-1], average(trainer.optimizers[0]))
        assert same(module.parameters(), own)


def test_lightning_without_fit_leaves_the_weights_alone(pl):
    module, trainer = lightning_run(pl, [pl.EvaluateAverage()], fit=False, **EMA)
    trainer.validate(module, loaders()[1])
    assert same(module.seen[0], module.parameters())


def test_lightnings_callback_is_picklable(pl):
    assert pickle.loads(pickle.dumps(pl.EvaluateAverage(k=1, save_average=True))).k == 1  # as spawned workers take it


def test_lightning_has_its_own_weights_after_a_failed_evaluation(pl):
    module, trainer = lightning_run(pl, [pl.EvaluateAverage()], fit=False, fail_at=2, **EMA)
    with pytest.raises(ArithmeticError, match="planted"):
        trainer.fit(module, *loaders())
    optimizer = trainer.optimizers[0]
    assert same(module.seen[-1], average(optimizer))
    assert not same(module.parameters(), average(optimizer)) and not optimizer._swapped


def test_a_swap_through_lightnings_wrapper_is_the_optimizers(pl):
    """self.optimizers() of a module gives the wrapper, whose step() is the optimizer's."""
    module, trainer = lightning_run(pl, [], **EMA)
    optimizer = trainer.optimizers[0]
    wrapper = trainer.strategy._lightning_optimizers[0]
    assert wrapper is not optimizer
    for one, other in ((wrapper, optimizer), (optimizer, wrapper)):
        with one.swap_ema():
            with pytest.raises(RuntimeError, match="inside swap_ema"):
                optimizer.step()
            with pytest.raises(RuntimeError, match="inside swap_ema"):
                with other.swap_ema():
                    pass


@pytest.mark.parametrize("save_average", [False, True])
def test_lightnings_best_checkpoint_is_own_weights(pl, save_average, tmp_path):
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="step", mode="min")  # the first evaluation is "best"
    module, trainer = lightning_run(
        pl, [best, pl.EvaluateAverage(save_average=save_average)], checkpointing=True, **EMA
    )
    saved = torch.load(best.best_model_path, weights_only=True)
    own = list(saved["state_dict"].values())
    assert not same(own, module.seen[1])
    assert ("average_state_dict" in saved) == save_average
    if save_average:
        assert same(saved["average_state_dict"].values(), module.seen[1])
    trainer.test(module, loaders()[1], ckpt_path="best", verbose=False)  # its averages are not loaded
    assert same(module.seen[-1], own)
    trainer.test(module, loaders()[1], verbose=False)
    assert same(module.seen[-1], own)


def test_lightning_resumes_with_the_averages(pl, tmp_path):
    last = pl.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    whole, trainer = lightning_run(pl, [pl.EvaluateAverage(), last], checkpointing=True, **EMA)
    module, resumed = lightning_run(pl, [pl.EvaluateAverage()], fit=False, **EMA)
    resumed.fit(module, *loaders(), ckpt_path=str(tmp_path / "epoch=0-step=2.ckpt"), weights_only=True)
    assert same(module.parameters(), whole.parameters())
    assert same(average(resumed.optimizers[0]), average(trainer.optimizers[0]))
    assert same(module.seen[-1], whole.seen[-1])


@pytest.mark.parametrize("options", [{}, {"cls": torch.optim.AdamW}])
def test_lightning_refuses_at_the_start_what_has_no_average(pl, options):
    module, trainer = lightning_run(pl, [pl.EvaluateAverage()], fit=False, sanity=0, **options)
    with pytest.raises(ValueError, match="no optimizer keeps an average 0 to evaluate on: pass ema=fuseopt.EMA"):
        trainer.fit(module, *loaders())
    assert trainer.global_step == 0


def test_lightnings_wrapper_gives_the_statistics_of_the_step(pl):
    module, trainer = lightning_run(pl, [], statistics=True)
    assert len(module.statistics) == 4 and module.statistics[-1] == trainer.optimizers[0].statistics()["grad_norm"]
    assert module.optimizers().explain().bytes_per_step == trainer.optimizers[0].explain().bytes_per_step > 0
