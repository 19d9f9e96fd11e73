"""What a run reports is what its files hold; the torch recipe takes the same step; folds and learning curves."""

import copy
import json
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors", "yaml"):
    pytest.importorskip(extra)

import matplotlib.pyplot as plt
import numpy as np
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerState

import fuseopt
from fuseopt.finetune import callbacks, cli, folds, measure, plot, report, timing
from fuseopt.finetune import data as sets
from fuseopt.finetune.options import parse

RUN = ["--max_steps", "24", "--sparsity", "0.5", "--average", "ema", "--freeze", "stem*", "--compare_steps", "3", "--eval_steps", "6", "--eval_strategy", "steps", "--save_strategy", "steps", "--save_steps", "24", "--logging_steps", "3", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, metrics, options) of a real run."""
    folder = tmp_path_factory.mktemp("report") / "run"
    options, args = parse([*RUN, "--output_dir", str(folder)])
    return folder, cli.train_once(options, args), options


@pytest.mark.parametrize("key, name", [("raw", "model"), ("average", "model_average")])
def test_scores_are_those_of_the_weights_that_were_written(finished, key, name):
    folder, metrics, options = finished
    data = sets.load(options, 0)
    model = AutoModelForImageClassification.from_pretrained(folder / name).eval()
    processor = sets.Pixels.from_pretrained(folder / name)
    _, test, collate = sets.datasets(data, processor, options, 0)
    batch = collate([test[k] for k in range(len(test))])
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
    labels, chosen = batch["labels"], logits.argmax(-1)
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (labels.numpy(), chosen.numpy()), 1)
    assert metrics["confusion"][key] == matrix.tolist()
    assert metrics["accuracy"][key] == pytest.approx((labels == chosen).float().mean().item())
    assert metrics["loss"][key] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    both = matrix.sum(0) + matrix.sum(1)
    assert metrics["macro_f1"][key] == pytest.approx(np.mean(2 * matrix.diagonal() / np.maximum(both, 1)))
    assert metrics["classes"] == data.names


def test_counts_sizes_and_memory_are_those_of_the_files(finished):
    folder, metrics, _ = finished
    counts = metrics["sparsity"]
    for key, name in (("raw_zeros", "model"), ("average_zeros", "model_average")):
        tensors = load_file(folder / name / "model.safetensors")
        matrices = [p for n, p in tensors.items() if p.ndim > 1 and not n.startswith("stem")]
        assert counts[key] == sum(int((p == 0).sum()) for p in matrices)
        assert counts["prunable"] == sum(p.numel() for p in matrices)
        assert metrics["size"][name] == (folder / name / "model.safetensors").stat().st_size
    assert counts["asked"] == counts["pruned"] == counts["raw_zeros"] == round(0.5 * counts["prunable"])
    assert metrics["frozen"]["entries"] > 0 and metrics["frozen"]["changed"] == 0
    saved = torch.load(folder / "checkpoint-24" / "optimizer.pt", weights_only=True)["state"]
    state = [v for entry in saved.values() for v in entry.values() if torch.is_tensor(v)]
    moments = sum(v.nbytes for v in state if v.is_floating_point())
    assert moments < metrics["memory"]["optimizer_state_bytes"] < sum(v.nbytes for v in state)  # masks: bytes in files
    assert 1e8 < metrics["memory"]["peak_bytes"] < 1e11


def test_times_curves_and_the_text(finished):
    folder, metrics, _ = finished
    times = metrics["time"]
    assert times["steps"] == 24 and not times["with_checks"]
    assert times["train_step_ms"]["median"] > times["optimizer_step_ms"]["median"] > 0
    assert metrics["step"]["ratio"]["ratio"] > 0
    assert {"raw_before_pruning", "average_before_pruning"} <= metrics["accuracy"].keys() & metrics["loss"].keys()
    text = (folder / "report.txt").read_text()
    for shown in (f"{metrics['accuracy']['average']:.1%}", "raw weights", "averaged weights", "true \\ found", "macro avg"):
        assert shown in text
    for name in ("plot.png", "confusion.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


# ---- what is counted -------------------------------------------------------------------------------


def pruned(stages, sizes=((6, 10), (7, 9), (4, 8, 3))):
    """A run whose optimizer has pruned parameters of these sizes."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = fuseopt.SGD([{"params": parameters}], lr=0.1, prune=fuseopt.Prune(**stages))
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return types.SimpleNamespace(optimizer=optimizer, averaged=None)


@pytest.mark.parametrize(
    "stages",
    [{"sparsity": 0.37}, {"sparsity": 0.37, "scope": "tensor"}, {"pattern": "2:4"}, {"pattern": "1:4"}, {"sparsity": 0.4, "pattern": "rows"}],
    ids=str,
)
def test_what_was_asked_is_what_a_pruning_step_makes(stages):
    counts = measure.sparsity(pruned(stages))
    assert counts["asked"] == counts["pruned"] == counts["raw_zeros"] > 0
    assert counts["unit"] == ("rows" if stages.get("pattern") == "rows" else "entries")


def test_a_negative_zero_or_a_moved_entry_is_not_counted_as_pruned():
    run = pruned({"sparsity": 0.5})
    p = run.optimizer.param_groups[0]["params"][0]
    first, second = (run.optimizer.prune_mask(p)).nonzero()[:2].tolist()
    with torch.no_grad():
        p[tuple(first)], p[tuple(second)] = -0.0, 1e-30
    counts = measure.sparsity(run)
    assert counts["raw_zeros"] == counts["pruned"] - 2


def test_a_frozen_entry_that_changed_only_its_sign_counts():
    p = torch.tensor([0.0, 1.0, 2.0])
    run = types.SimpleNamespace(frozen={p: torch.tensor([-0.0, 1.0, 2.5])})
    assert measure.frozen(run) == {"entries": 3, "changed": 2}


def test_step_times(monkeypatch):
    clock = iter([0.0, *(base + part for base in (1.0, 2.0, 3.0) for part in (0.0, 0.1, 0.15, 0.4 * base)), 9.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    times, args = callbacks.StepTimes(), types.SimpleNamespace(device=torch.device("cpu"))
    assert times.summary()["train_step_ms"] is None
    times.on_train_begin(args, None, None)
    for _ in range(3):
        for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
            getattr(times, event)(args, None, None)
    times.on_train_end(args, None, None)
    found = times.summary()
    assert found["train_step_ms"]["median"] == pytest.approx(800)
    assert found["train_step_ms"]["quartiles"] == pytest.approx([600, 1000])
    assert found["optimizer_step_ms"]["median"] == pytest.approx(50)
    assert (found["steps"], found["seconds"]) == (3, 9.0)


# ---- the torch recipe ------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = torch.nn.Linear(12, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)

    def forward(self, x, labels):
        logits = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return types.SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)


RULES = {"adamw": fuseopt.AdamW, "adam": fuseopt.Adam, "sgd": fuseopt.SGD, "nadam": fuseopt.NAdam, "adagrad": fuseopt.Adagrad, "lion": fuseopt.Lion, "torch-sgd": torch.optim.SGD}
PRUNE = fuseopt.Prune(0.5, begin=2, end=4)


def small_run(optimizer="adamw", frozen="", partly="", **stages):
    """A run of five steps over a small network; frozen: by mask or by requires_grad, of its first layer."""
    torch.manual_seed(0)
    model, rate = Net(), 0.01
    if frozen == "requires_grad":
        model.first.requires_grad_(False)
    parts = {"first": {"lr": rate / 4}, "second": {"lr": rate / 2}, "third": {}}
    groups = [{"params": list(getattr(model, name).parameters()), **extra} for name, extra in parts.items()]
    if frozen == "mask":
        groups[0]["prune"] = None
    groups = [{**group, "params": trained} for group in groups if (trained := [p for p in group["params"] if p.requires_grad])]
    momentum = {"momentum": 0.9} if optimizer.endswith("sgd") else {}
    fused = RULES[optimizer](groups, lr=rate, **momentum, **stages)
    if frozen == "mask":
        for p in model.first.parameters():
            fused.mask(p, torch.zeros([1] * p.ndim, dtype=torch.bool))
    if partly:
        fused.mask(model.second.weight, torch.arange(16)[None] > 3)
    rows = [{"x": torch.randn(12), "labels": torch.tensor(k % 3)} for k in range(8)]
    collate = lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    for _ in range(5):
        fused.zero_grad()
        model(**collate(rows)).loss.backward()
        fused.step()
    return types.SimpleNamespace(
        model=model,
        optimizer=fused,
        frozen={p: p.detach().clone() for p in model.first.parameters()} if frozen else {},
        options=types.SimpleNamespace(optimizer=optimizer, compare_steps=2),
        args=types.SimpleNamespace(learning_rate=rate, world_size=1, device=torch.device("cpu")),
        trainer=types.SimpleNamespace(train_dataset=rows, data_collator=collate),
    )


COVERED = [
    *(dict(optimizer=name, weight_decay=0.1, max_grad_norm=0.1) for name in ("adamw", "adam", "sgd", "nadam", "adagrad")),
    *(dict(optimizer=name, weight_decay=0.1, l1=0.01, decoupled_weight_decay=True) for name in ("adam", "sgd", "adagrad")),
    dict(optimizer="adamw", l1=0.05),
    dict(optimizer="adam", l1=0.05, max_grad_norm=0.1),
    dict(prune=PRUNE, ema=fuseopt.EMA(0.9, "timm"), max_grad_norm=0.1, weight_decay=0.1),
    dict(prune=fuseopt.Prune(pattern="2:4"), ema=fuseopt.EMA(warmup="swa", start=1, every=2)),
    dict(prune=fuseopt.Prune(0.4, pattern="rows"), frozen="mask", ema=fuseopt.EMA(0.9)),
    dict(optimizer="sgd", frozen="requires_grad", ema=fuseopt.EMA(0.9), max_grad_norm=0.1),
]


@pytest.mark.parametrize("stages", COVERED, ids=str)
def test_the_torch_recipe_takes_the_same_step(stages):
    run = small_run(**stages)
    before = copy.deepcopy(run.model.state_dict())
    found = timing.compare(run)
    assert "skipped" not in found, found
    assert found["difference"] < 1e-6 and found["ratio"]["ratio"] > 0
    assert found["torch"]["bytes"] > found["fuseopt"]["bytes"] * 0.9 > 0
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())


def test_both_step_with_the_rates_that_the_schedule_started_from():
    run = small_run()
    torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    for contestant in (timing.Fused(run), timing.Recipe(run)):
        assert [group["lr"] for group in contestant.optimizer.param_groups] == [0.0025, 0.005, 0.01]


SKIPPED = [
    (dict(optimizer="lion"), "torch has no lion"),
    (dict(optimizer="torch-sgd"), "torch's own"),
    (dict(partly="yes"), "frozen in part"),
    (dict(prune=fuseopt.Prune(0.5, begin=2, end=9)), "not at its end"),
    (dict(ema=fuseopt.EMA(0.9, start=100)), "no value yet"),
]


@pytest.mark.parametrize("stages, reason", SKIPPED, ids=str)
def test_what_the_torch_recipe_does_not_cover(stages, reason):
    assert reason in timing.compare(small_run(**stages))["skipped"]


@pytest.mark.parametrize("part", ["_average", "_penalise_before", "_penalise_after"])
def test_a_recipe_that_differs_is_not_timed(monkeypatch, part):
    monkeypatch.setattr(timing.Recipe, part, lambda self: None)
    run = small_run("adamw" if part == "_penalise_after" else "adam", l1=0.1, ema=fuseopt.EMA(0.5))
    found = timing.compare(run)
    assert "differ" in found["skipped"] and found["difference"] > 1e-4


# ---- text and plots --------------------------------------------------------------------------------


def test_many_classes_are_told_by_their_most_frequent_confusions():
    names = [f"class {k}" for k in range(40)]
    matrix = (5 * np.eye(40, dtype=int)).tolist()
    assert report.confusion_text(matrix, names) == "no row was confused"
    matrix[3][7], matrix[8][2] = 4, 9
    lines = report.confusion_text(matrix, names).splitlines()
    assert lines[1].split("  ")[0] == "class 8" and lines[1].endswith("9")
    assert lines[2].split("  ")[0] == "class 3" and len(lines) == 3
    assert len(report.confusion_text([row[:30] for row in matrix[:30]], names[:30]).splitlines()) == 31


@pytest.fixture
def figures(monkeypatch):
    """The figures that are closed, in their order."""
    seen, close = [], plt.close
    monkeypatch.setattr(plot.plt, "close", lambda figure: (seen.append(figure), close(figure)))
    return seen


def titles(figure):
    return [title for axis in figure.axes if (title := axis.get_title(loc="left"))]


@pytest.mark.parametrize("pruned_to, compared, logged", [(0.5, True, True), (0, False, True), (0.5, False, False), (0, False, False)])
def test_a_panel_for_what_there_is(tmp_path, figures, pruned_to, compared, logged):
    curves = [{"step": k, "loss": 2.0 / k, "learning_rate": 0.1 / k, "sparsity": 0.1 * k} for k in (1, 2, 3)]
    results = {"curves": curves if logged else [{"step": 3, "eval_loss": 1.0, "eval_accuracy": 0.7}]}
    results |= {"accuracy": {"raw": 0.7}, "sparsity": {"asked": pruned_to * 10, "prunable": 10, "raw_zeros": 5, "unit": "entries"}}
    one = {"ms": 1.0, "quartiles": [0.9, 1.2], "bytes": 1000}
    results["step"] = {"fuseopt": one, "torch": one, "ratio": {"ratio": 1.0, "quartiles": [1.0, 1.0]}} if compared else {"skipped": ""}
    group = {"prune": {"begin": 1, "end": 3} if pruned_to else None}
    plot.draw(types.SimpleNamespace(optimizer=types.SimpleNamespace(param_groups=[group])), results, tmp_path / "plot.png")
    expected = {"Loss", "Accuracy on the test rows", *(["Learning rate"] if logged else [])}
    expected |= {*(["Sparsity"] if pruned_to else []), *(["Time of one optimizer step"] if compared else [])}
    assert set(titles(figures[0])) == expected


def test_averaged_curves_of_several_runs_are_explained(tmp_path, figures):
    for k, key in enumerate(("eval_accuracy", "average_accuracy")):
        run = {"curves": [{"step": 1, key: 0.5}], "accuracy": {"raw": 0.5}}
        plot.runs({"a": run}, tmp_path / "all.png")
        assert titles(figures[k])[1] == "Accuracy on the test rows" + (" (dashed: averaged)" if k else "")


@pytest.mark.parametrize("classes, counted, named", [(2, True, True), (30, True, True), (45, False, True), (100, False, False)])
def test_confusions_of_few_and_many_classes(tmp_path, figures, classes, counted, named):
    names = [f"a rather long name of class {k}" for k in range(classes)]
    plot.confusion((7 * np.eye(classes, dtype=int)).tolist(), names, "Confusions", tmp_path / "confusion.png")
    axis = figures[0].axes[0]
    assert len(axis.texts) == (classes if counted else 0)
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert (len(labels) == classes and all(len(label) == 20 for label in labels)) == named


@pytest.mark.filterwarnings("error")
def test_names_that_are_no_mathtext_or_in_no_font(tmp_path, figures):
    plot.confusion([[1, 0], [0, 1]], ["$x^", "c$_$ 你好"], "Confusions", tmp_path / "confusion.png")
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["$x^", "c$_$ 你好"]


def test_a_logarithmic_loss_has_plain_numbers(tmp_path, figures):
    curves = [{"step": k, "loss": 10.0 ** -k} for k in (1, 2, 3)]
    results = {"curves": curves, "accuracy": {"raw": 0.7}, "sparsity": {"asked": 0}}
    run = types.SimpleNamespace(optimizer=types.SimpleNamespace(param_groups=[{}]))
    plot.draw(run, results, tmp_path / "plot.png")
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert "0.01" in labels and not any("$" in label for label in labels)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    args, state = types.SimpleNamespace(output_dir=str(tmp_path)), TrainerState()
    with pytest.raises(OSError, match=f"--output_dir {tmp_path}: log.txt cannot be written: No space left"):
        callbacks.Log("head").on_train_begin(args, state, None)


# ---- several runs ----------------------------------------------------------------------------------


def fake_train(calls, passed=True):
    """A train_once whose accuracy follows from the number of its training rows."""

    def train_once(options, args, data):
        calls.append((args.output_dir.rsplit("/", 1)[1], len(data.train), len(data.test), args.resume_from_checkpoint, options.overwrite))
        accuracy = len(data.train) / 2000 + 0.01 * len(calls)
        scores = {name: {"raw": accuracy} for name in ("accuracy", "macro_f1", "loss")}
        verification = None if passed is None else {"passed": passed}
        return {**scores, "confusion": {"raw": [[len(calls), 1], [0, 2]]}, "classes": ["a", "b"], "verification": verification}

    return train_once


def test_folds(tmp_path, capsys):
    calls = []
    options, args = parse(["--folds", "3", "--output_dir", str(tmp_path / "out")])
    assert folds.cross_validate(options, args, fake_train(calls)) == 0
    assert [name for name, *_ in calls] == ["fold-1", "fold-2", "fold-3"] and args.output_dir == str(tmp_path / "out")
    data = sets.load(options, args.seed)
    total = len(data.train) + len(data.test)
    assert all(train + test == total for _, train, test, *_ in calls) and sum(test for _, _, test, *_ in calls) == total
    content = json.loads((tmp_path / "out" / "folds.json").read_text())
    accuracies = [train / 2000 + 0.01 * k for k, (_, train, *_) in enumerate(calls, start=1)]
    assert content["scores"]["accuracy"] == accuracies
    assert content["mean"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert content["standard_deviation"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    assert content["confusion"] == [[6, 3], [0, 6]]
    assert f"{np.mean(accuracies):.1%}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not empty"):
        folds.cross_validate(options, args, fake_train(calls))


def test_interrupted_folds_go_on(tmp_path, monkeypatch):
    calls = []
    options, args = parse(["--folds", "3", "--output_dir", str(tmp_path), "--resume_from_checkpoint"])
    monkeypatch.setattr(folds, "last_checkpoint", lambda folder: "checkpoint-4" if folder.endswith("fold-1") else None)
    assert folds.cross_validate(options, args, fake_train(calls, passed=None)) == 0
    assert [call[3:] for call in calls] == [("last", False), (None, True), (None, True)]


def test_overwrite_leaves_nothing_of_the_folds_before(tmp_path):
    for name in ("fold-3", "share-0.50", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").touch()
    options, args = parse(["--folds", "2", "--output_dir", str(tmp_path), "--overwrite"])
    assert folds.cross_validate(options, args, fake_train([])) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"folds.json", "folds.txt", "confusion.png", "mine"}


def test_a_failed_verification_of_one_fold_is_the_exit_status(tmp_path):
    options, args = parse(["--folds", "2", "--output_dir", str(tmp_path)])
    assert folds.cross_validate(options, args, fake_train([], passed=False)) == 1


def test_learning_curve(tmp_path):
    calls = []
    options, args = parse(["--learning_curve", "0.5", "0.1", "1", "--output_dir", str(tmp_path)])
    assert folds.learning_curve(options, args, fake_train(calls)) == 0
    points = json.loads((tmp_path / "learning_curve.json").read_text())
    assert [point["run"] for point in points] == ["share-0.10", "share-0.50", "share-1.00"]
    assert [point["rows"] for point in points] == [train for _, train, *_ in calls] == sorted(train for _, train, *_ in calls)
    assert len({test for _, _, test, *_ in calls}) == 1


@pytest.mark.parametrize(
    "words, named",
    [
        ("--folds 1", "--folds 1"),
        ("--folds -2", "--folds -2"),
        ("--folds 2 --learning_curve 0.5", "choose one"),
        ("--folds 2 --resume_from_checkpoint runs/x/checkpoint-3", "without a folder"),
        ("--learning_curve 0.5 1.5", "--learning_curve 1.5"),
        ("--learning_curve 0.5 0.501", "two decimals"),
    ],
)
def test_bad_parts(tmp_path, words, named):
    options, args = parse([*words.split(), "--output_dir", str(tmp_path / "out")])
    run = folds.cross_validate if options.folds else folds.learning_curve
    with pytest.raises(ValueError, match=named):
        run(options, args, fake_train([]))
    assert not (tmp_path / "out").exists()
