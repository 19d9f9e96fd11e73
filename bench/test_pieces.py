"""Times the pieces of a step alone: every rule in every dtype, every stage, the selection of pruning.

    pytest bench/test_pieces.py                        pytest-benchmark's table, options and JSON
    pytest bench/test_pieces.py -k "AdamW and float32"

Each piece is compared with backend="torch" just before it is timed, and fails instead if it differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

import fuseopt
from fuseopt import cpu, rules, schema

ROWS, COLUMNS = 1024, 1024
STEPS = 3  # that are compared
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
LR = 2.0**-10

# What a class takes beside its defaults, to reach every kernel of schema.RULES; a rule needs no line here.
MORE = {
    fuseopt.Adam: [{"amsgrad": True}],
    fuseopt.SGD: [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
}


@dataclass
class Piece:
    """An optimizer to time."""

    name: str
    rule: type
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=dict)
    prepare: Callable = lambda opt, p: None  # called with the new optimizer and its parameter
    shape: tuple[int, int] = (ROWS, COLUMNS)


def plain() -> list[Piece]:
    """Every rule of the registry in every dtype."""
    pieces = []
    for rule in rules.ALL:
        for options in [{}, *MORE.get(rule, [])]:
            for dtype in schema.DTYPES:
                words = [rule.__name__, *options, str(dtype).removeprefix("torch.")]
                pieces.append(Piece("-".join(words), rule, dtype, {"lr": LR, **options}))
    return pieces


def some(shape: tuple[int, ...], share: float = 0.9) -> torch.Tensor:
    """A boolean mask that is the same at every call."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share


STAGES = {  # what is added to AdamW in fp32
    "mask-elements": {"prepare": lambda opt, p: opt.mask(p, some(p.shape))},
    "mask-rows": {"prepare": lambda opt, p: opt.mask(p, some((p.shape[0], 1)))},
    "mask-columns": {"prepare": lambda opt, p: opt.mask(p, some((p.shape[1],)))},
    "mask-gradient": {"prepare": lambda opt, p: opt.mask(p, some(p.shape), mode="grad")},
    "clip": {"options": {"max_grad_norm": 1.0}},
    "l1": {"options": {"l1": 1e-3}},
    "ema": {"options": {"ema": fuseopt.EMA(0.99)}},
    "ema-timm": {"options": {"ema": fuseopt.EMA(0.99, warmup="timm")}},
    "ema-two": {"options": {"ema": [fuseopt.EMA(0.9), fuseopt.EMA(0.99)]}},
    "prune-threshold": {"options": {"prune": fuseopt.Prune(threshold=0.01)}},
    "prune-standing": {"options": {"prune": fuseopt.Prune(0.8)}},  # after its one selection
    "statistics": {"options": {"statistics": True}},
}


def stages() -> list[Piece]:
    """Every stage alone."""
    return [
        Piece(
            name,
            fuseopt.AdamW,
            options={"lr": LR, **more.get("options", {})},
            prepare=more.get("prepare", Piece.prepare),
        )
        for name, more in STAGES.items()
    ]


# Nothing moves at lr=0, so both backends rank the same bits. The first compared steps select 4 entries in a
# thousand each; the timed ones go on, every one with a selection among 4M entries.
SELECTION = Piece(
    "selection-4M",
    fuseopt.AdamW,
    options={"lr": 0.0, "prune": fuseopt.Prune(0.8, schedule="linear", begin=1, end=200)},
    shape=(2048, 2048),
)


def build(piece: Piece, backend: str | None) -> tuple[fuseopt.AdamW, torch.nn.Parameter]:
    """The optimizer and its parameter, with a gradient; the same numbers at every call."""
    random = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter((torch.randn(piece.shape, generator=random) * 0.02).to(piece.dtype))
    p.grad = (torch.randn(piece.shape, generator=random) * 0.01).to(piece.dtype)
    opt = piece.rule([p], backend=backend, **piece.options)
    piece.prepare(opt, p)
    return opt, p


def verify(piece: Piece, opt, p: torch.nn.Parameter) -> None:
    """Take a few steps beside the torch reference and compare the parameter and every state tensor."""
    reference, q = build(piece, "torch")
    start = p.detach().clone()
    for _ in range(STEPS):
        opt.step()
        reference.step()
    compare = {"p": (p.detach(), q.detach())}
    compare |= {key: (value, reference.state[q][key]) for key, value in opt.state[p].items()}
    for key, (got, expected) in compare.items():
        if isinstance(got, torch.Tensor) and got.is_floating_point():
            rtol = TOLERANCE[piece.dtype]
            atol = rtol * float(expected.abs().double().mean())
            torch.testing.assert_close(
                got, expected, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
            )
        else:
            assert (
                torch.equal(torch.as_tensor(got), torch.as_tensor(expected))
                if key != "mask_mode"
                else got == expected
            )
    if piece is not SELECTION:
        assert not torch.equal(p.detach(), start), "nothing moved"


@pytest.mark.skipif(cpu.native_error() is not None, reason=str(cpu.native_error()))
@pytest.mark.parametrize("piece", [*plain(), *stages(), SELECTION], ids=lambda piece: piece.name)
def test_piece(piece: Piece, benchmark):
    opt, p = build(piece, None)
    verify(piece, opt, p)
    moved = opt.explain().bytes_per_step
    benchmark.extra_info |= {"bytes_per_step": moved, "elements": p.numel(), "backend": opt.explain().backend}
    benchmark.pedantic(opt.step, rounds=30, iterations=1, warmup_rounds=2)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["gigabytes_per_second"] = moved / benchmark.stats.stats.median / 1e9
