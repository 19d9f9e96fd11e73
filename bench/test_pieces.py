"""Times every piece of a step alone: rules, stages and dtypes of `fuseopt verify`'s tables, and a selection.

    pytest bench/test_pieces.py                       pytest-benchmark's table, options and JSON
    pytest bench/test_pieces.py -k "sgd and bf16"     a rule's plain step, in a dtype
    pytest bench/test_pieces.py -k "clip"             a stage around AdamW, in every dtype

Each piece is verified just before it is timed, on the same tensors, as `fuseopt verify` does it: beside float64, with
saving and loading half-way. It fails instead if that does.
"""

import pytest
import torch

import fuseopt
from fuseopt import cpu
from fuseopt.verify import cases, trial

pytest.importorskip("pytest_benchmark")

PLAIN = next(stage for stage in cases.STAGES if stage.name == "plain")
SHAPE = (512, 512)  # of each tensor; one for each parameter group of the rule
ROUNDS, SEED = 30, 0


def pieces() -> list:
    """Every rule in every dtype, then every stage around AdamW in every dtype."""
    pairs = [(rule, PLAIN) for rule in cases.RULES] + [(cases.RULES[0], s) for s in cases.STAGES if s is not PLAIN]
    found = [(rule, stage, dtype) for rule, stage in pairs for dtype in cases.DTYPES]
    named = [("-".join((rule.name, stage.name, dtype)), (rule, stage, dtype)) for rule, stage, dtype in found]
    return [pytest.param(*piece, id=name) for name, piece in named if not cases.why_not(*piece, "cpu")]


@pytest.mark.skipif(cpu.native_error() is not None, reason=str(cpu.native_error()))
@pytest.mark.parametrize(("rule", "stage", "dtype"), pieces())
def test_piece(rule: cases.Rule, stage: cases.Stage, dtype: str, benchmark):
    shapes = (SHAPE,) * len(rule.groups)
    made = trial.Trial(rule, stage, "cpu", SEED, shapes, (cases.DTYPES[dtype],) * len(shapes), "cpu", None)
    assert not trial.check(made).failures
    params = made.parameters()
    opt = made.run(made.build(params), params)  # past the steps that select: what they pruned stands
    cases.set_gradients(opt, params, stage, SEED, cases.STEPS + 1)
    timed(benchmark, opt, params, ROUNDS)


def test_selection(benchmark):
    """Every step selects among 4M entries. Nothing moves at lr 0, so that both backends rank the same bits."""
    steps = 12

    def build(backend: str | None) -> tuple:
        p = torch.nn.Parameter(torch.randn(2048, 2048, generator=torch.Generator().manual_seed(SEED)))
        p.grad = torch.ones_like(p)
        prune = fuseopt.Prune(0.8, schedule="linear", begin=1, end=steps)
        return fuseopt.SGD([p], lr=0.0, prune=prune, backend=backend), p

    (opt, p), (reference, q) = build(None), build("torch")
    for _ in range(2):
        opt.step()
        reference.step()
    assert torch.equal(p, q) and torch.equal(opt.prune_mask(p), reference.prune_mask(q)) and opt.prune_mask(p).any()
    timed(benchmark, opt, [p], steps - 4)


def timed(benchmark, opt, params: list, rounds: int) -> None:
    """Time steps, and note their bytes."""
    told = opt.explain()
    elements = sum(p.numel() for p in params)
    benchmark.extra_info |= {"bytes_per_step": told.bytes_per_step, "elements": elements, "backend": told.backend}
    benchmark.pedantic(opt.step, rounds=rounds, iterations=1, warmup_rounds=2)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["gigabytes_per_second"] = told.bytes_per_step / benchmark.stats.stats.median / 1e9
