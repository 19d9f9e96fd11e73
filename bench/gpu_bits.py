"""Sections of gpu_check.py that compare bits and count launches. Each yields rows, a dict a line of its table."""

import statistics
from collections.abc import Iterator

import gpu_place as place
import torch
from gpu_place import BACKENDS, DEVICE, DRY, cases

import fuseopt

SHAPES = [(33, 31), (4099,), (200, 200)] if not DRY else [(33, 31)]


def bits() -> Iterator[dict]:
    """CPU against CUDA against Triton in fp32 after ten steps: entries of parameters and state that differ."""
    steps = 10 if not DRY else 2
    for rule in cases.ONE_EACH if not DRY else cases.ONE_EACH[:1]:
        for stage in cases.STAGES if not DRY else (cases.STAGE["everything"],):
            cpu = cases.parameters(SHAPES)
            expected = cases.run(stage.build(rule, cpu, torch.float32, backend="cpu"), cpu, steps)
            row = {"rule": rule.name, "stage": stage.name, "entries": sum(x.numel() for x in tensors(expected))}
            for backend in BACKENDS:
                if backend == "triton" and rule is not cases.ONE_EACH[0] and "everything" not in stage.name:
                    continue  # each would be compiled, for a second
                params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in cases.parameters(SHAPES)]
                opt = cases.run(stage.build(rule, params, torch.float32, backend=backend), params, steps)
                row[f"{backend}: differ"] = differing(opt, expected)
            yield row


def tensors(opt) -> list[torch.Tensor]:
    """Parameters and state, in order."""
    found = []
    for p in cases.all_params(opt):
        state = opt.state[p]
        found += [
            p.detach(),
            *(state[k] for k in sorted(state) if isinstance(state[k], torch.Tensor) and "mask" not in k),
        ]
    return found


def differing(opt, expected) -> int:
    opt.state_dict()  # settles what only the GPU knew
    pairs = zip(tensors(opt), tensors(expected), strict=True)
    return sum(int((cases.bits(a) != cases.bits(b)).sum()) for a, b in pairs)


# ---- scalars ------------------------------------------------------------------------------------------

BETAS = ((0.9, 0.999), (0.9, 0.95), (0.95, 0.99), (0.9, 0.98))
WARMUPS = ({"warmup": "timm"}, {"warmup": "diffusers"}, {"warmup": "edm2", "sigma_rel": 0.1})
EMA_AT, RULE_SCALARS = 17, 6  # places in csrc/cuda/args.h TensorScalars, in doubles


def scalars() -> Iterator[dict]:
    """Scalars formed on the device against the host's, rounded to fp32, for t = 1 to 20,000. Reported, not judged."""
    from fuseopt.kernels import rules

    from fuseopt.stages import ema

    steps = 20_000 if not DRY else 30
    for betas in BETAS:
        opt = one_entry(lr=1e-3, betas=betas)
        counter = [rules.CounterValue(0.0, False)]
        host = [rules.RULES["adam"].prepare((1e-3, *betas, 1e-8), counter) for _ in range(steps)]
        yield {"scalars": f"Adam, betas {betas}", "values": steps * RULE_SCALARS} | unlike(
            formed(opt, steps, 0, RULE_SCALARS), host
        )
    for options in WARMUPS:
        opt = one_entry(
            lr=1e-3, ema=fuseopt.EMA(**({"decay": 0.9999} if "sigma_rel" not in options else {}), **options)
        )
        of = opt.param_groups[0]["ema"][0]
        host = [(ema.weight(of, t),) for t in range(1, steps + 1)]
        yield {"scalars": f"EMA, {options['warmup']}", "values": steps} | unlike(formed(opt, steps, EMA_AT, 1), host)


def one_entry(**options) -> fuseopt.AdamW:
    p = torch.nn.Parameter(torch.ones(1, device=DEVICE))
    p.grad = torch.ones_like(p)
    return fuseopt.AdamW([p], backend="cuda", **options)


def formed(opt, steps: int, at: int, count: int) -> torch.Tensor:
    """(steps, count) scalars as the device formed them."""
    found = torch.zeros(steps, count, dtype=torch.float64, device=DEVICE)
    for t in range(steps):
        opt.step()
        found[t].copy_(opt._memory.scalars[at : at + count])
    return found.cpu()


def unlike(device: torch.Tensor, host: list[tuple[float, ...]]) -> dict[str, int]:
    host = torch.tensor(host, dtype=torch.float64)
    rounded = device.float() != host.float()
    return {"differ in fp64": int((device != host).sum()), "differ in fp32": int(rounded.sum())}


# ---- launches and host time ------------------------------------------------------------------------------


def host() -> Iterator[dict]:
    """Host time of a step of many tensors of 64, median in microseconds, and what one step launches."""
    for count in (10, 200, 1000) if not DRY else (3,):
        optimizers = {f"fuseopt, {b}": lambda p, b=b: fuseopt.AdamW(p, backend=b) for b in BACKENDS}
        optimizers["fuseopt, cuda, clipped, EMA"] = lambda p: fuseopt.AdamW(
            p, backend="cuda", max_grad_norm=1.0, ema=fuseopt.EMA(0.99)
        )
        optimizers |= {f"torch {k}": lambda p, k=k: torch.optim.AdamW(p, **{k: True}) for k in ("fused", "foreach")}
        steps = {}
        for name, make in optimizers.items():
            params = [torch.nn.Parameter(torch.ones(8, 8, device=DEVICE)) for _ in range(count)]
            for p in params:
                p.grad = torch.ones_like(p)
            steps[name] = make(params).step
            steps[name]()
        samples = place.alternated(steps, 2.0 if not DRY else 0.01, place.host_seconds, least=3)
        least = statistics.median(samples["torch fused"])
        for name, step in steps.items():
            us = statistics.median(samples[name])
            row = {"tensors": count, "optimizer": name, "us": f"{1e6 * us:.1f}", "of torch fused": f"{us / least:.3f}"}
            yield row | {"launches": launches(step)}


def launches(step) -> int | str:
    """Kernels that one step runs."""
    if DRY:
        return ""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profiler.events())
