"""`torchrun --nproc-per-node 2 -m fuseopt finetune` on the CPU: the weights of one process, written once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors", "yaml"):
    pytest.importorskip(extra)

from safetensors.torch import load_file

# Without dropout, whose random numbers differ between processes; a number of rows that two processes share evenly
# in each batch but the last.
OPTIONS = (
    "--classes 5 6 7 8 9 --dropout 0 --freeze stem.* --average ema --sparsity 0.5 --learning_rate 0.002 --max_steps 24 "
    "--save_strategy steps --save_steps 12 --eval_strategy steps --eval_steps 12 --verify 6 --disable_tqdm true"
).split()


def command(processes, folder, *extra):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    start = [sys.executable, *(torchrun if processes > 1 else [])]
    return [*start, "-m", "fuseopt", "finetune", *OPTIONS, "--output_dir", str(folder), *extra]


def run(processes, folder, *extra):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(processes, folder, *extra), capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{number of processes: (folder, what it printed)} of the same command."""
    folder = tmp_path_factory.mktemp("distributed")
    made = {}
    for processes in (1, 2):
        code, out, err = run(processes, folder / str(processes))
        assert code == 0, err
        made[processes] = folder / str(processes), out
    return made


def test_two_processes_learn_what_one_learns(runs):
    (one, _), (two, _) = runs[1], runs[2]
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    assert second["verification"]["passed"] and second["options"]["per_device_train_batch_size"] == 16
    assert first["sparsity"]["raw_zeros"] == second["sparsity"]["raw_zeros"] > 0
    assert abs(first["accuracy"]["raw"] - second["accuracy"]["raw"]) < 0.01
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert left.keys() == right.keys()
    for name in left:  # the same batches, summed up in another order
        torch.testing.assert_close(left[name], right[name], rtol=0.02, atol=0.002)


def test_one_process_prints_and_writes(runs):
    out = runs[2][1]
    assert out.count("PASS") == 1 and out.count("written to") == 1
    assert not list(runs[2][0].glob(".writing*"))


def test_two_processes_resume_with_the_same_bits(runs, tmp_path):
    code, _, err = run(2, tmp_path / "again", "--resume_from_checkpoint", str(runs[2][0] / "checkpoint-12"))
    assert code == 0, err
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (runs[2][0], tmp_path / "again"))
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_ctrl_c_stops_both_after_one_checkpoint(tmp_path):
    folder = tmp_path / "stopped"
    long = ["--max_steps", "2000", "--prune_begin", "5", "--prune_end", "15", "--save_steps", "10"]
    with subprocess.Popen(command(2, folder, *long), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as it:
        while not list(folder.glob("checkpoint-*")) and it.poll() is None:
            time.sleep(0.05)
        it.send_signal(signal.SIGINT)
        _, err = it.communicate(timeout=120)
    assert "interrupted; last checkpoint" in err, err
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert (newest / "rng_state_0.pth").exists() and (newest / "rng_state_1.pth").exists()


def test_bad_input_says_one_line(tmp_path):
    code, out, err = run(2, tmp_path / "bad", "--sparsity", "2")
    assert code != 0 and err.count("fuseopt finetune:") == 1 and "--sparsity" in err
    assert not (tmp_path / "bad").exists()
