"""Under DDP, FSDP2, tensor parallel, ZeroRedundancyOptimizer and torch.distributed.checkpoint."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import engines
from ranks import on_ranks
from torch import Tensor

import fuseopt

CLASSES = (fuseopt.AdamW, torch.optim.AdamW)
RUNS = [
    ("ddp", 2),
    ("ddp, gradients in buckets", 2),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("fsdp2 in bf16", 2),
    ("tensor parallel and fsdp2", 4),
]


def assert_close(found, expected, what: str) -> None:
    """Within what an fp32 sum of gradients in another order may differ."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-7, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(("engine", "world"), RUNS, ids=lambda x: str(x))
def test_the_same_as_torchs_optimizer(engine, world):
    """torch's fused AdamW differs by 1 ulp at ragged sizes."""
    for ours, torchs in on_ranks(world, engines.ours_beside_torchs, engine):
        for name, w in torchs.items():
            assert_close(ours[name], w, name)
            assert not torch.equal(w, engines.weights(engines.network()).get(name.removeprefix("module.")))


@pytest.mark.parametrize(("engine", "world"), [run for run in RUNS if "bf16" not in run[0]], ids=lambda x: str(x))
def test_mask_clip_prune_and_average(engine, world):
    """As one process does; the same entries are pruned, 70% of the whole model's."""
    expected = engines.with_everything("one process")
    total = sum(p.numel() for p in expected["pruned"] if p is not None)
    assert sum(int(p.sum()) for p in expected["pruned"] if p is not None) == round(0.7 * total)
    shares = 0
    for found in on_ranks(world, engines.with_everything, engine):
        for mine, whole in zip(found["pruned"], expected["pruned"], strict=True):
            assert (mine is None) == (whole is None) and (mine is None or torch.equal(mine, whole))
        assert_close(found["averages"], expected["averages"], "average")
        if "ddp" not in engine:
            assert_close(found["copied"], expected["copied"], "copied average")
        shares += found["bytes"]
        assert ("this process's part" in found["explained"]) == ("ddp" not in engine)
    if "fsdp2" in engine and world < 4:
        assert shares == pytest.approx(expected["bytes"], rel=0.01)  # each moves its part only


@pytest.mark.parametrize("copied", (False, True))
def test_forwards_see_what_was_swapped(copied):
    """FSDP2 keeps what a forward without backward has gathered; the weights written meanwhile must not be missed."""
    for found in on_ranks(2, engines.forwards_around_a_swap, copied):
        for what, (mine, expected) in found.items():
            assert_close(mine, expected, what)


@pytest.mark.parametrize(("placed", "target"), [("whole", "rows"), ("rows", "columns"), ("columns", "whole")])
def test_an_average_is_copied_to_a_model_placed_otherwise(placed, target):
    for found in on_ranks(2, engines.copied_average, placed, target):
        assert all(torch.equal(w, average) for w, average in found)


@pytest.mark.parametrize("world", (2, 3))
def test_zero_redundancy_optimizer(world):
    """Norm and pruning over all processes, and a consolidated checkpoint half-way."""
    expected = engines.zero_redundancy(sharded=False)
    for found in on_ranks(world, engines.zero_redundancy, True):
        for name, w in expected.items():
            assert torch.equal(found[name] == 0, w == 0), name
            assert_close(found[name], w, name)


@pytest.mark.parametrize("steps", (1, 3, 6), ids=("before-pruning", "between-prunings", "after-pruning"))
@pytest.mark.parametrize("saved_by", ("one process", 2))
def test_checkpoint_on_2_processes_resumes_on_1_and_3(steps, saved_by, tmp_path):
    """Bit for bit on 1 and 2, masks, averages and schedules included; on 3 the mean gradient rounds otherwise."""
    expected = engines.saved_after(steps, None, sharded=False)
    folder = str(tmp_path / "checkpoint")
    if saved_by == "one process":
        assert_same(engines.saved_after(steps, folder, sharded=False), expected, exact=True)
    else:
        for found in on_ranks(saved_by, engines.saved_after, steps, folder, True):
            assert_same(found, expected, exact=True)
    assert_same(engines.resumed_from(folder, steps, sharded=False), expected, exact=True)
    for world in (1, 3):
        for found in on_ranks(world, engines.resumed_from, folder, steps, True):
            assert_same(found, expected, exact=world == 1)


def assert_same(found: dict, expected: dict, exact: bool) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor) and (exact or value.dtype == torch.bool):
            assert torch.equal(found[key], value), key
        elif isinstance(value, Tensor):
            assert_close(found[key], value, key)
        else:
            assert found[key] == value, key


def test_an_overflow_on_one_process_skips_the_step_on_all():
    for ours, torchs in zip(*(on_ranks(2, engines.overflow_on_one_process, c) for c in CLASSES), strict=True):
        for (scale, w), (expected, v) in zip(ours, torchs, strict=True):
            assert scale == expected
            assert_close(w, v, "weights")
        assert torch.equal(ours[0][1], ours[1][1]) and not torch.equal(ours[1][1], ours[2][1])


def test_the_example_trains_as_torchs_and_resumes(tmp_path):
    path = Path(__file__).resolve().parents[1] / "examples" / "fsdp2.py"
    for found in on_ranks(2, engines.example, str(path), str(tmp_path / "saved")):
        assert found["ours"] == pytest.approx(found["torch"], rel=1e-4)
        assert found["ours"][-1] < 0.8 * found["ours"][0]
        (losses, zeros), (first, _), (second, resumed_zeros) = (
            found[k] for k in ("whole", "first half", "second half")
        )
        assert first + second == losses and len(first) == len(second) == 15
        assert 0 < zeros == resumed_zeros


def test_files_of_torchs_optimizer_under_torch_distributed_checkpoint(tmp_path):
    for found in on_ranks(2, engines.torchs_files, str(tmp_path / "saved")):
        for name, w in found["torch"].items():
            assert_close(found["ours"][name], w, name)
            assert_close(found["average"][name], w, name)
        assert found["average is a copy"]
        assert any("ema_0 start anew" in message for message in found["told"]), found["told"]
