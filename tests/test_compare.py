"""`fuseopt compare`: the table, the differing options, the files it writes, and what it refuses."""

import json

import pytest

for extra in ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors", "yaml"):
    pytest.importorskip(extra)

from fuseopt.__main__ import main
from fuseopt.finetune import compare

OPTIONS = {"optimizer": "adamw", "learning_rate": 0.002, "freeze": [], "output_dir": "somewhere", "verify": 0}


def metrics(raw=0.9, step=2.5, options=None, **more):
    content = {
        "accuracy": {"raw": raw},
        "sparsity": {"raw_zeros": 0, "prunable": 200},
        "time": {"train_step_ms": {"median": step, "quartiles": [2, 3]}, "optimizer_step_ms": {"median": 0.25, "quartiles": [0.2, 0.3]}},
        "memory": {"peak_bytes": 512_000_000, "optimizer_state_bytes": 800},
        "size": {"model": 397_700},
        "verification": None,
        "options": OPTIONS | (options or {}),
        "curves": [{"step": 5, "loss": 1.5}, {"step": 10, "loss": 1.0, "eval_accuracy": raw}],
    }
    return content | more


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def three(tmp_path):
    """Three runs in a folder."""
    write(tmp_path / "runs" / "b-plain", metrics(raw=0.9, options={"output_dir": "b"}))
    pruned = {"raw": 0.85, "average": 0.95, "int8": 0.8}
    write(tmp_path / "runs" / "a-pruned", metrics(step=3.5, options={"sparsity": 0.8, "verify": 5}, accuracy=pruned, sparsity={"raw_zeros": 160, "prunable": 200}, verification={"passed": True}))
    write(tmp_path / "runs" / "c-lion", metrics(raw=0.7, step=1.5, options={"optimizer": "lion", "freeze": ["stem*", "body*"]}, verification={"passed": False}, memory={"peak_bytes": None, "optimizer_state_bytes": 4}))
    return tmp_path


def rows_of(text):
    return {line.split()[0]: line for line in text.splitlines()[1:] if line}


def test_the_table(three, capsys):
    assert main(["compare", str(three / "runs")]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["b-plain"].split() == ["b-plain", "90.0%", "-", "-", "0.0%", "2.500", "0.250", "512.0", "MB", "397.7", "kB", "no", "optimizer=adamw"]
    assert rows["a-pruned"].split() == ["a-pruned", "85.0%", "95.0%", "80.0%", "80.0%", "3.500", "0.250", "512.0", "MB", "397.7", "kB", "passed", "optimizer=adamw", "sparsity=0.8"]
    assert rows["c-lion"].split()[7:] == ["-", "397.7", "kB", "FAILED", "optimizer=lion", "freeze=stem*,body*"]


@pytest.mark.parametrize(
    "key, order",
    [("name", "abc"), ("raw", "bac"), ("average", "abc"), ("zeros", "abc"), ("step", "cba"), ("memory", "abc"), ("verified", "cab")],
)
def test_sorting(three, capsys, key, order):
    assert main(["compare", str(three / "runs"), "--sort", key]) == 0
    assert "".join(name[0] for name in rows_of(capsys.readouterr().out)) == order


def test_the_files(three, capsys):
    files = [str(three / name) for name in ("all.png", "all.json")]
    folders = [str(three / "runs" / name) for name in ("c-lion", "a-pruned", "c-lion/")]
    assert main(["compare", *folders, "--plot", files[0], "--json", files[1]]) == 0
    content = json.loads((three / "all.json").read_text())
    assert [row["name"] for row in content["runs"]] == ["c-lion", "a-pruned"]  # as given, each once
    assert content["runs"][1]["differs"] == {"optimizer": "adamw", "freeze": [], "sparsity": 0.8}
    assert content["curves"]["c-lion"][0] == {"step": 5, "loss": 1.5}
    assert (three / "all.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in three.iterdir()) == ["all.json", "all.png", "runs"]


def test_says_which_step_times_include_checks(three, capsys):
    checked = metrics()
    checked["time"]["with_checks"] = True
    write(three / "runs" / "d-checked", checked)
    assert main(["compare", str(three / "runs")]) == 0
    assert capsys.readouterr().out.endswith("\nthe step times of d-checked include the checks of --verify\n")


def test_many_runs_are_drawn(tmp_path):
    for k in range(25):
        write(tmp_path / f"run-{k}", metrics(raw=k / 25, curves=[]))
    assert main(["compare", str(tmp_path), "--plot", str(tmp_path / "all.png")]) == 0


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write(tmp_path / parent / "run", metrics()) for parent in ("x", "y")]
    assert list(compare.read(folders)) == ["x/run", "y/run"]


def unfinished(folder):
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")


def damaged(folder):
    folder.mkdir()
    (folder / "metrics.json").write_text('{"accuracy": {"ra')


BAD = [
    (lambda folder: None, "no such folder"),
    (lambda folder: folder.mkdir(), "no run of fuseopt finetune"),
    (unfinished, "not finished"),
    (damaged, "damaged"),
    (lambda folder: write(folder, [1]), "missing"),
    (lambda folder: write(folder, {"accuracy": {"raw": 1}}), "sparsity, time, memory, size, options, curves missing"),
]


@pytest.mark.parametrize("make, named", BAD)
def test_what_is_no_finished_run(tmp_path, capsys, make, named):
    good = write(tmp_path / "good", metrics())
    make(tmp_path / "bad")
    assert main(["compare", good, str(tmp_path / "bad"), "--plot", str(tmp_path / "x.png")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert named in output.err and str(tmp_path / "bad") in output.err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("words, named", [(["--sort", "beauty"], "beauty"), (["--plot", "nowhere/x.png"], "--plot nowhere/x.png"), (["--json", "nowhere/x"], "--json nowhere/x"), (["--what"], "--what")])
def test_bad_options(tmp_path, capsys, words, named):
    assert main(["compare", write(tmp_path / "good", metrics()), *words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and named in output.err
