"""What test_prune_patterns_distributed.py runs in one process and in several."""

import torch
from sharded import spread, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import fuseopt
from fuseopt import EMA, Prune

SHAPES = [(13, 24), (1, 48), (6, 24, 2, 2), (24,), (4, 24)]  # dimension 1 falls apart at multiples of 4 for 2 and 3

PLACEMENTS = {
    "rows": [Shard(0)],
    "columns": [Shard(1)],
    "replicated": [Replicate()],
}
PATTERNS = {
    "2:4": Prune(pattern="2:4", begin=2),
    "2:4 regrow": Prune(pattern="2:4", begin=1, end=5, every=2, regrow=True),
    "rows": Prune(0.6, pattern="rows", begin=2, end=4, schedule="linear"),
    "rows regrow": Prune(0.6, pattern="rows", begin=1, end=5, every=2, regrow=True),
    "rows of each": Prune(0.5, pattern="rows", scope="tensor"),
    "unstructured regrow": Prune(0.6, begin=1, end=5, every=2, regrow=True),
}


def weights() -> list[Tensor]:
    """Few values, and rows that are equal: many ties."""
    generator = torch.Generator().manual_seed(0)
    found = [(torch.randint(-3, 4, shape, generator=generator) / 4) for shape in SHAPES]
    found[0][5:9] = found[0][1]
    found[4][1:] = found[0][1]
    return found


def gradient(shape: tuple, t: int) -> Tensor:
    """Few values too: what is equal may stay so. Zero for some rows."""
    generator = torch.Generator().manual_seed(t)
    g = torch.randint(-2, 3, (1, *shape[1:]), generator=generator).expand(shape) / 4
    return g * (torch.arange(shape[0]) % 3 > 0).reshape(-1, *[1] * (len(shape) - 1))


def train(pattern: str, backend: str, place) -> dict:
    params = [torch.nn.Parameter(place(w)) for w in weights()]
    opt = fuseopt.SGD(
        [(f"w{k}", p) for k, p in enumerate(params)],
        lr=0.25,
        momentum=0.5,
        ema=EMA(0.5),
        prune=PATTERNS[pattern],
        backend=backend,
    )
    opt.mask(
        params[0], (torch.arange(24) % 6 > 0) if ":" in PATTERNS[pattern].pattern else torch.arange(13)[:, None] > 1
    )
    for t in range(1, 7):
        for k, p in enumerate(params):
            p.grad = place(gradient(SHAPES[k], 10 * t + k))
        opt.step()
    found = {}
    for k, p in enumerate(params):
        found |= {f"w{k}": whole(p.detach()), f"w{k} pruned": whole(opt.prune_mask(p))}
        found |= {f"w{k} {key}": whole(opt.state[p][key]) for key in ("momentum_buffer", "ema_0")}
    found["zeros"] = [(row.name, row.zeros, row.elements) for row in fuseopt.sparsity(opt).values()]
    if ":" in PATTERNS[pattern].pattern:
        report = fuseopt.check_n_m(opt)
        found["report"] = [(row.name, row.groups, row.violations) for row in report.values()]
        opt.finalize_pruning()
        found["finalized"] = [whole(p.detach()) for p in params]
    return found


def possible(pattern: str, placement: str) -> bool:
    return placement != "columns" or "rows" not in pattern


def backends_in(world: int) -> tuple[str, ...]:
    return ("cpu", "torch") if world == 2 else ("cpu",)


def many_processes(world: int) -> dict:
    mesh = init_device_mesh("cpu", (world,))
    return {
        (pattern, backend, name): train(pattern, backend, lambda x, placed=placed: spread(x, mesh, _fitting(x, placed)))
        for name, placed in PLACEMENTS.items()
        for pattern in PATTERNS
        for backend in backends_in(world)
        if possible(pattern, name)
    }


def _fitting(x: Tensor, placed: list) -> list:
    """Vectors have no dimension 1."""
    return [Shard(min(p.dim, x.dim() - 1)) if isinstance(p, Shard) else p for p in placed]


def refusals() -> list[str]:
    """What each process says of parameters split within groups, or within rows; nothing may change."""
    mesh, said = init_device_mesh("cpu", (2,)), []
    for prune, shape, mask in (
        (Prune(pattern="2:4"), (4, 12), None),
        (Prune(0.5, pattern="rows"), (4, 16), None),
        (Prune(pattern="2:4"), (4, 16), torch.arange(16) > 3),  # the groups of one process alone are frozen
    ):
        p = torch.nn.Parameter(spread(torch.ones(shape), mesh, [Shard(1)]))
        opt = fuseopt.AdamW([("w", p)], prune=prune)
        if mask is not None:
            opt.mask("w", mask)
        p.grad = spread(torch.ones(shape), mesh, [Shard(1)])
        try:
            opt.step()
        except ValueError as error:
            said.append(str(error))
        assert torch.equal(p.full_tensor(), torch.ones(shape))
    return said


def plain_parts(world: int) -> dict:
    """Whole parameters dealt out, as ZeroRedundancyOptimizer does, with sharded=True; by number."""
    rank = torch.distributed.get_rank() if world > 1 else 0
    generator = torch.Generator().manual_seed(1)
    every = [torch.randn(shape, generator=generator) for shape in SHAPES]
    own = {
        k: torch.nn.Parameter(w) for k, w in enumerate(every) if world == 1 or k % (world - 1) == rank
    }  # the last: none
    opt = fuseopt.SGD(list(own.values()) or [torch.nn.Parameter(torch.ones(0, 3))], lr=0.1, sharded=world > 1,
                      prune=Prune(0.6, pattern="rows", end=3, regrow=True))  # fmt: skip
    for t in range(1, 4):
        for k, p in own.items():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + k))
        opt.step()
    return {k: p.detach() for k, p in own.items()}


def refused_conversion() -> str:
    mesh = init_device_mesh("cpu", (2,))
    model = torch.nn.Linear(8, 4, bias=False)
    model.weight = torch.nn.Parameter(spread(torch.ones(4, 8), mesh, [Shard(0)]))
    opt = fuseopt.SGD(model.named_parameters(), lr=0.1, prune=Prune(0.5))
    model.weight.grad = spread(torch.ones(4, 8), mesh, [Shard(0)])
    opt.step()
    try:
        opt.finalize_pruning(model)
    except ValueError as error:
        assert opt.prune_mask("weight") is not None
        return str(error)
    return "nothing"


def n_m_on_one_process() -> list:
    """sharded=True: the report of each process, of which one alone has a matrix."""
    shape = (4, 8) if torch.distributed.get_rank() == 0 else (5,)
    p = torch.nn.Parameter(torch.ones(shape))
    opt = fuseopt.SGD([("w", p)], lr=0.1, sharded=True, prune=Prune(pattern="2:4"))
    p.grad = torch.ones(shape)
    opt.step()
    report = fuseopt.check_n_m(opt)
    return [bool(report), len(report)]
