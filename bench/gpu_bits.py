"""Sections of gpu_check.py that compare bits and count launches. Each yields rows, a dict a line of its table."""

import math
import statistics
from collections.abc import Callable, Iterator

import gpu_place as place
import torch
from gpu_place import BACKENDS, DEVICE, DRY, cases

import fuseopt
from fuseopt.stages import ema

SHAPES = [(33, 31), (4099,), (200, 200)] if not DRY else [(33, 31)]


def bits() -> Iterator[dict]:
    """CPU against CUDA against Triton in fp32 after ten steps: entries of parameters and state that differ."""
    steps = 10 if not DRY else 2
    for rule in cases.ONE_EACH if not DRY else cases.ONE_EACH[:1]:
        for stage in cases.STAGES if not DRY else (cases.STAGE["everything"],):
            cpu = cases.parameters(SHAPES)
            expected = cases.run(stage.build(rule, cpu, torch.float32, backend="cpu"), cpu, steps)
            row = {"rule": rule.name, "stage": stage.name, "entries": sum(x.numel() for x in tensors(expected))}

            def compared(backend: str, rule=rule, stage=stage, expected=expected) -> dict:
                params = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in cases.parameters(SHAPES)]
                opt = cases.run(stage.build(rule, params, torch.float32, backend=backend), params, steps)
                return {f"{backend}: differ": differing(opt, expected)}

            for backend in BACKENDS:
                if backend == "triton" and rule is not cases.ONE_EACH[0] and "everything" not in stage.name:
                    continue  # each would be compiled, for a second
                row |= place.attempt(lambda b=backend, compared=compared: compared(b), f"{backend}: ")
            yield row
    yield from special()


def special() -> Iterator[dict]:
    """Every 16-bit value moved onto a tie, beside it, past the largest, to infinity and NaN; a NaN equals a NaN."""
    for dtype in (cases.F16, cases.BF16):
        expected = stepped(dtype, "cpu")
        row = {"rule": "sgd", "stage": f"rounding to {dtype}", "entries": expected.numel()}

        def compared(backend: str, dtype=dtype, expected=expected) -> dict:
            found = stepped(dtype, backend)
            same = (cases.bits(found) == cases.bits(expected)) | (found.isnan() & expected.isnan())
            return {f"{backend}: differ": int((~same).sum())}

        for backend in BACKENDS:
            row |= place.attempt(lambda b=backend, compared=compared: compared(b), f"{backend}: ")
        yield row


def stepped(dtype: torch.dtype, backend: str) -> torch.Tensor:
    """p - lr*g of every p, with lr*g about half a unit in p's last place or one and a half, and with special g."""
    info, device = torch.finfo(dtype), "cpu" if backend == "cpu" else DEVICE
    p = torch.arange(-(2**15), 2**15, 1 if not DRY else 97).to(torch.int16).view(dtype)
    power = torch.ldexp(torch.ones(()), torch.frexp(p.float()).exponent - 1).clamp(info.tiny, info.max)
    factors = [k * x for k in (1, 3, -1, -3) for x in (1, 1 + info.eps, 1 - info.eps / 2)]
    params = []
    for factor in (*factors, 0.0, math.inf, -math.inf, math.nan):
        params.append(torch.nn.Parameter(p.to(device, copy=True)))
        params[-1].grad = (power * factor).to(device, dtype)
    fuseopt.SGD(params, lr=info.eps / 2, backend=backend).step()
    return torch.cat([q.detach().cpu() for q in params])


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
    steps = 20_000 if not DRY else 30
    for betas in BETAS:
        yield {"scalars": f"Adam, betas {betas}"} | place.attempt(lambda b=betas: of_adam(b, steps))
    for options in WARMUPS:
        yield {"scalars": f"EMA, {options['warmup']}"} | place.attempt(lambda o=options: of_average(o, steps))


def of_adam(betas: tuple[float, float], steps: int) -> dict[str, int]:
    from fuseopt.kernels import rules

    found = formed(one_entry(lr=1e-3, betas=betas), steps, 0, RULE_SCALARS)
    counter = [rules.CounterValue(0.0, False)]
    return unlike(found, [rules.RULES["adam"].prepare((1e-3, *betas, 1e-8), counter) for _ in range(steps)])


def of_average(options: dict, steps: int) -> dict[str, int]:
    decay = {} if "sigma_rel" in options else {"decay": 0.9999}
    opt = one_entry(lr=1e-3, ema=fuseopt.EMA(**decay, **options))
    found, of = formed(opt, steps, EMA_AT, 1), opt.param_groups[0]["ema"][0]
    return unlike(found, [(ema.weight(of, t),) for t in range(1, steps + 1)])


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
    return {"values": host.numel(), "differ in fp64": int((device != host).sum()), "differ in fp32": int(rounded.sum())}


# ---- launches and host time ------------------------------------------------------------------------------


def host() -> Iterator[dict]:
    """Host time of a step of many tensors of 64, and the kernels that one step launches."""
    makers = {f"fuseopt, {b}": lambda p, b=b: fuseopt.AdamW(p, backend=b) for b in BACKENDS}
    makers |= {f"fuseopt, {b}, all stages": lambda p, b=b: all_stages(p, b) for b in BACKENDS}
    makers |= {f"torch {k}": lambda p, k=k: torch.optim.AdamW(p, **{k: True}) for k in ("fused", "foreach")}
    for count in (10, 200, 1000) if not DRY else (3,):
        steps = {}
        for name, make in makers.items():
            made = place.attempt(lambda make=make, n=count: {"step": begun(make, n)})
            if "step" in made:
                steps[name] = made["step"]
            else:
                yield {"tensors": count, "optimizer": name} | made
        samples = place.alternated(steps, 2.0 if not DRY else 0.01, place.host_seconds, least=3)
        for name, step in steps.items():
            row = {"tensors": count, "optimizer": name} | place.summary(samples[name])
            row |= {"ratio": row["seconds"] / statistics.median(samples["torch fused"]), "to": "torch fused"}
            yield row | place.attempt(lambda step=step: {"kernels": launches(step)})


def all_stages(params: list, backend: str) -> fuseopt.AdamW:
    """mask + clip + decay + AdamW + threshold + EMA."""
    stages = {"max_grad_norm": 1.0, "prune": fuseopt.Prune(threshold=1e-3), "ema": fuseopt.EMA(0.99)}
    opt = fuseopt.AdamW(params, weight_decay=0.1, **stages, backend=backend)
    for p in params:
        opt.mask(p, torch.rand_like(p) > 0.1)
    return opt


def begun(make: Callable, count: int) -> Callable:
    """The step of an optimizer of so many tensors, after the first."""
    params = [torch.nn.Parameter(torch.ones(8, 8, device=DEVICE)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    step = make(params).step
    step()
    return step


def launches(step) -> int | None:
    """Kernels that one step runs; copies and fills by the driver are none."""
    if DRY:
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in found)
