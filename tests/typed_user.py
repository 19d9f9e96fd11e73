"""A program as a user types it, which mypy --strict checks (test_typing.py); it is never run."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fuseopt
from fuseopt.integrations import averaging
from fuseopt.stages.statistics import Statistics

model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def every_class() -> Iterator[torch.optim.Optimizer]:
    """Any of the forms in which torch takes parameters, and torch's arguments."""
    yield fuseopt.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=0.1, amsgrad=True, fused=True)
    yield fuseopt.Adam(model.named_parameters(), lr=torch.tensor(1e-3), decoupled_weight_decay=True)
    yield fuseopt.SGD([{"params": model[0].parameters(), "lr": 0.1, "prune": None}], momentum=0.9, nesterov=True)
    yield fuseopt.NAdam([*model.parameters()], foreach=False, momentum_decay=4e-3)
    yield fuseopt.Adagrad(model.parameters(), lr_decay=0.1, maximize=True)
    yield fuseopt.Lion(model.parameters(), betas=(0.9, 0.98), capturable=True)


def options() -> fuseopt.AdamW:
    """The stage options, of which mypy knows names and types."""
    average = fuseopt.EMA(0.999, warmup="timm", dtype=torch.float32)
    other = fuseopt.EMA(warmup="edm2", sigma_rel=0.1, dtype="parameter")
    prune = fuseopt.Prune(0.8, scope="tensor", schedule="linear", begin=10, end=50, every=10, moments="keep")
    fuseopt.SGD(model.parameters(), ema=[average, other], prune=fuseopt.Prune(pattern="2:4"), sharded=False)
    fuseopt.AdamW(model.parameters(), learning_rate=1e-3)  # type: ignore[call-arg]
    fuseopt.AdamW(model.parameters(), max_grad_norm="1")  # type: ignore[arg-type]
    fuseopt.EMA(0.9, warmup="karras")  # type: ignore[arg-type]
    fuseopt.Prune(0.5, scope="layer")  # type: ignore[arg-type]
    return fuseopt.AdamW(
        model.parameters(), max_grad_norm=1.0, l1=1e-4, ema=average, prune=prune, statistics=True, backend="cpu"
    )


def masks(opt: fuseopt.AdamW) -> None:
    weight = model[0].get_parameter("weight")
    opt.mask(weight, keep=torch.arange(4)[:, None] > 1, mode="grad")
    opt.mask(weight, fuseopt.masks.nonzero)
    opt.mask("*.weight", fn=fuseopt.masks.TopGradient(0.1, scope="global"), every=10)
    opt.mask("*.bias", fn=lambda param, grad, state: grad.abs() > 1e-3)
    opt.mask(weight, mode="frozen")  # type: ignore[arg-type]
    opt.mask(weight, fn=fuseopt.masks.Random(0.1, seed=1))
    fuseopt.masks.Random(0.1, scope="tensor")  # type: ignore[call-arg]
    assert_type(opt.keep_mask(weight), Tensor | None)
    assert_type(opt.prune_mask("0.weight"), Tensor | None)
    opt.finalize_pruning(model)


def train(opt: fuseopt.AdamW) -> float:
    """step() has the type of the closure's loss; torch's schedulers and scaler take the optimizer."""
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    scaler = torch.amp.GradScaler("cpu")

    def number() -> float:
        return 0.0

    def tensor() -> Tensor:
        return model(torch.zeros(1, 4)).sum()

    opt.step()
    opt.zero_grad(set_to_none=True)
    scaler.step(opt)
    schedule.step()
    assert_type(opt.step(tensor), Tensor)
    return assert_type(opt.step(number), float)


def averages(opt: fuseopt.AdamW) -> None:
    assert_type(opt.swap_ema(), AbstractContextManager[None])
    with opt.swap_ema(0):
        model.eval()
    opt.average_buffers(model)
    opt.copy_ema_to(model, 0)
    opt.load_ema_state_dict(opt.ema_state_dict(model, format="timm"), model, updates=3)
    opt.load_state_dict(opt.state_dict())
    averaging([opt], 0)[0].swap_ema()


def reports(opt: fuseopt.AdamW) -> bool:
    sums: Mapping[str, float] = assert_type(opt.statistics(), Statistics)
    assert_type(sums["grad_norm"], float)
    plan = opt.explain()
    print(plan, assert_type(plan.backend, str), assert_type(plan.bytes_per_step, int))
    assert_type(plan.memory_bytes, int)
    assert_type(plan.least_seconds, float | None)
    assert_type(plan.last_seconds, float | None)
    zeros = fuseopt.sparsity(model)
    assert_type(zeros["0.weight"].share, float)
    assert_type(fuseopt.check_n_m(opt, "2:4").passed, bool)
    checker = fuseopt.verify.attach(opt, every=10)
    report = checker.report()
    checker.detach()
    return assert_type(report.passed, bool)
