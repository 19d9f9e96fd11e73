"""Pruning to patterns, and pruning that regrows, in several processes as in one."""

import re

import pytest
import torch
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import sharded_patterns
from ranks import on_ranks


def assert_equal(found, expected, what: str) -> None:
    """Bit for bit."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, msg=lambda m: f"{what}: {m}")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), what
        for key in expected:
            assert_equal(found[key], expected[key], f"{what} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), what
        for mine, other in zip(found, expected, strict=True):
            assert_equal(mine, other, what)
    else:
        assert found == expected, what


@pytest.mark.parametrize("world", (2, 3))
def test_many_processes_prune_as_one(world):
    """Split by rows, by columns at multiples of m, and replicated; with shards that are empty, and many ties."""
    backends = sharded_patterns.backends_in(world)
    cases = {(name, backend) for name in sharded_patterns.PATTERNS for backend in backends}
    expected = {case: sharded_patterns.train(*case, torch.clone) for case in cases}
    for rank in on_ranks(world, sharded_patterns.many_processes, world):
        assert len(rank) == len(backends) * (2 * 6 + 3)
        for (pattern, backend, placement), found in rank.items():
            assert_equal(found, expected[pattern, backend], f"{pattern} {backend} {placement}")


def test_what_is_split_within_groups_or_rows_is_refused():
    messages = (
        r"'w' of shape \(4, 12\) is split .* within groups of 4.*dimension 0, or at multiples of 4",
        r"'w' has placements .*'rows' needs whole rows.*dimension 0 only",
        r"'2:4' keeps 2 of every 4 entries, but in 4 groups of 'w' masks freeze more",
    )
    for said in on_ranks(2, sharded_patterns.refusals):
        assert len(said) == len(messages)
        for message, text in zip(messages, said, strict=True):
            assert re.search(message, text), text


def test_rows_of_plain_parts_are_ranked_together():
    """sharded=True: the rows of all processes, one of which has none, are one selection."""
    expected = sharded_patterns.plain_parts(1)
    assert sum(int((p == 0).all(-1).sum()) for p in expected.values() if p.dim() == 2) > 0
    for found in on_ranks(3, sharded_patterns.plain_parts, 3):
        for k, p in found.items():
            assert torch.equal(p, expected[k]), k


def test_torchs_pruning_knows_no_dtensors():
    for said in on_ranks(2, sharded_patterns.refused_conversion):
        assert re.search("'weight' is a DTensor.*leave model out", said), said


def test_a_process_with_nothing_to_check_says_so_without_an_error():
    assert on_ranks(2, sharded_patterns.n_m_on_one_process) == [[True, 1], [True, 0]]
