"""`fuseopt finetune` end to end: outputs, resuming bit for bit, every optimizer."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors"):
    pytest.importorskip(extra)

import numpy as np
from safetensors.torch import load_file

from fuseopt.__main__ import main
from fuseopt.finetune import pretrain, train
from fuseopt.finetune.data import embedded_digits
from fuseopt.finetune.model import EMBEDDED, DigitNet

SHORT = ["--max_steps", "24", "--prune_begin", "5", "--prune_end", "17", "--prune_every", "4", "--eval_steps", "6", "--save_steps", "8", "--logging_steps", "3", "--compare_steps", "0", "--verify_every", "6", "--disable_tqdm", "true"]
OUTPUTS = {
    "model.safetensors",
    "model_ema.safetensors",
    "metrics.json",
    "classification_report.txt",
    "verification.txt",
    "plot.png",
}


def finetune(folder, *extra):
    return main(["finetune", *SHORT, "--output_dir", str(folder), *map(str, extra)])


def same_bits(first, second):
    for name in ("model.safetensors", "model_ema.safetensors"):
        left, right = load_file(first / name), load_file(second / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key].view(torch.int32), right[key].view(torch.int32)), (name, key)


def steps_with(folder, key):
    return [row["step"] for row in json.loads((folder / "metrics.json").read_text())["curves"] if key in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, shared by the tests that read its files."""
    folder = tmp_path_factory.mktemp("finetune") / "whole"
    assert finetune(folder) == 0
    return folder


def test_writes_every_output_and_no_scraps(whole):
    files = {path.name for path in whole.iterdir() if path.is_file()}
    assert files == OUTPUTS | {"options.json"}
    assert not list(whole.glob(".writing-*"))
    assert (whole / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_say_what_the_weights_are(whole):
    metrics = json.loads((whole / "metrics.json").read_text())
    counts = metrics["sparsity"]
    raw, averaged = load_file(whole / "model.safetensors"), load_file(whole / "model_ema.safetensors")
    prunable = [name for name, p in raw.items() if p.ndim > 1 and not name.startswith("stem.")]
    assert counts["prunable"] == sum(raw[name].numel() for name in prunable)
    assert counts["asked"] == counts["pruned"] == counts["raw_zeros"] == counts["ema_zeros"]
    assert counts["asked"] == round(0.8 * counts["prunable"])
    for name in prunable:
        assert not averaged[name][raw[name] == 0].any()
    assert metrics["frozen"]["changed"] == 0 and metrics["verification"]["passed"]
    assert {"raw", "ema", "raw_before_pruning", "ema_before_pruning"} <= metrics["accuracy"].keys()
    assert steps_with(whole, "loss") == list(range(3, 25, 3))


def test_frozen_stem_keeps_its_pretrained_bits(whole):
    before, after = load_file(EMBEDDED), load_file(whole / "model.safetensors")
    stem = [name for name in before if name.startswith("stem.")]
    assert stem
    for name in stem:
        assert torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)), name


def test_same_command_same_bits(whole, tmp_path):
    assert finetune(tmp_path / "again", "--verify_every", 0) == 0
    same_bits(whole, tmp_path / "again")


# Inside an epoch, where a checkpoint is due anyway, at the end of an epoch, at the last step.
@pytest.mark.parametrize("step", [4, 8, 21, 24])
def test_interrupted_and_resumed_ends_with_the_same_bits(whole, tmp_path, monkeypatch, capsys, step):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(train._Interruption, "on_step_begin", interrupt)
        assert finetune(folder) == 130
    line = capsys.readouterr().err.strip()
    assert f"checkpoint-{step};" in line and "--resume_from_checkpoint" in line and "\n" not in line
    assert not OUTPUTS & {path.name for path in folder.iterdir()}
    assert finetune(folder, "--resume_from_checkpoint") == 0
    same_bits(whole, folder)
    for key in ("loss", "eval_accuracy", "ema_accuracy", "sparsity"):
        assert steps_with(whole, key) == steps_with(folder, key), key


def test_resumes_from_the_last_whole_checkpoint(whole, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    newest = folder / "checkpoint-24" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert finetune(folder, "--resume_from_checkpoint") == 0
    same_bits(whole, folder)


def test_a_real_interrupt_of_a_real_process(tmp_path):
    options = ["--max_steps", "120", "--save_steps", "10", "--compare_steps", "0", "--verify_every", "50", "--output_dir"]
    command = [sys.executable, "-m", "fuseopt", "finetune", *options]
    pipes = dict(stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "stopped"
    with subprocess.Popen([*command, folder], stdout=subprocess.DEVNULL, **pipes) as process:
        while not list(folder.glob("checkpoint-*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert not (folder / "checkpoint-120").exists()
    for rest in ([folder, "--resume_from_checkpoint"], [tmp_path / "straight"]):
        done = subprocess.run([*command, *rest], stdout=subprocess.DEVNULL, **pipes)
        assert done.returncode == 0 and "arning" not in done.stderr, done.stderr
    same_bits(folder, tmp_path / "straight")


@pytest.mark.parametrize("optimizer", sorted(set(train.CLASSES) - {"adamw"}))
def test_every_optimizer(tmp_path, optimizer):
    rate = {"sgd": 0.01, "adagrad": 0.01, "lion": 1e-4}.get(optimizer, 1e-3)
    assert (
        finetune(tmp_path / "run", "--optimizer", optimizer, "--learning_rate", rate, "--compare_steps", 3)
        == 0
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["sparsity"]["raw_zeros"] == metrics["sparsity"]["asked"]
    assert ("ratio" in metrics["step"]) == (optimizer != "lion"), metrics["step"]


def test_a_failed_verification_is_the_exit_status(tmp_path, monkeypatch, capsys):
    class Failed:
        passed, rows = False, []

        def report(self):
            return self

        def detach(self):
            pass

        def __str__(self):
            return "FAIL"

    monkeypatch.setattr("fuseopt.verify.attach", lambda optimizer, every: Failed())
    assert finetune(tmp_path / "run") == 1
    assert "FAIL" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["verification"]["passed"] is False


def test_stages_off(tmp_path):
    off = (
        ["--sparsity", "0", "--ema_decay", "0", "--freeze", "none", "--max_grad_norm", "0", "--weight_decay", "0", "--verify_every", "0"]
    )
    assert finetune(tmp_path / "run", *off) == 0
    files = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert files == OUTPUTS - {"model_ema.safetensors", "verification.txt"} | {"options.json"}


def test_own_images_and_own_weights(whole, tmp_path):
    """Images of another size, two classes, starting from the model of an earlier run."""
    generator = np.random.default_rng(0)
    labels = np.repeat([3, 8], 20)
    images = generator.integers(0, 50, (40, 12, 10)) + 100 * (labels == 8)[:, None, None]
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    start = whole / "model.safetensors"
    assert finetune(tmp_path / "run", "--data", tmp_path / "images.npz", "--pretrained", start) == 0
    assert load_file(tmp_path / "run" / "model.safetensors")["head.weight"].shape == (2, 128)
    assert "8" in (tmp_path / "run" / "classification_report.txt").read_text()


def test_overwrite_replaces_the_run_and_keeps_other_files(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "notes.txt").write_text("mine")
    assert finetune(folder, "--overwrite") == 0
    same_bits(whole, folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_embedded_checkpoint_knows_the_digits_0_to_4():
    assert EMBEDDED.stat().st_size < 1_000_000
    saved, expected = load_file(EMBEDDED), DigitNet(5).state_dict()
    assert {name: p.shape for name, p in saved.items()} == {name: p.shape for name, p in expected.items()}
    model = DigitNet(5).eval()
    model.load_state_dict(saved)
    test = embedded_digits(0, 4, seed=0).test
    logits = model(torch.stack([row["images"] for row in test]))["logits"]
    assert (logits.argmax(-1) == torch.tensor([row["labels"] for row in test])).float().mean() > 0.98


def test_pretraining_is_repeatable(tmp_path):
    for name in ("first", "second"):
        pretrain.main(["--epochs", "1", "--out", str(tmp_path / name)])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
