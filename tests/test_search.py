"""`fuseopt search`: the space, what a trial is scored on, repeating, going on after an interrupt, failures."""

import json
import math

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors", "yaml", "optuna"):
    pytest.importorskip(extra)

import yaml

from fuseopt.__main__ import main
from fuseopt.finetune import cli, plot, search, space
from fuseopt.finetune import data as sets
from fuseopt.finetune.options import parse
from fuseopt.finetune.study import JOURNAL

SPACE = ["--space", "learning_rate=log:1e-4:1e-1", "optimizer=adamw,lion", "depth=int:1:3"]


@pytest.fixture
def trained(monkeypatch):
    """What train_once is called with, in place of training; its accuracy is the depth's and the rate's."""
    calls = []

    def train_once(options, args, data):
        calls.append((options, args, data))
        if len(calls) in train_once.interrupts:
            raise KeyboardInterrupt
        if options.optimizer in train_once.failing:
            raise ValueError(f"--optimizer {options.optimizer}: fails")
        score = train_once.factor * (options.depth / 4 + (args.learning_rate or 0))
        metrics = {name: {"raw": score} for name in ("accuracy", "macro_f1", "loss")} | {"verification": train_once.verification}
        metrics["accuracy"] |= {"average": score / 2} if options.average != "none" else {}
        return metrics

    train_once.interrupts, train_once.failing, train_once.verification, train_once.calls = (), (), None, calls
    train_once.factor = 1
    monkeypatch.setattr(cli, "train_once", train_once)
    monkeypatch.setattr(plot, "trials", lambda *_: _[-1].touch())
    return train_once


def run(folder, *more, trials=5):
    return main(["search", *SPACE, "--trials", str(trials), "--output_dir", str(folder), *more])


def trials(folder):
    return json.loads((folder / "trials.json").read_text())


def test_a_search(tmp_path, trained, capsys):
    folder = tmp_path / "out"
    assert run(folder, "--num_train_epochs", "2", "--freeze", "stem*") == 0
    found = trials(folder)
    for trial, (options, args, _) in zip(found, trained.calls, strict=True):
        values = trial["options"]
        assert (options.optimizer, options.depth, args.learning_rate) == (values["optimizer"], values["depth"], values["learning_rate"])
        assert (args.num_train_epochs, options.freeze) == (2, ["stem*"])
        assert args.output_dir == str(folder / f"trial-{trial['trial']:03d}")
        assert 1e-4 <= values["learning_rate"] <= 1e-1 and values["optimizer"] in ("adamw", "lion") and values["depth"] in (1, 2, 3)
    best = max(found, key=lambda trial: trial["accuracy"])
    config = yaml.safe_load((folder / "best.yaml").read_text())
    assert config == best["options"] | {"num_train_epochs": 2, "freeze": ["stem*"]}
    options, args = parse(["--config", str(folder / "best.yaml")])
    assert (options.depth, args.learning_rate, options.freeze) == (best["options"]["depth"], best["options"]["learning_rate"], ["stem*"])
    assert f"trial {best['trial']}, accuracy {best['accuracy']:.4f}" in capsys.readouterr().out
    first = (folder / "trials.txt").read_text().splitlines()[1]
    assert first.startswith(f"trial-{best['trial']:03d}")


def test_a_trial_never_sees_the_test_rows(tmp_path, trained):
    assert run(tmp_path / "out", "--validation_share", "0.2", trials=2) == 0
    options, args, data = trained.calls[0]
    whole = sets.load(options, args.seed)
    key = lambda row: row["image"].numpy().tobytes()
    given, test = [key(row) for row in whole.train], {key(row) for row in whole.test}
    train, validation = [key(row) for row in data.train], [key(row) for row in data.test]
    assert sorted(train + validation) == sorted(given)
    assert len(validation) == math.ceil(0.2 * len(given)) and not set(validation) & (test - set(given))
    assert [key(row) for row in trained.calls[1][2].test] == validation  # the same in every trial
    assert {row["labels"] for row in data.test} == {row["labels"] for row in whole.test}


def test_the_same_command_finds_the_same_and_an_interrupted_one_too(tmp_path, trained):
    for name in ("a", "b"):
        assert run(tmp_path / name) == 0
    assert trials(tmp_path / "a") == trials(tmp_path / "b")
    trained.calls.clear()
    trained.interrupts = (3,)
    assert run(tmp_path / "c") == 130
    assert len(trials(tmp_path / "c")) == 3  # two finished, one begun
    journal = tmp_path / "c" / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 5, "tri')  # killed while it wrote
    assert run(tmp_path / "c", "--continue") == 0
    assert trials(tmp_path / "c") == trials(tmp_path / "a")
    assert len(trained.calls) == 3 + 3
    assert trained.calls[3][1].output_dir == trained.calls[2][1].output_dir
    assert trained.calls[3][0].overwrite and trained.calls[3][1].resume_from_checkpoint is None


def test_an_interrupted_trial_goes_on_from_its_checkpoint(tmp_path, trained, monkeypatch):
    trained.interrupts = (1,)
    assert run(tmp_path / "out", trials=2) == 130
    monkeypatch.setattr(search, "last_checkpoint", lambda folder: folder if folder.name == "trial-000" else None)
    assert run(tmp_path / "out", "--continue", trials=2) == 0
    assert [args.resume_from_checkpoint for _, args, _ in trained.calls[1:]] == ["last", None]


def test_overwrite_leaves_nothing_of_the_search_before(tmp_path, trained):
    for name in ("trial-000", "trial-007", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").touch()
    assert run(tmp_path, "--overwrite", trials=1) == 0
    assert not list(tmp_path.glob("trial-*")) and (tmp_path / "mine" / "metrics.json").exists()


def test_more_trials_later(tmp_path, trained):
    assert run(tmp_path / "out", trials=1) == run(tmp_path / "out", "--continue", trials=3) == run(tmp_path / "whole", trials=3) == 0
    assert trials(tmp_path / "out") == trials(tmp_path / "whole")


def test_a_failed_trial_is_recorded(tmp_path, trained, capsys):
    trained.failing = ("lion",)
    assert run(tmp_path / "out") == 0
    found = trials(tmp_path / "out")
    failed = [trial for trial in found if trial["options"]["optimizer"] == "lion"]
    assert 0 < len(failed) < len(found)
    assert all(trial["accuracy"] is None and "--optimizer lion: fails" in trial["error"] for trial in failed)
    assert f"trial-{failed[0]['trial']:03d} failed: --optimizer lion: fails" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["raises", "verification", "nan"])
def test_all_trials_failed(tmp_path, trained, capsys, how):
    trained.failing = ("adamw", "lion") if how == "raises" else ()
    trained.verification = {"passed": how != "verification"}
    trained.factor = math.nan if how == "nan" else 1
    assert run(tmp_path / "out", trials=3) == 1
    assert {"raises": "fails", "verification": "verification failed", "nan": "accuracy is nan"}[how] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "best.yaml").exists()


def test_options_of_the_data_can_be_searched(tmp_path, trained):
    words = ["search", "--space", "image_size=8,16", "--trials", "4", "--depth", "1", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    sizes = {data.shape[1] for _, _, data in trained.calls}
    assert {options.image_size for options, *_ in trained.calls} == {8, 16} == sizes


def test_scores(tmp_path, trained):
    assert run(tmp_path / "loss", "--score", "loss") == 0
    found = trials(tmp_path / "loss")
    best = yaml.safe_load((tmp_path / "loss" / "best.yaml").read_text())
    assert best == min(found, key=lambda trial: trial["loss"])["options"]
    assert run(tmp_path / "average", "--average", "ema", trials=1) == 0
    options, args, _ = trained.calls[-1]
    assert trials(tmp_path / "average")[0]["accuracy"] == (options.depth / 4 + args.learning_rate) / 2


def test_a_real_search(tmp_path):
    words = ["search", "--space", "learning_rate=log:1e-3:1e-2", "--trials", "2", "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--disable_tqdm", "true", "--save_strategy", "no"]
    assert main(words) == 0
    assert (tmp_path / "out" / "trials.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "out" / "trial-001" / "metrics.json").read_text())
    assert trials(tmp_path / "out")[1]["accuracy"] == metrics["accuracy"]["raw"]
    options, args = parse([])
    assert sum(map(sum, metrics["confusion"]["raw"])) == -(-len(sets.load(options, args.seed).train) // 4)


# ---- what is refused -------------------------------------------------------------------------------

BAD = [
    ("--space learning_rate", "--space learning_rate: write"),
    ("--space learning_rate=", "--space learning_rate=: write"),
    ("--space learning_rat=log:1e-4:1e-2", "did you mean --learning_rate"),
    ("--space learning_rate=log:0:1", "above 0"),
    ("--space learning_rate=log:1e-2:1e-4", "the first the smaller"),
    ("--space learning_rate=log:1e-4", "takes two numbers"),
    ("--space learning_rate=float:a:b", "takes two numbers"),
    ("--space learning_rate=float:0:inf", "must be numbers"),
    ("--space depth=int:1.5:3", "takes two numbers"),
    ("--space depth=float:1:3", "--space depth"),
    ("--space optimizer=adamw", "two different values"),
    ("--space optimizer=adamw,adamw", "two different values"),
    ("--space optimizer=adamw,adamx", "adamx"),
    ("--space seed=int:1:3", "the same in all trials"),
    ("--space depth=int:1:3 depth=int:1:2", "given twice"),
    ("--space depth=int:1:3 --trials 0", "--trials 0"),
    ("--space depth=int:1:3 --validation_share 1", "--validation_share 1"),
    ("--space depth=int:1:3 --validation_share 0.001", "--validation_share 0.001 of"),
    ("--space depth=int:1:3 --folds 3", "--folds"),
    ("--space depth=int:1:3 --resume_from_checkpoint", "--continue"),
    ("--space depth=int:1:3 --continue", "there is no search"),
    ("--space depth=int:1:3 --no_such_option 3", "--no_such_option"),
    ("--space depth=int:1:3 --data nowhere.npz", "nowhere.npz"),
    ("--trials 3", "--space"),
]


@pytest.mark.parametrize("words, named", BAD)
def test_refused_with_one_line_and_nothing_written(tmp_path, trained, capsys, words, named):
    assert main(["search", *words.split(), "--output_dir", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and named in output.err
    assert not (tmp_path / "out").exists() and not trained.calls


def test_a_folder_in_use(tmp_path, trained, capsys):
    folder = tmp_path / "out"
    assert run(folder, trials=2) == 0
    assert run(folder, trials=2) == 2 and "not empty" in capsys.readouterr().err
    assert run(folder, "--continue", "--score", "loss", trials=3) == 2
    assert "started with score accuracy, now it is loss" in capsys.readouterr().err
    assert run(folder, "--continue", "--width", "3", trials=3) == 2 and "options" in capsys.readouterr().err
    assert run(folder, "--overwrite", trials=1) == 0
    assert len(trials(folder)) == 1
    (folder / JOURNAL).write_text("nonsense\n" * 3)
    assert run(folder, "--continue", trials=3) == 2 and "damaged" in capsys.readouterr().err


def test_options_as_yaml_gives_them(tmp_path):
    (tmp_path / "base.yaml").write_text("depth: 2\nfreeze: ['stem*']\n")
    words = ["--config", str(tmp_path / "base.yaml"), "--depth=3", "--quantize", "--augment", "flip", "crop", "--learning-rate", "1e-3", "--lr_scale", "a=2"]
    assert space.given(words) == {"depth": 3, "freeze": ["stem*"], "quantize": True, "augment": ["flip", "crop"], "learning_rate": 0.001, "lr_scale": "a=2"}
