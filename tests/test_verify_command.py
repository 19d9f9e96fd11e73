"""`fuseopt verify`: passes what is right, names what is wrong, and takes its shapes from a model."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

import fuseopt
from fuseopt import backends, cpu, reference, rules
from fuseopt.__main__ import main
from fuseopt.stages import clip, ema
from fuseopt.verify import cases, shapes, sweep, table

BACKENDS = ["torch"] + (["cpu"] if cpu.native_error() is None else [])
QUICK = ["--rules", "adamw", "--dtypes", "fp32", "--backends", "torch"]


def run(capsys, *words):
    """(exit status, what was printed, what the JSON says)."""
    status = main(["verify", "--json", "-", *words])
    captured = capsys.readouterr()
    return status, captured.err, json.loads(captured.out) if captured.out else None


def test_every_rule_is_swept_and_both_forms_of_decay():
    assert {rule.cls for rule in cases.RULES} == set(rules.ALL)
    for rule in cases.RULES:
        has_both = rule.cls not in (fuseopt.AdamW, fuseopt.Lion)
        assert (len(rule.forms) == 2) == has_both, rule.name


@pytest.mark.parametrize("rule", [rule.name for rule in cases.RULES])
def test_the_stages_together_pass_in_every_dtype_on_every_backend(rule, capsys):
    status, text, result = run(capsys, "--rules", rule, "--stages", "all", "torch-fused", "--backends", *BACKENDS)
    assert status == 0 and result["passed"], text
    ran = [cell for cell in result["cells"] if cell["result"] == "ok" and cell["stage"] == "all"]
    assert len(ran) == len(BACKENDS) * 4 and all(0 <= cell["share_of_bound"] <= 1 for cell in ran)
    assert "PASS: all" in text and max(map(len, text.splitlines())) <= 120


def test_all_stages_of_a_rule(capsys):
    status, text, result = run(capsys, "--rules", "sgd", "--dtypes", "bfloat16", "--backends", "torch")
    assert status == 0, text
    assert result["counts"] == {"run": len(cases.STAGES), "failed": 0, "skipped": 1}
    rows = [line.split() for line in text.splitlines() if line.startswith("sgd ")]
    assert [row[1] for row in rows] == [stage.name for stage in sweep.ROWS]
    assert "-: torch's bits are promised of fp32 on the cpu backend" in text


def test_every_option_of_the_rules_and_stages_is_on():
    """All numbers are away from what is neutral somewhere, and every group of a rule has the largest tensor once."""
    for rule in cases.RULES:
        params = cases.parameters(cases.SHAPES, [torch.float32] * 4, 0, "cpu")
        largest = set()
        for stage in cases.STAGES:
            groups = cases.grouped(rule, stage, params)
            largest |= {k for k, group in enumerate(groups) if any(p is params[0] for _, p in group["params"])}
            decays = [group["weight_decay"] for group in groups]
            assert all(decays) if stage.decay else not any(decays)
        assert len(largest) == len(rule.groups), rule.name
        options = {name for group in rule.groups for name, value in group.items() if value}
        assert options >= {
            name for name, value in rule.cls(params).defaults.items() if isinstance(value, float) and value
        }
    assert max(torch.Size(shape).numel() for shape in cases.SHAPES) > 16384


# ---- mistakes, planted ----------------------------------------------------------------------------------


def wrong_epsilon(patch):
    update = rules.AdamW.update
    patch.setattr(
        rules.AdamW,
        "update",
        staticmethod(lambda p, g, slot, counter, h: update(p, g, slot, counter, (*h[:3], h[3] / 2))),
    )


def largest(opt):
    return max((p for group in opt.param_groups for p in group["params"]), key=torch.Tensor.numel)


def after_each_step(change):
    """A mistake that any backend might make: `change(opt, p, before)` of the largest parameter after a step."""

    def plant(patch):
        own = backends.run

        def wrong(opt, step):
            p = largest(opt)
            before = p.detach().clone()
            own(opt, step)
            with torch.no_grad():
                change(opt, p, before)

        patch.setattr(backends, "run", wrong)

    return plant


@after_each_step
def missing_tail(opt, p, before):
    p.view(-1)[-5:] = before.view(-1)[-5:]


@after_each_step
def frozen_entry_moves(opt, p, before):
    if (keep := opt.keep_mask(p)) is not None and not keep.all():
        p[tuple((~keep).nonzero()[0])] += 1e-6


@after_each_step
def gradient_written(opt, p, before):
    p.grad.view(-1)[0] += 1e-6


def threads_matter(patch):
    factor = clip.factor
    off = lambda: 1 + (torch.get_num_threads() - 1) * 1e-12
    patch.setattr(clip, "factor", lambda limit, norm: factor(limit, norm) * off())


def resumed_average_starts_anew(patch):
    load = fuseopt.AdamW.load_state_dict

    def wrong(opt, state):
        load(opt, state)
        for made in opt.state.values():
            if "ema_0" in made:
                made["ema_0"] = made["ema_0"] + 0.5

    patch.setattr(fuseopt.AdamW, "load_state_dict", wrong)


def average_of_pruned_fades(patch):
    update = ema.update
    patch.setattr(ema, "update", lambda e, p, w, pruned, frozen: update(e, p, w, None, frozen))


def raises(patch):
    def wrong(*args):
        raise RuntimeError("planted\nin two lines")

    patch.setattr(reference, "run", wrong)


# mistake, stage, what the line of the failure must say
PLANTS = [
    (wrong_epsilon, "plain", "p of w0"),
    (missing_tail, "plain", "p of w0"),
    (frozen_entry_moves, "mask-freeze", "frozen of w0"),
    (gradient_written, "l1", "gradient of w0"),
    (threads_matter, "clip", "with 2 threads instead of one"),
    (resumed_average_starts_anew, "ema-timm", "saved and loaded"),
    (average_of_pruned_fades, "prune-threshold", "pruned of w"),
    (raises, "plain", "RuntimeError: planted in two lines"),
]


@pytest.mark.parametrize(("plant", "stage", "said"), PLANTS, ids=[getattr(p[0], "__name__", "plant") for p in PLANTS])
def test_a_planted_mistake_fails_and_is_named(plant, stage, said, capsys, monkeypatch):
    dtype = "fp64" if plant is threads_matter else "fp32"
    words = ["--rules", "adamw", "--dtypes", dtype, "--backends", "torch", "--stages", stage]
    assert run(capsys, *words)[0] == 0
    plant(monkeypatch)
    status, text, result = run(capsys, *words)
    assert status == 1 and not result["passed"] and "FAIL: 1 of 1 failed" in text
    (cell,) = result["cells"]
    assert cell["result"] == "fail" and any(said in line for line in cell["failures"]), cell["failures"]
    (line,) = [line for line in text.splitlines() if line.startswith(f"FAIL adamw {stage} {dtype} torch: ")]
    assert line.endswith(cell["repeat"]) and cell["failures"][0] in line
    assert main(cell["repeat"].split()[1:]) == 1, "the command that repeats it alone"


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled module")
def test_a_compiled_step_that_is_off_by_a_bit_is_not_torchs(capsys, monkeypatch):
    def last_bit(opt, p, before):
        p.view(torch.int32).view(-1)[3] ^= 1

    after_each_step(last_bit)(monkeypatch)
    status, text, _ = run(capsys, "--rules", "adam", "--dtypes", "fp32", "--backends", "cpu", "--stages", "torch-fused")
    assert status == 1 and "fused=True of torch.optim.Adam" in text


def test_weights_that_never_move_are_found(capsys, monkeypatch):
    """The copy takes the same gradients of zero: nothing but the count can tell."""

    def zeros(opt, params, *rest):
        for p in params:
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(cases, "set_gradients", zeros)
    status, text, _ = run(capsys, *QUICK, "--stages", "plain")
    assert status == 1 and "never moved" in text


# ---- the machine and the command line ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rules adamx", "adamx"),
        ("--stages prune", "prune-global"),
        ("--dtypes int8", "int8"),
        ("--backends gpu", "gpu"),
        ("--seed -1", "--seed -1"),
        ("--seed x", "--seed"),
        ("--threads 0", "--threads 0"),
        ("--json {folder}", "folder"),
        ("--json {folder}/no/x.json", "does not exist"),
        ("--bogus", "--bogus"),
        ("surplus", "surplus"),
        ("--model {folder}", "config.json"),
        ("--model {folder}/missing", "missing"),
        ("--model {folder}/noise", "neither a safetensors file"),
        ("--model {folder}/pickled.bin", "save its state_dict()"),
        ("--model {folder}/integers.pt", "nothing to train"),
        ("--model {folder}/cut.index.json", "lost.safetensors"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, said, capsys, tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "noise").write_bytes(b"\x00" * 64)
    (tmp_path / "pickled.bin").write_bytes(pickle.dumps(torch.nn.Linear(2, 2)))
    torch.save({"a": torch.zeros(3, dtype=torch.int64)}, tmp_path / "integers.pt")
    (tmp_path / "cut.index.json").write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))
    assert main(["verify", *words.format(folder=tmp_path).split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err
    assert captured.err.count("\n") == 1 and captured.err.startswith("fuseopt verify: ")


def test_a_backend_that_is_not_here(capsys, monkeypatch):
    monkeypatch.setattr(sweep, "availability", lambda: {"cpu": None, "torch": None, "cuda": "no GPU", "triton": "none"})
    assert main(["verify", "--backends", "cuda"]) == 2
    assert "--backends cuda: it is not on this machine: no GPU" in capsys.readouterr().err
    status, text, result = run(capsys, "--rules", "lion", "--stages", "plain", "--dtypes", "fp16")
    assert status == 0 and "not here: cuda: no GPU" in text
    assert result["backends"]["cuda"] == {"available": False, "why_not": "no GPU"}


def test_a_gpu_is_held_to_the_bits_of_the_cpu(capsys, monkeypatch, native):
    """The kernels of CUDA, compiled for the CPU, in its place."""
    emulated = pytest.importorskip("emulated")
    if emulated.why_not:
        pytest.skip(emulated.why_not)
    words = ["--rules", "adamw", "--stages", "all", "--dtypes", "fp32", "--backends", "cuda"]
    status, text, _ = run(capsys, *words)
    assert status == 0, text
    own = backends.run

    def wrong(opt, step):
        own(opt, step)
        if step.backend == "cuda":
            with torch.no_grad():
                largest(opt).view(torch.int32).view(-1)[3] ^= 1

    monkeypatch.setattr(backends, "run", wrong)
    status, text, result = run(capsys, *words)
    assert status == 1 and any("on the cpu backend" in line for line in result["cells"][0]["failures"]), text


def test_the_json_file_is_whole_or_not_there(tmp_path, monkeypatch):
    words = ["verify", *QUICK, "--stages", "plain", "--json", str(tmp_path / "out.json")]
    assert main(words) == 0
    before = (tmp_path / "out.json").read_text()
    assert json.loads(before)["passed"] and list(tmp_path.iterdir()) == [tmp_path / "out.json"]

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table.os, "replace", full)
    assert main(words) == 2
    assert (tmp_path / "out.json").read_text() == before and list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_it_imports_no_transformers_and_says_what_it_does():
    code = (
        "import sys; from fuseopt.__main__ import main\n"
        "try: main(['verify', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'transformers', 'safetensors', 'sklearn'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert all(stage.name in done.stdout for stage in sweep.ROWS) and "--model PATH" in done.stdout


# ---- shapes of a model --------------------------------------------------------------------------------------


def tensors():
    return {
        "a": torch.zeros(7, 5),
        "b": torch.zeros(7, 5),
        "c": torch.zeros(9, dtype=torch.bfloat16),
        "step": torch.zeros((), dtype=torch.int64),
    }


def test_files_of_every_kind_tell_the_same_shapes(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(tensors(), tmp_path / "model.safetensors")
    torch.save(tensors(), tmp_path / "whole.pt")
    torch.save({"model": tensors(), "epoch": 3}, tmp_path / "checkpoint.pt")
    shards = tmp_path / "shards"
    shards.mkdir()
    for k, names in enumerate((("a", "c"), ("b", "step"))):
        save_file({name: tensors()[name] for name in names}, shards / f"{k}.safetensors")
    places = {"a": "0.safetensors", "c": "0.safetensors", "b": "1.safetensors", "step": "1.safetensors"}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "whole.pt", tmp_path / "checkpoint.pt", shards):
        chosen = shapes.of_model(str(path))
        assert chosen.shapes == ((7, 5), (9,)) and chosen.dtypes == (torch.float32, torch.bfloat16)
        assert chosen.said == (
            "3 tensors, 79 entries, 2 different shapes",
            "1 tensors of int64 left out: fuseopt does not train them",
        )


def test_a_transformers_folder_with_nothing_but_its_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24).save_pretrained(tmp_path)
    chosen = shapes.of_model(str(tmp_path))
    assert (30522, 16) not in chosen.shapes and (512, 16) in chosen.shapes and (24, 16) in chosen.shapes
    assert "30522x16 to" in " ".join(chosen.said)


def test_a_model_is_swept_in_its_own_dtypes(tmp_path, capsys):
    torch.save(tensors(), tmp_path / "whole.pt")
    words = ["--rules", "adamw", "--stages", "all", "--backends", "torch", "--model", str(tmp_path / "whole.pt")]
    status, text, result = run(capsys, *words)
    assert status == 0, text
    assert [cell["dtype"] for cell in result["cells"]] == ["model"] and "3 tensors, 79 entries" in text
    status, _, result = run(capsys, *words, "--dtypes", "fp16")
    assert status == 0 and [cell["dtype"] for cell in result["cells"]] == ["fp16"]


def test_large_models_are_cut(monkeypatch):
    found = (
        [((50_000, 4096), torch.float32)]
        + [((4096, k), torch.float32) for k in range(1, 100)]
        + [((3,), torch.float32)]
    )
    chosen = shapes._choose(found)
    sizes = [torch.Size(shape).numel() for shape in chosen.shapes]
    assert len(sizes) == shapes.TENSORS and sum(sizes) <= shapes.ENTRIES and sizes[0] > 16384 and sizes[-1] == 3
    assert "50000x4096 to 9x4096" in chosen.said[2] and "24 are run" in chosen.said[1]
    assert shapes.cut((2, 300, 1000), 500) == (1, 1, 500)
    assert shapes.cut((5, 7), 100) == (5, 7)
