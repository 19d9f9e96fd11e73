"""`fuseopt finetune` with bad input: exit status 2, one line that names the thing, nothing written."""

import importlib.util
import pickle
import shutil
import warnings

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors"):
    pytest.importorskip(extra)

import numpy as np
from safetensors.torch import load_file, save_file

from fuseopt import rules
from fuseopt.__main__ import main
from fuseopt.finetune.models import EMBEDDED
from fuseopt.finetune.options import make_parser

# Options, and what the line must name. {x} is a file that `files` makes. What data.py, models and optim refuse in
# detail stands in their own tests; here: that the command says it in one line and writes nothing.
CASES = [
    ("--sparsity 1.5", "--sparsity 1.5"),
    ("--sparsity nan", "--sparsity nan"),
    ("--average ema --ema_decay 2", "--ema_decay 2"),
    ("--ema_decay 0.9", "--average"),
    ("--optimizer adamax", "adamax"),
    ("--average ema --ema_warmup slow", "slow"),
    ("--backend cuda9", "cuda9"),
    ("--learning_rate -1", "-1"),
    ("--learning_rate nan", "nan"),
    ("--learning_rate fast", "fast"),
    ("--weight_decay -0.1", "-0.1"),
    ("--max_grad_norm -1", "-1"),
    ("--l1 -1", "l1"),
    ("--adam_beta1 1.5", "1.5"),
    ("--optimizer sgd --momentum -1", "-1"),
    ("--optimizer torch-adamw --average ema", "--average"),
    ("--optimizer adamw --decay coupled", "adam"),
    ("--layer_decay 0", "--layer_decay"),
    ("--lr_scale head=fast", "--lr_scale"),
    ("--schedule step --lr_scheduler_type cosine", "--lr_scheduler_type"),
    ("--prune_beginn 3", "--prune_begin?"),
    ("--sparcity 0.5", "--sparsity?"),
    ("surplus", "surplus"),
    ("--sparsity 0.5 --prune_begin 0", "0"),
    ("--sparsity 0.5 --prune_end 100000", "100000"),
    ("--sparsity 0.5 --prune_begin 30 --prune_end 20", "--prune_begin 30"),
    ("--sparsity 0.5 --prune_every 0", "--prune_every"),
    ("--prune_pattern 4:2", "4:2"),
    ("--freeze nothing.*", "nothing.*"),
    ("--freeze *", "*"),
    ("--teacher {missing}", "--teacher"),
    ("--teacher_scale 0", "--teacher_scale"),
    ("--temperature 0", "--temperature"),
    ("--lora_rank -1", "--lora_rank"),
    ("--verify -1", "--verify"),
    ("--threads 0", "--threads"),
    ("--compare_steps -1", "--compare_steps"),
    ("--folds 1", "--folds"),
    ("--learning_curve 0.5 2", "--learning_curve"),
    ("--num_train_epochs 0", "--num_train_epochs"),
    ("--num_train_epochs inf", "--num_train_epochs"),
    ("--num_train_epochs 1e30", "--num_train_epochs"),
    ("--per_device_train_batch_size 0", "batch_size"),
    ("--seed -1", "--seed -1: must"),
    ("--step_size 3", "finetune: --step_size 3 has no effect without --schedule"),
    ("--image_size 1000000", "not enough memory: lower"),
    ("--output_dir {broken}/run", "--output_dir"),
    ("--head_init zeros --classes 0 1 2 3 4", "--head_init zeros has no effect where the head is kept"),
    ("--optim sgd", "--optim"),
    ("--load_best_model_at_end", "--load_best_model_at_end"),
    ("--save_strategy best --metric_for_best_model loss", "--save_strategy best"),
    ("--warmup_steps -4", "warmup_steps"),
    ('--lr_scheduler_kwargs {{"bogus":1}}', "--lr_scheduler_kwargs"),
    ('--lr_scheduler_type cosine --lr_scheduler_kwargs {{"num_cycles":"x"}}', "--lr_scheduler_kwargs"),
    ("--dataloader_num_workers -1", "num_workers"),
    ("--dataloader_prefetch_factor 2", "prefetch_factor"),
    ("--dataloader_drop_last true --per_device_train_batch_size 9999", "--dataloader_drop_last"),
    ("--augment shake", "shake"),
    ("--classes 5 eleven", "eleven"),
    ("--classes 5", "found only 5"),
    ("--test_share 1", "--test_share"),
    ("--model no/such/model", "--model no/such/model"),
    ("--model mlp", "--model mlp"),
    ("--pretrained {folder}", "--pretrained"),
    ("--pretrained {missing}", "missing"),
    ("--pretrained {truncated}", "truncated"),
    ("--pretrained {empty}", "empty"),
    ("--pretrained {pickled}", "pickled"),
    ("--pretrained {lacking}", "neck.0.bias"),
    ("--pretrained {other}", "extra"),
    ("--pretrained {nan}", "stem.conv1.bias"),
    ("--pretrained {embedded} --head keep", "5"),
    ("--pretrained {embedded} --width 16", "--width"),
    ("--data {folder}", "--data"),
    ("--data {missing}", "--data"),
    ("--data {pickled}", "pickled"),
    ("--data {single}", "class"),
    ("--data {tiny}", "pixels"),
    ("--data {color} --pretrained {embedded}", "channel"),
    ("--data {broken}", "line 3"),
    ("--config {missing}", "missing"),
    ("--config {broken}", "--config"),
    ("--config {unknown}", "did you mean --sparsity?"),
    ("--config {badvalue}", "fast"),
    ("--resume_from_checkpoint", "checkpoint"),
    ("--resume_from_checkpoint {missing}", "missing"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The damaged files that the cases name."""
    folder = tmp_path_factory.mktemp("damaged")
    path = EMBEDDED / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "pickled.pt").write_bytes(pickle.dumps({"a": {1, 2}}))
    save_file({name: p for name, p in tensors.items() if name != "neck.0.bias"}, folder / "lacking.safetensors")
    save_file(tensors | {"extra": torch.zeros(2)}, folder / "other.safetensors")
    save_file(tensors | {"stem.conv1.bias": torch.full((32,), float("nan"))}, folder / "nan.safetensors")
    images, labels = np.ones((20, 8, 8)), np.arange(20) % 2
    arrays = {
        "single": {"images": images, "labels": 0 * labels},
        "tiny": {"images": images[:, :3, :3], "labels": labels},
        "color": {"images": np.ones((20, 3, 8, 8)), "labels": labels},
    }
    for name, content in arrays.items():
        np.savez(folder / f"{name}.npz", **content)
    (folder / "broken.csv").write_text("text,label\na b,x\nc\nd,y\n")
    (folder / "unknown.yaml").write_text("sparsitty: 0.5\n")
    (folder / "badvalue.yaml").write_text("learning_rate: fast\n")
    (folder / "folder").mkdir()
    paths = {path.stem: str(path) for path in folder.iterdir()}
    return paths | {"missing": str(folder / "missing"), "embedded": str(EMBEDDED)}


def refused(capsys, *arguments):
    """Run, expect a refusal, and return its one line."""
    with warnings.catch_warnings(record=True) as warned:  # more lines, outside pytest
        assert main(["finetune", *map(str, arguments)]) == 2
    assert not warned, warned
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
    for options in (["--sparsity", 2], ["--lr_scheduler_kwargs", '{"bogus":1}'], ["--dataloader_num_workers", -1]):
        refused(capsys, "--output_dir", tmp_path, "--overwrite", *options)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "metrics.json"}


SHORT = "--max_steps 4 --average ema --sparsity 0.8 --prune_begin 1 --prune_end 1 --disable_tqdm true --save_strategy steps --save_steps 4".split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of four steps, for copies."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["finetune", *map(str, SHORT), "--output_dir", str(folder)]) == 0
    return folder


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


OTHER_OPTIONS = [
    ("--sparsity", 0.5),
    ("--learning_rate", 0.1),
    ("--optimizer", "adam"),
    ("--bf16", "True"),
    ("--dataloader_drop_last", "True"),
    ("--lr_scheduler_type", "cosine"),
    ("--ignore_data_skip", "True"),
]


@pytest.mark.parametrize("name, value", OTHER_OPTIONS)
def test_resuming_with_another_option(finished, capsys, name, value):
    before = contents(finished)
    line = refused(capsys, *SHORT, "--output_dir", finished, name, value, "--resume_from_checkpoint")
    assert name in line and str(value) in line
    assert contents(finished) == before


def test_resuming_with_other_scheduler_options(tmp_path, capsys):
    cosine = [*SHORT, "--output_dir", tmp_path / "run", "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs"]
    assert main(["finetune", *map(str, cosine), '{"num_cycles": 0.5}']) == 0
    capsys.readouterr()
    line = refused(capsys, *cosine, '{"num_cycles": 1.5}', "--resume_from_checkpoint")
    assert "--lr_scheduler_kwargs" in line and "1.5" in line


def test_options_that_decide_no_bits_may_change(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    free = ["--verify", 1, "--eval_strategy", "steps", "--logging_steps", 1, "--eval_steps", 3, "--save_steps", 3, "--output_dir", folder]
    assert main(["finetune", *map(str, [*SHORT, *free]), "--resume_from_checkpoint"]) == 0
    assert (folder / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()


def test_resuming_into_a_new_folder(finished, tmp_path):
    resume = ["--output_dir", tmp_path / "new", "--resume_from_checkpoint", finished / "checkpoint-4"]
    assert main(["finetune", *map(str, [*SHORT, *resume])]) == 0
    assert (tmp_path / "new" / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CHECKPOINT = "checkpoint-4/"
DAMAGES = {
    "no model": (CHECKPOINT + "model.safetensors", lambda path: path.write_bytes(b"")),
    "half an rng_state": (CHECKPOINT + "rng_state.pth", truncate),
    "rng_state without a generator": (CHECKPOINT + "rng_state.pth", lambda path: torch.save({"python": 1}, path)),
    "trainer_state {}": (CHECKPOINT + "trainer_state.json", lambda path: path.write_text("{}")),
    "trainer_state []": (CHECKPOINT + "trainer_state.json", lambda path: path.write_text("[]")),
    "optimizer a list": (CHECKPOINT + "optimizer.pt", lambda path: torch.save([1], path)),
    "optimizer of another model": (
        CHECKPOINT + "optimizer.pt",
        lambda path: torch.save({"state": [], "param_groups": [1]}, path),
    ),
    "scheduler a list": (CHECKPOINT + "scheduler.pt", lambda path: torch.save([1], path)),
    "scheduler of another kind": (CHECKPOINT + "scheduler.pt", lambda path: torch.save({"last_epoch": 4}, path)),
    "options []": ("config.yaml", lambda path: path.write_text("[]")),
    "options {": ("config.yaml", lambda path: path.write_text("{")),
    "options {}": ("config.yaml", lambda path: path.write_text("{}")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_resuming_from_damaged_files(finished, tmp_path, capsys, damage):
    name, spoil = DAMAGES[damage]
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    spoil(folder / name)
    before = contents(folder)
    line = refused(capsys, *SHORT, "--output_dir", folder, "--resume_from_checkpoint", folder / "checkpoint-4")
    assert "--resume_from_checkpoint" in line
    assert name.removeprefix(CHECKPOINT) in line or "does not fit" in line
    refused(capsys, *SHORT, "--output_dir", folder, "--resume_from_checkpoint")
    assert contents(folder) == before


def test_an_extra_that_is_not_installed(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    line = refused(capsys)
    assert "scikit-learn is not installed" in line and "pip install 'fuseopt[finetune]'" in line


def test_help(capsys):
    for arguments, words in (
        (["--help"], ["finetune", "verify", "compare", "search", "--version"]),
        (["finetune", "--help"], ["--sparsity", "--learning_rate", "--help_all", "--config", "--augment", "--lora_rank"]),
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


def test_every_rule_is_a_choice_by_itself():
    optimizer = next(action for action in make_parser()._actions if action.dest == "optimizer")
    assert {rule.__name__.lower() for rule in rules.ALL} == {name for name in optimizer.choices if "-" not in name}
