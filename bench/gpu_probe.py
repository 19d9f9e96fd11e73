"""A few steps of the CUDA backend for compute-sanitizer: every kernel, tails, and a gradient that is not aligned."""

import gpu_place as place
import torch

import fuseopt

PRUNES = {"threshold": {"threshold": 0.01}, "0.5": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
STAGES = {"max_grad_norm": 1.0, "ema": fuseopt.EMA(0.9), "statistics": True}


def unaligned(p: torch.Tensor) -> torch.Tensor:
    """A gradient that starts four bytes after where memory is aligned."""
    skip = 4 // p.element_size()
    return torch.ones(skip + p.numel(), dtype=p.dtype, device=p.device)[skip:].view(p.shape)


def parameters() -> list[torch.nn.Parameter]:
    params = []
    for shape in ((4099,), (33, 31)):
        for dtype in (torch.float32, torch.bfloat16):
            params.append(torch.nn.Parameter(torch.randn(shape, device=place.DEVICE).to(dtype)))
            params[-1].grad = unaligned(params[-1]) if shape == (33, 31) else torch.ones_like(params[-1])
    return params


for name, prune in PRUNES.items():
    params = parameters()
    opt = fuseopt.AdamW(params, prune=fuseopt.Prune(**prune), backend="cuda", **STAGES)
    for p in params[::2]:  # one of five, so that 2:4 can prune two of any four
        opt.mask(p, (torch.arange(p.numel(), device=place.DEVICE) % 5 > 0).view(p.shape), mode="freeze")
    for _ in range(2):
        opt.step()
    assert opt.statistics()["grad_norm"] > 0, name
    assert all(bool(p.isfinite().all()) for p in params), name
print(f"stepped with {', '.join(PRUNES)}")
