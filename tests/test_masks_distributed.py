"""Masks that are recomputed where several processes share the parameters: the same as one process would."""

import pytest
import torch
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import masked
import sharded
from ranks import on_ranks
from test_distributed import assert_equal


@pytest.fixture(scope="module")
def in_one_process():
    return masked.one_process()


@pytest.mark.parametrize("placement", sharded.PLACEMENTS)
def test_dtensors_are_masked_as_one_process_masks_them(placement, in_one_process):
    """Bit for bit: masks, scores, weights, averages, of every ready mask, in every type; ties included."""
    world = torch.Size(sharded.PLACEMENTS[placement][0]).numel()
    for found in on_ranks(world, masked.many_processes, placement):
        for case, mine in found.items():
            assert_equal(mine, in_one_process[case], f"{placement} {case}")


@pytest.mark.parametrize("world", (2, 3))
def test_processes_with_parameters_of_their_own_rank_together(world):
    """sharded=True; of three processes the last has none."""
    ranks = on_ranks(world, masked.each_its_own)
    for k, expected in enumerate(masked.each_its_own()):
        found = [pair for rank in ranks for pair in rank[k]]
        for mine, whole in zip(found, expected, strict=True):
            assert all(map(torch.equal, mine, whole)), masked.OWN[k]


@pytest.mark.parametrize("steps", (0, 1, 5))
def test_a_checkpoint_of_2_processes_goes_on_in_1_and_2(steps, tmp_path):
    expected = masked.saved_after(steps, None, shard=False)
    folder = str(tmp_path / "checkpoint")
    for found in on_ranks(2, masked.saved_after, steps, folder, True):
        assert_equal(found, expected, "saved")
    assert_equal(masked.resumed_from(folder, steps, shard=False), expected, "resumed in this process")
    for found in on_ranks(2, masked.resumed_from, folder, steps, True):
        assert_equal(found, expected, "resumed on 2")
