"""The benchmark commands run, verify what they time and write whole result files. Figures are not looked at."""

import importlib
import json
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "prune": ["--elements", "1", "--rounds", "1"],
    "masks": ["--elements", "1e5", "--rounds", "3"],
    "scaling": ["--sizes", "1e3", "1e15", "--threads-at", "--seconds", "0.01"],
}


def bench(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bench", *map(str, words)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def modules(monkeypatch):
    """Imports modules of bench/ by their bare names, as they do each other, and forgets them and their settings."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    before, threads = set(sys.modules), torch.get_num_threads()
    with pytest.importorskip("matplotlib").rc_context():
        yield importlib.import_module
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "bench")):
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_and_writes_its_result(name, tmp_path, modules, capsys):
    path = tmp_path / "result.json"
    assert modules(name).main([*SCRIPTS[name], "--threads", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    timed = [row for row in result[name] if "skipped" not in row]
    assert timed and all(row["fuseopt"]["median"] > 0 for row in timed)
    assert {"command", "commit", "date"} <= result.keys()
    assert capsys.readouterr().out.count("\n") > len(result[name])
    if name == "scaling":
        assert "GB" in result[name][1]["skipped"] and path.with_name("result-curves.png").exists()
        assert "| 1,000 | 1 | " in modules(name).markdown([result])


def test_the_main_table(tmp_path, modules):
    """Run, tables, pictures, and the comparison with another result."""
    path = tmp_path / "new.json"
    words = ["--quick", "--rules", "adamw", "sgd", "--dtypes", "bf16", "--shapes", "tiny", "--threads", "1"]
    done = bench(*words, "--peers", "apex", "--json", path)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(path.read_text())
    names = {case["case"]: {row["name"]: row for row in case["variants"]} for case in result["cases"]}
    assert set(names) == {"adamw-bf16", "ema-bf16", "sgd-bf16"}
    assert "GPU" in names["adamw-bf16"]["apex"]["skipped"] and "Not timed:" in done.stdout
    for rows in names.values():
        row = rows["fuseopt"]
        assert row["verified"] and row["ratio"]["median"] == 1 and row["bytes"] > 0 and row["state_bytes"] > 0
    text = modules("report").markdown(result)
    assert "**AdamW, bf16, with an fp32 EMA**" in text and "| fuseopt |" in text and "- apex: skipped" in text
    assert "Bytes and memory" not in text  # of tensors beyond the cache alone
    for what in ("roofline", "ratios"):
        assert path.with_name(f"new-{what}.png").read_bytes().startswith(b"\x89PNG")

    compare = modules("compare")
    assert "nothing changed beyond the noise in 3 cases" in compare.text(result, result)
    old = json.loads(path.read_text())
    for case in old["cases"]:
        for row in case["variants"]:
            if "fused" in row["name"] and "ratio" in row:
                row["ratio"] = dict.fromkeys(row["ratio"], 2 * row["ratio"]["high"])
    old["cases"][0]["variants"][0]["bytes"] += 1
    said = compare.text(old, result)
    assert said.count("fuseopt is SLOWER") == 2 and said.count("moved") == 1


def test_what_is_no_result_is_refused_in_one_line(tmp_path, modules):
    for text in ('{"date": 1}', "[]", "no JSON", '{"date": 1, "cases": [], "finetune": []}'):
        (tmp_path / "other.json").write_text(text)
        for name, option in (("step", "--compare"), ("step", "--plot"), ("finetune", "--markdown")):
            with pytest.raises(SystemExit, match="is not a result of python -m bench") as refused:
                modules(name).main([option, str(tmp_path / "other.json")])
            assert "\n" not in str(refused.value)


COMMANDS = ("step", "host", "prune", "masks", "scaling", "finetune", "paper", "pages")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command(name, modules, capsys):
    with pytest.raises(SystemExit, match="0"):
        modules(name).main(["--help"])
    assert f"usage: python -m bench {'[' if name == 'step' else name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("step --threads 0", "--threads: 0: give a number, 1 or more"),
        ("masks --elements nan", "--elements: nan: give a number, 1 or more"),
        ("scaling --sizes 1e3 0", "--sizes: 0: give a number, 1 or more"),
        ("paper --parameters inf", "--parameters: inf: give a number, 1 or more"),
        ("step --rules lion --stages full", "no case has all that --rules"),
        ("step --json FOLDER", "FOLDER cannot be written: it is a folder"),
        ("prune --json FOLDER/result.json/more.json", "more.json cannot be written: .*File exists"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(words, said, tmp_path, modules, capsys):
    (tmp_path / "result.json").write_text("")
    name, *rest = words.replace("FOLDER", str(tmp_path)).split()
    with pytest.raises(SystemExit, match="2"):
        modules(name).main(rest)
    assert re.search(said.replace("FOLDER", str(tmp_path)), capsys.readouterr().err)


def test_a_comparison_runs_what_the_old_result_has_as_it_was_measured(tmp_path, modules, monkeypatch):
    pairs = [("adamw", "one"), ("sgd", "one"), ("sgd", "10")]
    cases = [{"case": n, "shape": s, "elements": 64, "tensors": 1, "variants": []} for n, s in pairs]
    old = modules("record").circumstances("step", quick=True) | {"threads": 1, "cases": cases}
    (tmp_path / "old.json").write_text(json.dumps(old))
    step, ran = modules("step"), []
    monkeypatch.setattr(step, "run", lambda p, args, cases: ran.append((args.quick, args.threads, cases)) or old)
    for words in ([], ["--rules", "sgd", "--shapes", "10", "one"]):
        assert step.main(["--compare", str(tmp_path / "old.json"), *words]) == 0
    assert ran == [(True, 1, pairs), (True, 1, pairs[1:])]


def test_an_interrupt_leaves_nothing_half_written(tmp_path, modules, monkeypatch, capsys):
    """Ctrl-C while it measures: one line, the status of shells, no file."""

    def interrupted(*_):
        raise KeyboardInterrupt  # as the signal does, save where a shell has it ignored

    monkeypatch.setattr(modules("scaling"), "measure_size", interrupted)
    monkeypatch.setattr(sys, "argv", ["bench", "scaling", "--sizes", "1e3", "--json", str(tmp_path / "a.json")])
    assert runpy.run_path(str(ROOT / "bench" / "__main__.py"))["main"]() == 130
    assert capsys.readouterr().err == "\ninterrupted: no result was written\n" and not list(tmp_path.iterdir())


def test_a_wrong_variant_is_not_timed_and_a_wrong_fuseopt_fails_the_run(modules, monkeypatch):
    """Planted: one entry of 64 is left where it was."""
    measure, variants, case = modules("measure"), modules("variants"), modules("case")
    one = case.Case("adamw", "tiny")
    data = case.Data(one)

    def planted(make):
        variant = make()
        step, p = variant.step, variant.params[0]

        def lazy():
            kept = p.detach()[0, 0].clone()
            step()
            p.detach()[0, 0] = kept

        variant.step = lazy
        return variant

    makers = variants.makers(one, data)
    ready, untimed = measure.verified(one, data, [lambda: planted(makers[0]), *makers[1:]])
    assert [v.name for v in ready] == ["torch fused=True", "torch foreach=True", "torch default"]
    assert "1 differ" in untimed[0]["problem"]
    step = modules("step")
    assert step.wrong({"cases": [{"variants": untimed}]})
    assert not step.wrong({"cases": [{"variants": [untimed[0] | {"family": "peer"}]}]})


def test_a_full_case_with_vectors_is_verified(modules):
    """Vectors are not pruned: what the recipes zero is what fuseopt selects all the same."""
    measure, variants, case = modules("measure"), modules("variants"), modules("case")
    full = case.Case("full", "tiny", sizes=[(40,), (8, 16), (4, 8, 2)])
    data = case.Data(full)
    ready, untimed = measure.verified(full, data, variants.makers(full, data))
    assert len(ready) == 10 and not untimed


@pytest.mark.parametrize(
    ("sizes", "quick", "said"),
    [
        ([(64, 64), (64, 65)], False, "with one shape alone"),
        ([(8, 8)], False, "fewer than 4096 entries"),
        ([(64, 64)], True, "not in a quick run"),
    ],
)
def test_torchao_is_skipped_for_the_reason_that_holds(sizes, quick, said, modules, monkeypatch):
    peers, case = modules("peers"), modules("case").Case("adamw", "one", quick, sizes)
    monkeypatch.setattr(peers, "load", lambda *_: types.SimpleNamespace(AdamW8bit=torch.optim.AdamW))
    with pytest.raises(modules("variants").Untimed, match=said):
        peers.torchao(case, modules("case").Data(case))


def test_the_shapes_are_those_of_the_models(modules):
    """Parameters as the models' authors count them: torchvision's, GPT-2's, timm's, peft's."""
    shapes = modules("shapes")
    counts = {"resnet50": 25_557_032, "gpt2": 124_439_808, "vit": 86_567_656, "lora": 294_912, "one": 2**24}
    assert {name: shapes.entries(shapes.SHAPES[name][1]) for name in counts} == counts
    assert {len(shapes.SHAPES[name][1]) for name in ("tiny", "10", "200", "1000")} == {1, 10, 200, 1000}


def test_the_pages_show_the_results_that_they_name():
    done = bench("pages", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
