"""Every script of examples/ runs, trains as torch's optimizer does, and resumes where it says so."""

import os
import re
import runpy
from pathlib import Path

import pytest
import torch

from fuseopt.integrations import unwrap
from fuseopt.stages.statistics import NAMES

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; a test that tries fails at once

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
REL = 1e-4  # of each loss over the run, against torch's optimizer

# What a script imports beside torch and fuseopt.
NEEDS = {
    "nanogpt_loop": (),
    "hf_trainer": ("transformers", "accelerate"),
    "hf_accelerate": ("accelerate",),
    "hf_peft": ("transformers", "peft"),
    "hf_trl": ("transformers", "accelerate", "datasets", "trl"),
    "lightning_ema": ("lightning",),
    "tensorboard": ("tensorboard",),
}

# The losses of a script's run with another optimizer.
LOSSES = {
    "nanogpt_loop": lambda script, cls: script["train"](cls),
    "hf_trainer": lambda script, cls: script["train"](script["by_class"]("by_class", cls)),
    "hf_accelerate": lambda script, cls: script["train"](cls),
    "hf_peft": lambda script, cls: script["train"](cls)[2],
    "hf_trl": lambda script, cls: script["train"](script["make_trainer"]("trl", cls)),
    "lightning_ema": lambda script, cls: script["train"](optimizer_class=cls)[0].losses,
    "tensorboard": lambda script, cls: script["train"](cls),
}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch, accelerate_afresh):
    """A folder of its own, and the seeds as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets them
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    with torch.random.fork_rng():
        yield


def load(name, run_name="loaded"):
    """The names that a script defines; with "__main__", after it has run."""
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{name}.py needs {package}")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=run_name)


def assert_same(ours, theirs):
    assert ours == pytest.approx(theirs, rel=REL)
    assert abs(theirs[-1] - theirs[0]) > 100 * REL * theirs[0]  # the optimizer was at work


def test_every_script_is_tested():
    elsewhere = {"fsdp2"}  # test_engines.py: it needs several processes
    assert {path.stem for path in EXAMPLES.glob("*.py")} - elsewhere == set(NEEDS) == set(LOSSES)


@pytest.mark.parametrize("name", NEEDS)
def test_runs_and_trains_as_torch(name, capsys):
    script = load(name, "__main__")
    said = re.search(r"loss ([\d.]+) -> ([\d.]+)", capsys.readouterr().out)
    assert said and float(said[2]) < float(said[1])
    assert_same(script["losses"], LOSSES[name](script, torch.optim.AdamW))


def test_trainer_takes_an_instance():
    script = load("hf_trainer")
    ours = script["train"](script["by_instance"]("ours"))
    assert_same(ours, script["train"](script["by_instance"]("theirs", torch.optim.AdamW)))


def test_trainer_makes_its_own_groups():
    trainer = load("hf_trainer")["by_class"]("run")
    decayed, others = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {p: name for name, p in trainer.model.named_parameters()}
    assert others["params"] and all("norm" in names[p] for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize("way", ["by_class", "by_instance"])
def test_trainer_resumes(way):
    script = load("hf_trainer")
    ema = script["fuseopt"].EMA(0.9)
    whole = script[way]("run", ema=ema)
    losses = script["train"](whole)
    resumed = script[way]("again", ema=ema)
    assert script["train"](resumed, "run/checkpoint-6") == losses
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    assert_same_state(resumed.optimizer, whole.optimizer)


def assert_same_state(a, b):
    """Bit for bit, averages included."""
    a, b = a.state_dict()["state"], b.state_dict()["state"]
    assert a.keys() == b.keys() and all("ema_0" in state for state in a.values())
    for k in a:
        assert a[k].keys() == b[k].keys()
        assert all(torch.equal(a[k][key], b[k][key]) for key in a[k])


@pytest.mark.parametrize("first, then", [("torch", "fuseopt"), ("fuseopt", "torch")])
def test_trainer_resumes_from_the_other_optimizers_checkpoint(first, then):
    script = load("hf_trainer")
    classes = {"torch": torch.optim.AdamW, "fuseopt": script["fuseopt"].AdamW}
    losses = script["train"](script["by_class"]("run", classes[first]))
    assert_same(script["train"](script["by_class"]("again", classes[then]), "run/checkpoint-6"), losses)


def test_accelerate_resumes():
    train = load("hf_accelerate")["train"]
    losses = train(folder="state")
    assert train(folder="state", resume=True) == losses[len(losses) // 2 :]


def test_nanogpt_loop_resumes():
    train = load("nanogpt_loop")["train"]
    losses = train(checkpoint="half.pt")
    assert train(checkpoint="half.pt", resume=True) == losses[len(losses) // 2 :]


def test_nanogpt_loop_with_a_gradient_scaler():
    train = load("nanogpt_loop")["train"]
    assert_same(train(scale=True), train(torch.optim.AdamW, scale=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16 with a scaler"])
def test_lightning_clips_in_mixed_precision(precision):
    """Lightning refuses gradient_clip_val where an optimizer tells it that it unscales by itself."""
    script = load("lightning_ema")
    lightning = script["L"]

    def trainer(**options):
        if precision == "bf16-mixed":
            return lightning.Trainer(precision=precision, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18)  # so high that steps are skipped
        plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        return lightning.Trainer(plugins=[plugin], **options)

    ours, theirs = (
        script["train"](optimizer_class=cls, trainer=trainer)[0].losses
        for cls in (script["fuseopt"].AdamW, torch.optim.AdamW)
    )
    assert_same(ours, theirs)


def test_trl_evaluates_on_the_average():
    script = load("hf_trl", "__main__")
    trainer, optimizer = script["trainer"], unwrap(script["trainer"].optimizer)
    averaged = trainer.evaluate()["eval_loss"]
    trainer.remove_callback(script["EvaluateAverage"])
    own = trainer.evaluate()["eval_loss"]
    with optimizer.swap_ema():
        assert trainer.evaluate()["eval_loss"] == averaged != own


def test_peft_saves_the_average():
    script = load("hf_peft", "__main__")
    own = script["evaluate"](script["model"])
    assert script["loaded"] == script["averaged"] != own


def test_peft_steps_and_averages_adapters_alone():
    script = load("hf_peft")
    model, optimizer, _ = script["train"](ema=script["fuseopt"].EMA(0.8))
    stepped = [name for name, p in model.named_parameters() if p in optimizer.state]
    assert stepped and all("lora_" in name for name in stepped)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with optimizer.swap_ema():
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == stepped


def test_tensorboard_has_the_statistics():
    script = load("tensorboard", "__main__")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("runs/loop").Reload()
    logged = {name: [event.step for event in events.Scalars(f"optimizer/{name}")] for name in NAMES}
    assert logged == dict.fromkeys(NAMES, [10, 20, 30, 40])
    assert events.Scalars("optimizer/bytes_per_step")[0].value > 0 < events.Scalars("optimizer/step_seconds")[0].value
    assert events.Tags()["tensors"] and len(script["losses"]) == 40


def test_trainer_logs_the_statistics():
    script, hf = load("tensorboard"), load("hf_trainer")
    arguments = hf["arguments"]("run", max_steps=2, save_strategy="no", eval_strategy="no")
    trainer = script["trainer_with_statistics"](
        hf["small_model"](), arguments, train_dataset=hf["sequences"](16, 1),
        optimizer_cls_and_kwargs=(script["fuseopt"].AdamW, {"lr": 1e-3, "statistics": True}),
    )  # fmt: skip
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["optimizer/update_norm"] > 0 for entry in steps] == [False, True]  # warm-up begins with a rate of 0
