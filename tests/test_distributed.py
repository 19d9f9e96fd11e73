"""Several processes are one optimizer: sharded and split parameters step as whole ones in one process do."""

import re

import pytest
import torch
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import sharded
from ranks import on_ranks
from torch import Tensor

import fuseopt


def assert_equal(found: dict, expected: dict, what: str) -> None:
    """Bit for bit; norms, which are summed in another order, to 1e-13, and what is clipped by them to 1 ulp."""
    assert found.keys() == expected.keys(), what
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert found[key].dtype == value.dtype, f"{what} {key}"
            tolerance = torch.finfo(value.dtype).eps if "clipped" in what and value.is_floating_point() else 0.0
            torch.testing.assert_close(found[key], value, rtol=tolerance, atol=0.0, msg=lambda m: f"{what} {key}: {m}")
        elif key == "statistics":
            assert found[key] == pytest.approx(value, rel=1e-13), what
        else:
            assert found[key] == value, f"{what} {key}"


@pytest.mark.parametrize("world", (2, 3, 4))
def test_many_processes_step_as_one(world):
    """Bit for bit, in everything but the norms of the statistics."""
    expected = sharded.cases(sharded.one_process)
    for rank in on_ranks(world, sharded.many_processes_all_cases, world):
        assert rank.keys() == set(sharded.placements_over(world))
        for placement, found in rank.items():
            for case, mine in found.items():
                assert_equal(mine, expected[case], f"{placement} {case}")


def test_what_is_refused():
    messages = {
        "sharded": "ValueError: 'w' is a DTensor.*leave out sharded=True",
        "plain state": "ValueError: state 'exp_avg' of 'w' is not spread over the processes",
        "whole moments": "ValueError: state 'exp_avg' of parameter 0.*set_optimizer_state_dict",
        "mask": r"ValueError: mask of 'w'.*\(3, 4\).*\(4, 4\)",
        "verify": "ValueError: verify.*one process",
    }
    for found in on_ranks(2, sharded.refusals):
        assert found.keys() == messages.keys()
        for what, message in messages.items():
            assert re.match(message, found[what]), found[what]


def test_a_gradient_placed_otherwise_is_redistributed():
    p = torch.nn.Parameter(torch.ones(4, 4))
    opt = fuseopt.AdamW([p])
    for t in range(1, 3):
        p.grad = sharded.gradient((4, 4), torch.float32, t)
        opt.step()
    for found in on_ranks(2, sharded.gradient_placed_otherwise):
        assert torch.equal(found, p.detach())
