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
import yaml
from safetensors.torch import load_file

from fuseopt.__main__ import main
from fuseopt.finetune import callbacks
from fuseopt.finetune.data import load
from fuseopt.finetune.folder import OUTPUTS
from fuseopt.finetune.models import EMBEDDED
from fuseopt.finetune.options import parse

DIGITS = "--classes 5 6 7 8 9 --learning_rate 0.002 --disable_tqdm true"
STAGES = "--freeze stem.* --average ema --ema_decay 0.98 --sparsity 0.8 --prune_begin 5 --prune_end 17 --prune_every 4"
TIMES = "--max_steps 24 --eval_strategy steps --eval_steps 6 --save_strategy steps --save_steps 8 --logging_steps 3"
SHORT = f"{DIGITS} {STAGES} {TIMES} --verify 6".split()
FILES = set(OUTPUTS) - {"model_int8", "teacher", "tensorboard"}
MODELS = ("model", "model_average")


def finetune(folder, *extra):
    return main(["finetune", *SHORT, "--output_dir", str(folder), *map(str, extra)])


def weights(folder, name="model"):
    return load_file(folder / name / "model.safetensors")


def same_bits(first, second, models=MODELS):
    for name in models:
        left, right = weights(first, name), weights(second, name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key].view(torch.int32), right[key].view(torch.int32)), (name, key)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def steps_with(folder, key):
    return [row["step"] for row in metrics_of(folder)["curves"] if key in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, shared by the tests that read its files."""
    folder = tmp_path_factory.mktemp("finetune") / "whole"
    assert finetune(folder) == 0
    return folder


def test_writes_every_output_and_no_scraps(whole):
    found = {path.name for path in whole.iterdir() if not path.name.startswith("checkpoint-")}
    assert found == FILES
    assert not list(whole.glob(".writing*"))
    for name in ("plot.png", "confusion.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")


def test_metrics_say_what_the_weights_are(whole):
    metrics = metrics_of(whole)
    counts = metrics["sparsity"]
    raw, averaged = weights(whole), weights(whole, "model_average")
    prunable = [name for name, p in raw.items() if p.ndim > 1 and not name.startswith("stem.")]
    assert counts["prunable"] == sum(raw[name].numel() for name in prunable)
    assert counts["asked"] == counts["pruned"] == counts["raw_zeros"] == counts["average_zeros"]
    assert counts["asked"] == round(0.8 * counts["prunable"])
    for name in prunable:
        assert not averaged[name][raw[name] == 0].any()
    assert metrics["frozen"]["entries"] and metrics["frozen"]["changed"] == 0
    assert metrics["verification"]["passed"]
    assert {"raw", "average", "raw_before_pruning", "average_before_pruning"} <= metrics["accuracy"].keys()
    assert steps_with(whole, "loss") == list(range(3, 25, 3))


def test_the_curves_end_with_the_scores_of_both_sets_of_weights(whole):
    metrics = metrics_of(whole)
    last = {key: value for row in metrics["curves"] if row["step"] == 24 for key, value in row.items()}
    for curve, weights_of in (("eval", "raw"), ("average", "average")):
        assert last[f"{curve}_accuracy"] == metrics["accuracy"][weights_of]
        assert last[f"{curve}_loss"] == pytest.approx(metrics["loss"][weights_of], rel=1e-4)
    assert last["eval_loss"] != pytest.approx(last["average_loss"], rel=1e-3)


def test_frozen_stem_keeps_its_pretrained_bits(whole):
    before, after = load_file(EMBEDDED / "model.safetensors"), weights(whole)
    stem = [name for name in before if name.startswith("stem.")]
    assert stem
    for name in stem:
        assert torch.equal(before[name].view(torch.int32), after[name].view(torch.int32)), name


def test_same_command_same_bits_however_often_it_is_evaluated_logged_and_saved(whole, tmp_path):
    free = ["--verify", 0, "--eval_steps", 5, "--logging_steps", 4, "--save_steps", 7]
    assert finetune(tmp_path / "again", *free) == 0
    same_bits(whole, tmp_path / "again")


def test_the_resolved_configuration_repeats_the_run(whole, tmp_path):
    again = ["--config", str(whole / "config.yaml"), "--output_dir", str(tmp_path / "again"), "--verify", "0"]
    assert main(["finetune", *again]) == 0
    same_bits(whole, tmp_path / "again")
    first, second = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (whole, tmp_path / "again"))
    assert {name for name in first | second if first.get(name) != second.get(name)} == {"output_dir", "verify"}


# Inside an epoch, where a checkpoint is due anyway, at the end of an epoch, at the last step.
@pytest.mark.parametrize("step", [4, 8, 21, 24])
def test_interrupted_and_resumed_ends_with_the_same_bits(whole, tmp_path, monkeypatch, capsys, step):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == step - 1:
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Interruption, "on_step_begin", interrupt)
        assert finetune(folder) == 130
    line = capsys.readouterr().err.strip()
    assert f"checkpoint-{step};" in line and "--resume_from_checkpoint" in line and "\n" not in line
    assert {path.name for path in folder.iterdir() if "checkpoint" not in path.name} == {"config.yaml", "log.txt"}
    assert finetune(folder, "--resume_from_checkpoint") == 0
    same_bits(whole, folder)
    for key in ("loss", "eval_accuracy", "average_accuracy", "sparsity"):
        assert steps_with(whole, key) == steps_with(folder, key), key


# What draws random numbers, or keeps a state of its own beside the optimizer.
TECHNIQUES = {
    "augmentation, from within the second epoch": "--augment shift noise --classes 5 6 --per_device_train_batch_size 70",
    "text and dropout": "--data sentences --dropout 0.3",
    "recurrent": "--model rnn --dropout 0.3",
    "LoRA": "--lora_rank 4 --average ema",
    "plateau": "--schedule plateau --learning_rate 0.05",
    "step and mean": "--schedule step --step_size 3 --average mean --average_start 2 --gradient_accumulation_steps 2",
    "torch's own": "--optimizer torch-sgd",
    "teacher": "--teacher_scale 2 --label_smoothing_factor 0.1",
    "everything pruned again": "--prune_pattern 2:4 --average ema --l1 1e-4 --optimizer nadam",
}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_every_technique_resumes_with_the_same_bits(tmp_path, technique):
    steps = "--max_steps 8 --save_strategy steps --save_steps 5 --eval_strategy steps --eval_steps 2"
    options = f"{TECHNIQUES[technique]} {steps} --disable_tqdm true".split()
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert main(["finetune", *options, "--output_dir", str(straight)]) == 0
    half_way = ["--resume_from_checkpoint", str(straight / "checkpoint-5")]
    assert main(["finetune", *options, "--output_dir", str(resumed), *half_way]) == 0
    models = [name for name in MODELS if (straight / name).exists()]
    same_bits(straight, resumed, models)
    kept = ("loss", "eval_loss", "average_loss", "learning_rate")
    rows = [[{k: row[k] for k in kept if k in row} for row in metrics_of(f)["curves"]] for f in (straight, resumed)]
    assert rows[0] == rows[1]


def test_resumes_from_the_last_whole_checkpoint(whole, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    newest = folder / "checkpoint-24" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert finetune(folder, "--resume_from_checkpoint") == 0
    same_bits(whole, folder)


def test_a_real_interrupt_of_a_real_process(tmp_path):
    options = [*DIGITS.split(), "--max_steps", "120", "--save_strategy", "steps", "--save_steps", "10", "--output_dir"]
    command = [sys.executable, "-m", "fuseopt", "finetune", *options]
    folder = tmp_path / "stopped"
    with subprocess.Popen([*command, folder], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not list(folder.glob("checkpoint-*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and err.startswith("fuseopt finetune: interrupted;") and err.count("\n") == 1, err
    assert not (folder / "checkpoint-120").exists()
    for rest in ([str(folder), "--resume_from_checkpoint"], [str(tmp_path / "straight")]):
        assert main(["finetune", *options, *rest]) == 0
    same_bits(folder, tmp_path / "straight", ["model"])


def test_a_run_that_fails_gives_ctrl_c_back(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(callbacks.Log, "on_log", full)
    assert finetune(tmp_path / "run") == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_fold_names_its_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupt(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(callbacks.Interruption, "on_step_begin", interrupt)
    assert finetune(tmp_path, "--folds", 2) == 130
    line = capsys.readouterr().err
    assert "fold-1" in line and "checkpoint-1;" in line and "--resume_from_checkpoint" in line


def test_a_failed_verification_is_the_exit_status(tmp_path, monkeypatch, capsys):
    class Failed:
        passed, rows, steps = False, [], 1

        def report(self):
            return self

        def detach(self):
            pass

        def __str__(self):
            return "FAIL"

    monkeypatch.setattr("fuseopt.verify.attach", lambda optimizer, every: Failed())
    assert finetune(tmp_path / "run") == 1
    assert "FAIL" in capsys.readouterr().out
    assert metrics_of(tmp_path / "run")["verification"]["passed"] is False


def test_everything_off(tmp_path):
    off = "--max_grad_norm 0 --weight_decay 0 --max_steps 4"
    assert main(["finetune", *f"{DIGITS} {off} --output_dir {tmp_path}/run".split()]) == 0
    found = {path.name for path in (tmp_path / "run").iterdir() if "checkpoint" not in path.name}
    assert found == FILES - {"model_average", "verification.txt"}


def test_own_images_and_own_weights(whole, tmp_path):
    """Images of another size, two classes, starting from the model of an earlier run."""
    generator = np.random.default_rng(0)
    labels = np.repeat([3, 8], 20)
    images = generator.integers(0, 50, (40, 12, 10)) + 100 * (labels == 8)[:, None, None]
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    own = f"--data {tmp_path}/images.npz --pretrained {whole}/model --max_steps 4 --disable_tqdm true"
    assert main(["finetune", *own.split(), "--output_dir", str(tmp_path / "run")]) == 0
    before, after = weights(whole), weights(tmp_path / "run")
    assert after["head.weight"].shape[0] == 2 and before["head.weight"].shape[0] == 5
    assert "8" in (tmp_path / "run" / "report.txt").read_text()


def test_overwrite_replaces_the_run_and_keeps_other_files(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "notes.txt").write_text("mine")
    assert finetune(folder, "--overwrite") == 0
    same_bits(whole, folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_run_that_diverged_says_so(tmp_path, capsys):
    options = f"{DIGITS} --max_steps 4 --save_strategy no --learning_rate 1e30 --output_dir {tmp_path}/run"
    assert main(["finetune", *options.split()]) == 0
    assert "diverged" in capsys.readouterr().out and "diverged" in (tmp_path / "run" / "report.txt").read_text()


def test_a_finished_run_that_is_written_anew_keeps_what_it_found(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    assert finetune(folder, "--resume_from_checkpoint", "--quantize") == 0
    before, after = metrics_of(whole), metrics_of(folder)
    assert before["time"] == after["time"] and before["verification"] == after["verification"]
    assert after["size"]["model_int8"] < after["size"]["model"] / 3
    same_bits(whole, folder)


def test_tensorboard_on_request(tmp_path):
    pytest.importorskip("tensorboard")
    options = f"{DIGITS} --max_steps 4 --logging_steps 2 --save_strategy no --report_to tensorboard"
    assert main(["finetune", *options.split(), "--output_dir", str(tmp_path / "run")]) == 0
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))


def test_a_disk_that_is_full_leaves_no_half_of_a_checkpoint(tmp_path, capsys):
    """A limit on the size of files stands for it: the weights fit, the optimizer's state beside them does not."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = f"{DIGITS} --max_steps 4 --save_strategy steps --save_steps 2 --output_dir {tmp_path}/run"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
        assert main(["finetune", *options.split()]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err
    assert "--output_dir" in line and "checkpoint-2" in line and line.count("\n") == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "log.txt"}


def test_accumulated_batches_give_the_gradient_of_the_whole_one(tmp_path):
    """Also of the last one of an epoch, whose parts have differing numbers of rows."""
    options = "--classes 5 6 --test_share 0.26 --optimizer sgd --schedule fixed --learning_rate 0.01 --dropout 0"
    options += " --num_train_epochs 1 --label_smoothing_factor 0.3"
    for rows, parts in ((32, 1), (8, 4)):
        sizes = f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {parts} --disable_tqdm true"
        assert main(["finetune", *options.split(), *sizes.split(), "--output_dir", str(tmp_path / str(rows))]) == 0
    whole, parts = weights(tmp_path / "32"), weights(tmp_path / "8")
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)
    rows = len(load(parse(options.split())[0], 0).train)
    assert rows % 32 % 8, "the last batch must not divide evenly, or the test cannot fail"
