"""The compiled ranking of weights against sorting: whatever the instruction set, the sample and the spread of the values."""

import pytest
import torch
from cases import BF16, DTYPES, F32, assert_same_bits, ident
from torch import nn

import fuseopt
from fuseopt import Prune, cpu_ranker, patterns
from fuseopt.stages import prune as reference

N = 70_001  # more than a sample is taken of, a part of a word and of a block


def values(name, dtype):
    """N weights; the magnitudes of "one value" all tie, those of "columns" are uneven in every block."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(0))
    x = {
        "normal": x,
        "one value": torch.full_like(x, 0.5),
        "many scales": x * 10.0 ** (torch.arange(N) % 60 - 30),
        "rising": torch.linspace(-1, 3, N),
        "mostly zero": x * (torch.arange(N) % 10 == 0),
        "not numbers": x.where(x < 1, torch.nan),
        "columns": x * (1 + 1000 * (torch.arange(N) // 64 % 64 == 7)),
    }[name]
    return x.to(dtype)[None].clone()


def pruned(x, sparsity, **options):
    """What a step prunes of a parameter with these values."""
    p = nn.Parameter(x.clone())
    p.grad = torch.ones_like(p)
    opt = fuseopt.SGD([p], lr=0.0, prune=Prune(sparsity, **options), backend="cpu")
    opt.step()
    gone = opt.prune_mask(p)
    assert_same_bits(p.detach().nan_to_num(9.0), torch.where(gone, 0.0, x).nan_to_num(9.0))
    return gone


@pytest.mark.parametrize("dtype", (F32, BF16), ids=ident)
@pytest.mark.parametrize("sparsity", (0.3, 0.9999))
@pytest.mark.parametrize(
    "name", ("normal", "one value", "many scales", "rising", "mostly zero", "not numbers", "columns")
)
def test_the_smallest_go_exactly(name, sparsity, dtype, native):
    x = values(name, dtype)
    free = torch.ones_like(x, dtype=torch.bool)
    (expected,) = reference.smallest([x], [free], round(sparsity * N))
    assert torch.equal(pruned(x, sparsity), expected)


@pytest.mark.parametrize("large", (0, 1 << 30), ids=("at once", "in steps"))
@pytest.mark.parametrize("shift", (-0.3, 0.3, 1.0))
def test_a_sample_that_misleads_costs_time_alone(shift, large, native, monkeypatch):
    """The window is put beside the key; once it is not in it, and all is counted."""
    window = cpu_ranker.Ranker._window
    monkeypatch.setattr(cpu_ranker, "LARGE", large)
    monkeypatch.setattr(cpu_ranker.Ranker, "_window", lambda self, count, of: window(self, count * (1 - shift / 2), of))
    x = values("normal", F32)
    (expected,) = reference.smallest([x], [torch.ones_like(x, dtype=torch.bool)], N // 2)
    assert torch.equal(pruned(x, (N // 2) / N), expected)


@pytest.mark.parametrize("pattern", ("unstructured", "rows", "2:4", "3:7", "5:32"))
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_instruction_sets_prune_the_same(dtype, pattern, native):
    x = torch.randn(37, 91, 3).mul(4).round().to(dtype)
    sparsity = 0.5 if pattern in ("unstructured", "rows") else None
    masks = []
    for name in ("portable", "avx2", "avx512"):
        if native.set_instruction_set(name):
            masks.append(pruned(x, sparsity, pattern=pattern))
    assert masks[0].any()
    for one in masks:
        assert torch.equal(one, masks[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_sums_of_rows_are_those_of_torch(dtype, native):
    for name in ("portable", "avx2", "avx512"):
        if not native.set_instruction_set(name):
            continue
        for columns in (*range(1, 20), 63, 64, 65, 1000, 4099):
            x = torch.randn(5, columns, dtype=torch.float64).to(dtype)
            assert_same_bits(cpu_ranker.RowRanker.squares(None, x), patterns.squares(x))
