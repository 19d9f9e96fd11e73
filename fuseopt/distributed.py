"""Parameters that several processes share: the part of each that lies here, and sums over all parts.

A DTensor (FSDP2's fully_shard, tensor parallel) is stepped through its local tensor, so a step moves nothing
between processes. What concerns the whole model - the norm, the statistics, how many weights are pruned and
which - is found by adding up sums and histograms. With `sharded`, plain parameters are this process's part
of the model, none of them anywhere else (ZeroRedundancyOptimizer).
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(x: Any) -> "TypeGuard[DTensor]":
    """Whether x is a DTensor. Nobody has one while its module, which takes a second, is not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The part of a DTensor that lies on this process; any other tensor itself."""
    return _part_here(x) if is_dtensor(x) else x  # outside no_grad, which an interrupt may leave switched on


@torch.no_grad()
def _part_here(x: Tensor) -> Tensor:
    part = x.to_local()
    return part.wait() if hasattr(part, "wait") else part  # a gradient may still be on its way


def local_state(state: dict) -> dict:
    """The state of a parameter with local tensors in place of DTensors."""
    return {key: local(value) for key, value in state.items()}


def drop_gathered() -> None:
    """Before parameters are written outside step(): let FSDP2 gather them anew for the next forward.

    A forward without backward leaves gathered copies in the model (of the root module, by default), and the
    next forward would compute with those. A parameter does not know its module, so that all are told.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            module.reshard()


def _placements(p: Tensor, dims: set[int]) -> list:
    """p's placements as far as they split these dimensions; replicated otherwise."""
    from torch.distributed.tensor import Replicate

    return [x if getattr(x, "dim", None) in dims else Replicate() for x in p.placements]


@torch.no_grad()
def indices(p: Tensor, d: int) -> Tensor:
    """Which indices along dimension d of the whole DTensor p lie on this process, ascending."""
    from torch.distributed.tensor import DTensor

    shape = [p.shape[d] if k == d else 1 for k in range(p.dim())]
    every = torch.arange(p.shape[d], device=local(p).device).reshape(shape)
    whole = DTensor.from_local(every, p.device_mesh, _placements(p, set()), run_check=False)
    return local(whole.redistribute(placements=_placements(p, {d}))).reshape(-1)


@torch.no_grad()
def part(p: Tensor, x: Tensor) -> Tensor:
    """The part on this process of x, which broadcasts to the whole parameter p; not expanded."""
    if is_dtensor(x):
        x = x.full_tensor()
    if is_dtensor(p):
        x = x.reshape([1] * (p.dim() - x.dim()) + list(x.shape))
        for d in range(p.dim()):
            if x.shape[d] > 1:
                x = x.index_select(d, indices(p, d).to(x.device))
    return x


def whole(p: Tensor, x: Tensor, split: set[int]) -> Tensor:
    """The inverse of `part`: for a DTensor p the DTensor of which x is the part on this process.

    split: the dimensions in which x has the size of p; in the others its size is 1.
    """
    if not is_dtensor(p):
        return x
    from torch.distributed.tensor import DTensor

    shape = torch.Size(p.shape[d] if d in split else 1 for d in range(p.dim()))
    stride = torch.empty(shape, device="meta").stride()
    x = x.to(local(p).device)
    return DTensor.from_local(x, p.device_mesh, _placements(p, split), run_check=False, shape=shape, stride=stride)


def placed_alike(p: Tensor, x: Tensor) -> bool:
    """Whether two tensors lie on the processes in the same way."""
    if not is_dtensor(p) or not is_dtensor(x):
        return is_dtensor(p) == is_dtensor(x)
    return p.device_mesh == x.device_mesh and p.placements == x.placements


def aligned(p: Tensor, x: Tensor) -> Tensor:
    """x placed on the processes as p is."""
    return x if placed_alike(p, x) else x.redistribute(placements=p.placements)


def groups(p: Tensor | None, sharded: bool) -> tuple:
    """The process groups over which a sum over p's entries here must be reduced to be over all of them."""
    if is_dtensor(p):
        return tuple(p.device_mesh.get_group(k) for k, x in enumerate(p.placements) if hasattr(x, "dim"))
    return (dist.group.WORLD,) if sharded else ()


def _device(group) -> torch.device:
    """Where the processes of a group can talk about a tensor."""
    able = dist.Backend.backend_capability.get(dist.get_backend(group), ["cpu"])
    return torch.device("cpu" if "cpu" in able else able[0])


class Parts:
    """A list of parameters by the processes that share them, so that each sum is reduced once a group."""

    def __init__(self, params: list[Tensor], sharded: bool = False):
        self.params, self.sharded = params, sharded
        self.members: dict[tuple, list[int]] = {groups(None, sharded): []} if sharded else {}
        known = {}  # looking a mesh's groups up takes several microseconds
        for k, p in enumerate(params):
            place = (id(p.device_mesh), p.placements) if is_dtensor(p) else None
            if place not in known:
                known[place] = groups(p, sharded)
            self.members.setdefault(known[place], []).append(k)

    def _reduce(self, x: Tensor, over: tuple) -> Tensor:
        home = x.device
        for group in over:
            x = x.to(_device(group))
            dist.all_reduce(x, group=group)
        return x.to(home)

    def total(self, count: Callable[[list[int]], Tensor]) -> Tensor:
        """The sum of count(parameters, as indices of the list) over everything, everywhere."""
        sums = [self._reduce(count(members), over) for over, members in self.members.items()]
        return torch.stack(sums).sum(0) if sums else count([])

    def each(self, rows: Tensor) -> Tensor:
        """rows[k], which belongs to parameter k, summed over the parts of that parameter."""
        out = rows.clone()
        for over, members in self.members.items():
            if over and not self.sharded:
                out[members] = self._reduce(rows[members], over)
        return out

    def before(self, count: Tensor) -> int:
        """With `sharded`, the sum of the counts of the processes of lower rank; otherwise 0."""
        if not self.sharded:
            return 0
        (group,) = groups(None, self.sharded)
        count = count.to(_device(group))
        counts = [torch.zeros_like(count) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, count, group=group)
        return int(sum(counts[: dist.get_rank(group)]))


def total(opt, params: list[Tensor], rows: Tensor, width: int) -> Tensor:
    """The sum of the rows on all processes; rows[k] is `width` doubles of params[k] as far as it lies here.

    params: those of the optimizer's parameters that were stepped.
    """
    every = [p for group in opt.param_groups for p in group["params"]]
    place = {p: k for k, p in enumerate(every)}
    spread = torch.zeros(len(every), width, dtype=torch.float64, device=rows.device)
    index = torch.tensor([place[p] for p in params], dtype=torch.int64, device=rows.device)
    spread.index_add_(0, index, rows)  # adds: a parameter may be listed twice
    return Parts(every, opt.defaults["sharded"]).total(lambda members: spread[members].sum(0))
