"""`torchrun --nproc-per-node 2 -m fuseopt finetune` on the CPU: the weights of one process, written once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors", "yaml"):
    pytest.importorskip(extra)

import compressed
from safetensors.torch import load_file

from fuseopt.__main__ import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
PATHS = os.pathsep.join([str(Path(__file__).resolve().parent.parent), *sys.path])
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What compressed.py wrote in two processes, and the same run by one, in alone."""
    folder = tmp_path_factory.mktemp("distributed")
    done = subprocess.run([*TORCHRUN, compressed.__file__, folder], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main([*compressed.OPTIONS, "--output_dir", str(folder / "alone")]) == 0
    return folder


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_two_processes_learn_what_one_learns(folder):
    first, second = (json.loads((folder / name / "metrics.json").read_text()) for name in ("alone", "run"))
    assert second["verification"]["passed"] and second["options"]["per_device_train_batch_size"] == 16
    assert first["sparsity"]["raw_zeros"] == second["sparsity"]["raw_zeros"] > 0
    assert abs(first["accuracy"]["raw"] - second["accuracy"]["raw"]) < 0.01
    left, right = weights(folder / "alone"), weights(folder / "run")
    assert left.keys() == right.keys()
    for name in left:  # the same batches, summed up in another order
        torch.testing.assert_close(left[name], right[name], rtol=0.02, atol=0.002)


def test_one_process_prints_and_writes(folder):
    out = (folder / "run-0.txt").read_text()
    assert out.count("PASS") == 1 and out.count("written to") == 1 and (folder / "run-1.txt").read_text() == ""
    assert not list((folder / "run").glob(".writing*"))


def test_two_processes_resume_with_the_same_bits(folder):
    left, right = weights(folder / "run"), weights(folder / "resumed")
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_bad_input_says_one_line(folder):
    err = (folder / "refused-0.txt").read_text()
    assert err.startswith("fuseopt finetune: --sparsity 2") and err.count("\n") == 1
    assert (folder / "refused-1.txt").read_text() == "" and not (folder / "refused").exists()


def test_compression_runs_and_trains_nearly_alike(folder):
    """Every hook runs; fp16, bf16 and powersgd end near the exact mean, which one process has."""
    found = load_file(folder / "compressed.safetensors")
    alone = compressed.weights(compressed.trainer(per_device_train_batch_size=8))  # as many rows a step
    start = dict(compressed.trainer().model.named_parameters())
    for compress, allowed in (("none", 1e-9), ("fp16", 0.01), ("bf16", 0.05), ("powersgd", 0.5)):
        away = max(float((found[f"{compress} {name}"] - p).norm()) for name, p in alone.items())
        moved = max(float((p - start[name]).norm()) for name, p in alone.items())
        assert away <= allowed * moved, (compress, away, moved)
        assert (away > 1e-7) == (int(found[f"{compress} calls"]) > 0) == (compress != "none"), (compress, away)


def test_ctrl_c_stops_both_after_one_checkpoint(tmp_path):
    folder = tmp_path / "stopped"
    long = "--max_steps 2000 --prune_begin 5 --prune_end 15 --save_steps 10 --output_dir".split()
    command = [*TORCHRUN, "-m", "fuseopt", *compressed.OPTIONS, *long, folder]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=ENVIRONMENT, text=True, **pipes) as it:
        while not list(folder.glob("checkpoint-*")) and it.poll() is None:
            time.sleep(0.05)
        it.send_signal(signal.SIGINT)
        _, err = it.communicate(timeout=120)
    assert "interrupted; last checkpoint" in err, err
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert (newest / "rng_state_0.pth").exists() and (newest / "rng_state_1.pth").exists()
