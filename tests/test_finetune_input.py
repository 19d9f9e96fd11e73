"""`fuseopt finetune` with bad input: exit status 2, one line that names the thing, nothing written."""

import importlib.util
import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors"):
    pytest.importorskip(extra)

import numpy as np
from safetensors.torch import load_file, save_file

from fuseopt.__main__ import main
from fuseopt.finetune.model import EMBEDDED

# Options, and what the line must name. {x} is a file that `files` makes.
CASES = [
    ("--sparsity 1.5", "sparsity"),
    ("--sparsity 1", "sparsity"),
    ("--sparsity -0.1", "sparsity"),
    ("--sparsity nan", "sparsity"),
    ("--ema_decay 1.5", "decay"),
    ("--ema_decay -1", "decay"),
    ("--optimizer adamax", "adamax"),
    ("--ema_warmup slow", "slow"),
    ("--backend cuda9", "cuda9"),
    ("--learning_rate -1", "-1"),
    ("--learning_rate nan", "nan"),
    ("--learning_rate fast", "fast"),
    ("--weight_decay -0.1", "-0.1"),
    ("--max_grad_norm -1", "-1"),
    ("--l1 -1", "l1"),
    ("--adam_beta1 1.5", "1.5"),
    ("--optimizer sgd --momentum -1", "-1"),
    ("--prune_beginn 3", "--prune_begin?"),
    ("--sparcity 0.5", "--sparsity?"),
    ("surplus", "surplus"),
    ("--prune_begin 0", "0"),
    ("--prune_end 10000", "10000"),
    ("--prune_begin 10 --prune_end 5", "10 to 5"),
    ("--prune_begin 10 --prune_end 25", "25"),
    ("--prune_every 0", "--prune_every"),
    ("--freeze nothing.*", "nothing.*"),
    ("--freeze *", "*"),
    ("--verify_every -1", "--verify_every"),
    ("--threads 0", "--threads"),
    ("--compare_steps -1", "--compare_steps"),
    ("--num_train_epochs 0", "--num_train_epochs"),
    ("--num_train_epochs inf", "--num_train_epochs"),
    ("--per_device_train_batch_size 0", "batch_size"),
    ("--seed -1", "eed"),
    ("--optim sgd", "--optim"),
    ("--load_best_model_at_end", "--load_best_model_at_end"),
    ("--save_strategy best", "metric_for_best_model"),
    ("--warmup_steps -4", "warmup_steps"),
    ("--pretrained {missing}", "missing"),
    ("--pretrained {truncated}", "truncated"),
    ("--pretrained {empty}", "empty"),
    ("--pretrained {pickled}", "pickled"),
    ("--pretrained {reshaped}", "body.0.weight"),
    ("--pretrained {lacking}", "neck.1.bias"),
    ("--pretrained {other}", "extra"),
    ("--pretrained {nan}", "stem.0.bias"),
    ("--data {missing}", "missing"),
    ("--data {pickled}", "pickled"),
    ("--data {empty}", "empty"),
    ("--data {unlabelled}", "labels"),
    ("--data {flat}", "flat"),
    ("--data {uneven}", "labels"),
    ("--data {single}", "classes"),
    ("--data {tiny}", "pixels"),
    ("--data {many}", "number of classes"),
    ("--data {color}", "stem.0.weight"),
    ("--data {objects}", "objects"),
    ("--data {infinite}", "NaN"),
    ("--resume_from_checkpoint", "checkpoint"),
    ("--resume_from_checkpoint {missing}", "missing"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The damaged files that the cases name."""
    folder = tmp_path_factory.mktemp("damaged")
    whole, tensors = EMBEDDED.read_bytes(), load_file(EMBEDDED)
    (folder / "truncated").write_bytes(whole[: len(whole) // 2])
    (folder / "empty").write_bytes(b"")
    (folder / "pickled").write_bytes(pickle.dumps({"a": 1}))
    save_file(tensors | {"body.0.weight": torch.zeros(2, 2)}, folder / "reshaped")
    save_file({name: p for name, p in tensors.items() if name != "neck.1.bias"}, folder / "lacking")
    save_file(tensors | {"extra": torch.zeros(2)}, folder / "other")
    save_file(tensors | {"stem.0.bias": torch.full((32,), float("nan"))}, folder / "nan")
    images, labels = np.ones((20, 8, 8)), np.arange(20) % 2
    arrays = {
        "unlabelled": {"images": images},
        "flat": {"images": images[0, 0], "labels": labels},
        "uneven": {"images": images, "labels": labels[:-1]},
        "single": {"images": images, "labels": 0 * labels},
        "tiny": {"images": images[:, :3, :3], "labels": labels},
        "many": {"images": images, "labels": np.arange(20) // 2},
        "color": {"images": np.ones((20, 3, 8, 8)), "labels": labels},
        "objects": {"images": np.array([None] * 20), "labels": labels},
        "infinite": {"images": images * np.inf, "labels": labels},
    }
    for name, content in arrays.items():
        with open(folder / name, "wb") as file:
            np.savez(file, **content)
    names = ["missing", *(path.name for path in folder.iterdir())]
    return {name: str(folder / name) for name in names}


def refused(capsys, *arguments):
    """Run, expect a refusal, and return its one line."""
    assert main(["finetune", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fuseopt finetune: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("options, named", CASES, ids=[case[0] for case in CASES])
def test_refused_with_one_line_and_nothing_written(files, tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, *options.format(**files).split())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    line = refused(capsys, "--output_dir", tmp_path)
    assert str(tmp_path) in line and "--overwrite" in line and "--resume_from_checkpoint" in line
    assert "file" in refused(capsys, "--output_dir", tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_bad_input_changes_nothing_of_the_run_to_be_overwritten(tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "metrics.json").write_text("{}")
    refused(capsys, "--output_dir", tmp_path, "--overwrite", "--sparsity", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "metrics.json"}


def test_resuming_another_command(tmp_path, capsys):
    short = ["--output_dir", tmp_path / "run", "--max_steps", 4, "--compare_steps", 0, "--verify_every", 0]
    short += ["--prune_begin", 1, "--prune_end", 1, "--disable_tqdm", "true"]
    assert main(["finetune", *map(str, short)]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    for name, value in (("--sparsity", 0.5), ("--learning_rate", 0.1), ("--optimizer", "adam")):
        line = refused(capsys, *short, name, value, "--resume_from_checkpoint")
        assert name in line and str(value) in line
    (tmp_path / "run" / "checkpoint-4" / "model.safetensors").write_bytes(b"")
    assert "no whole checkpoint" in refused(capsys, *short, "--resume_from_checkpoint")
    named = tmp_path / "run" / "checkpoint-4"
    assert "model.safetensors is damaged" in refused(capsys, *short, "--resume_from_checkpoint", named)
    assert before.keys() == {path for path in (tmp_path / "run").rglob("*")}


def test_an_extra_that_is_not_installed(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    line = refused(capsys)
    assert "sklearn" in line and "pip install 'fuseopt[finetune]'" in line


def test_the_process_says_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fuseopt",
        "finetune",
        "--sparsity",
        "2",
        "--output_dir",
        tmp_path / "run",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_help(capsys):
    for arguments, words in (
        (["--help"], ["finetune", "--version"]),
        (["finetune", "--help"], ["--sparsity", "--learning_rate", "--help_all"]),
        (["finetune", "--help_all"], ["--dataloader_num_workers"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        out, err = capsys.readouterr()
        assert stop.value.code == 0 and err == "" and all(word in out for word in words)


@pytest.mark.parametrize("arguments", [[], ["tune"], ["--fast"]])
def test_unknown_command(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and "finetune" in err
