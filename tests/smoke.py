"""Checks an installed fuseopt where its sources are not: `python tests/smoke.py`, as after building a wheel."""

from pathlib import Path

import torch

import fuseopt
from fuseopt import cpu

HERE = Path(__file__).resolve().parent


def main() -> None:
    package = Path(fuseopt.__file__).resolve().parent
    assert package.parent != HERE.parent, f"{package} is the source tree; install the wheel, and run this elsewhere"
    assert (package / "py.typed").exists() and (package / "kernels").is_dir()
    assert not cpu.native_error(), cpu.native_error()

    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    opt, other = fuseopt.AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        opt.step()
        other.step()
    assert opt.explain().backend == "cpu"
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True)), "not the bits of torch's fused AdamW"

    opt = fuseopt.SGD(ours, lr=1e-2, ema=fuseopt.EMA(0.9), prune=fuseopt.Prune(0.5))
    opt.step()
    assert fuseopt.sparsity(opt).share == 0.5
    with opt.swap_ema():
        assert fuseopt.sparsity(opt).share == 0.5
    print(f"fuseopt {fuseopt.__version__} with torch {torch.__version__}: {opt.explain()}")


if __name__ == "__main__":
    main()
