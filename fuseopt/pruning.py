"""What is pruned: the optimizer's methods, and reports on a model's zeros."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import custom_from_mask

from . import cuda_memory
from .base import StagedOptimizer
from .checks import find, name_of
from .distributed import Parts, drop_gathered, is_dtensor, local, whole
from .interrupts import held
from .patterns import groups
from .stages import mask, prune


class PruneMethods(StagedOptimizer):
    """Methods of FusedOptimizer."""

    def prune_mask(self, param: Tensor | str) -> Tensor | None:
        """Boolean tensor of the parameter's shape, True where pruned; None where nothing is.

        param: the parameter, or its name. Raises ValueError for one that the optimizer does not have.
        """
        _, p, _ = find(self, param)
        pruned = mask.pruned(self.state.get(p, {}), local(p))
        return None if pruned is None else whole(p, pruned, set(range(p.dim())))

    def finalize_pruning(self, model: nn.Module | None = None) -> None:
        """End pruning: what is pruned is +0.0 in weights and averages, and an ordinary optimizer remains.

        The masks leave the state and `prune` is None in all groups, so further steps move every weight.

        Args:
            model: leave the masks there in the form of torch.nn.utils.prune, whose remove, is_pruned and
                further pruning then work: the parameter becomes `weight_orig`, beside it lies `weight_mask`.
                model.parameters() then come in another order: export what goes by it, as diffusers' averages, before.
                The model's forward is masked from then on; the optimizer steps `weight_orig`, and averages are of that.

        Raises RuntimeError inside swap_ema(), TypeError for a model that is no module, ValueError with nothing changed
        if a pruned parameter is not in `model` or is a DTensor, which torch.nn.utils.prune does not know.
        """
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"Invalid model: {type(model).__name__}; give the torch.nn.Module, or None")
        if self._swapped:
            raise RuntimeError("finalize_pruning() inside swap_ema(): leave the with-block first")
        cuda_memory.settle(self)
        every = dict.fromkeys(p for group in self.param_groups for p in group["params"])
        pruned = {p: gone for p in every if (gone := self.prune_mask(p)) is not None}
        places = [] if model is None else [(place, p) for p in pruned for place in _places(self, model, p)]
        drop_gathered()
        with held(), torch.no_grad():
            for p, gone in pruned.items():
                empty = {key for key, of in self._placeholders.items() if p in of}
                _end(self.state[p], p, local(gone), empty)
            for options in (self.defaults, *self.param_groups):
                options["prune"] = None
            for (module, name), p in places:
                custom_from_mask(module, name, ~pruned[p])


def _end(state: dict[str, Any], p: Tensor, gone: Tensor, without_value: set[str]) -> None:
    """Zero what is pruned of a parameter and its averages, and forget it."""
    averages = [value for key, value in state.items() if key.startswith("ema_") and key not in without_value]
    for x in (p, *averages):
        local(x).masked_fill_(gone, 0.0)
    del state["prune_mask"]
    if "mask_keep" not in state:
        state.pop("mask_order", None)


def _places(opt: Any, model: nn.Module, p: Tensor) -> list[tuple[nn.Module, str]]:
    """(module, name) wherever the model holds p; under the name that torch.nn.utils.prune goes by."""
    if is_dtensor(p):
        raise ValueError(
            f"{name_of(opt, p)} is a DTensor, which torch.nn.utils.prune does not know; leave model out, and give the "
            "masks (prune_mask) to a model that holds whole parameters"
        )
    found = []
    for module in model.modules():
        for name, q in module.named_parameters(recurse=False):
            if q is p:
                found.append((module, name.removesuffix("_orig") if _torch_mask(module, name) is not None else name))
    if not found:
        raise ValueError(f"the model does not hold {name_of(opt, p)}; give the model that this optimizer trains")
    return found


def _torch_mask(module: nn.Module, name: str) -> Tensor | None:
    """The mask of torch.nn.utils.prune for a parameter of a module; None where it is not pruned so."""
    return (
        dict(module.named_buffers(recurse=False)).get(name.removesuffix("_orig") + "_mask")
        if name.endswith("_orig")
        else None
    )


# ---- reports -------------------------------------------------------------------------------------


@torch.no_grad()
def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, weight) of each parameter, once; where torch.nn.utils.prune masks it, the masked weight."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p in seen:
                continue
            seen.add(p)
            masked = _torch_mask(module, name)
            name = name if masked is None else name.removesuffix("_orig")
            yield f"{prefix}.{name}".removeprefix("."), module, p.detach() if masked is None else p * masked


def _named(opt: torch.optim.Optimizer) -> Iterator[tuple[str, dict[str, Any], Tensor]]:
    """(name, group, parameter) of an optimizer; as in its messages where it has no names."""
    for group in opt.param_groups:
        names = group.get("param_names") or [name_of(opt, p) for p in group["params"]]
        for name, p in zip(names, group["params"], strict=True):
            yield name, group, p


def _table(head: tuple[Any, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns as wide as they must be: the first to the left, the others to the right."""
    lines = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


@dataclass(frozen=True)
class Zeros:
    """The zeros of one tensor, or of all: its `name`, how many entries are 0, and of how many `elements`."""

    name: str
    zeros: int
    elements: int

    @property
    def share(self) -> float:
        """zeros / elements; 0 where there are none."""
        return self.zeros / self.elements if self.elements else 0.0


Row = TypeVar("Row", "Zeros", "Groups")


class ByName(Mapping[str, Row]):
    """Rows of a report by the names of their tensors; prints as a table."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows: dict[str, Row] = {row.name: row for row in rows}

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return str(self)


class Sparsity(ByName[Zeros]):
    """What `sparsity` found: a mapping from names to the Zeros of each tensor. str() is a table.

    Attributes:
        total: the Zeros of the whole; `zeros`, `elements` and `share` are its own.
    """

    def __init__(self, rows: list[Zeros]) -> None:
        super().__init__(rows)
        self.total = Zeros("all", sum(row.zeros for row in rows), sum(row.elements for row in rows))
        self.zeros, self.elements, self.share = self.total.zeros, self.total.elements, self.total.share

    def __str__(self) -> str:
        every = (*self.values(), self.total)
        rows = [(row.name, f"{row.zeros:,}", f"{row.elements:,}", f"{row.share:.2%}") for row in every]
        return _table(("tensor", "zeros", "elements", "share"), rows)


def sparsity(source: nn.Module | torch.optim.Optimizer) -> Sparsity:
    """The zeros of a model's, or an optimizer's, parameters: per tensor and whole. Prints as a table.

    What torch.nn.utils.prune masks counts as zero. Of DTensors the whole is counted, which all processes
    must ask for together; with sharded=True the parameters of this process.

    Args:
        source: a model or an optimizer, fuseopt's or torch's.

    Raises TypeError for anything else.
    """
    _check_known(source)
    if isinstance(source, torch.optim.Optimizer):
        found = [(name, w) for name, _, w in _named(source)]
    else:
        found = [(name, w) for name, _, w in _weights(source)]
    own = torch.tensor([local(w).numel() - int(local(w).count_nonzero()) for _, w in found], dtype=torch.int64)
    zeros = Parts([w for _, w in found]).each(own).tolist()
    return Sparsity([Zeros(name, z, w.numel()) for (name, w), z in zip(found, zeros, strict=True)])


def _check_known(source: object) -> None:
    if not isinstance(source, (nn.Module, torch.optim.Optimizer)):
        raise TypeError(f"got {type(source).__name__}; give a model or an optimizer")


@dataclass(frozen=True)
class Groups:
    """The groups of m entries of one tensor, and how many of them have more than n that are not zero.

    Attributes:
        name: the tensor's.
        pattern: "n:m".
        groups: how many groups there are.
        violations: how many of them break the pattern.
        first: the index of the first entry of the first such group; None where there is none.
    """

    name: str
    pattern: str
    groups: int
    violations: int
    first: tuple[int, ...] | None


class PatternReport(ByName[Groups]):
    """What `check_n_m` found: a mapping from names to the Groups of each tensor. True if all keep to their pattern.

    Attributes:
        passed: the same. str() is a table with a verdict.
    """

    def __init__(self, rows: list[Groups]) -> None:
        super().__init__(rows)
        self.passed = all(row.violations == 0 for row in rows)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        rows = [(r.name, r.pattern, f"{r.groups:,}", f"{r.violations:,}", r.first or "") for r in self.values()]
        failed = sum(row.violations > 0 for row in self.values())
        verdict = "PASS: every group has its zeros" if self.passed else f"FAIL: {failed} of {len(self)} tensors"
        return _table(("tensor", "pattern", "groups", "violations", "first at"), rows) + f"\n{verdict}"


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_n_m(source: nn.Module | torch.optim.Optimizer, pattern: str | None = None) -> PatternReport:
    """Prove a pattern n:m: at most n of every m entries along dimension 1 are not zero.

    Pass it before torch.sparse.to_sparse_semi_structured, which keeps two of every four and drops the
    rest without a word (it takes 2-D weights alone and has size rules of its own).

    Args:
        source: a model, of which the weight of every nn.Linear and nn.Conv1d to 3d is checked, masked where
            torch.nn.utils.prune masks it; or an optimizer: then what its n:m options prune.
        pattern: "2:4" by default; for an optimizer by default each group's own.

    A last group shorter than m counts as filled up with zeros. DTensors are gathered one at a time, which
    all processes must ask for together. Raises ValueError where there is nothing to check; not with sharded=True,
    as what there is may lie on other processes.
    """
    _check_known(source)
    if isinstance(source, nn.Module):
        found = [(name, pattern or "2:4", w) for name, module, w in _weights(source) if _is_weight(name, module)]
    else:
        found = [
            (name, pattern or group["prune"]["pattern"], p)
            for name, group, p in _named(source)
            if prune.is_n_m(group.get("prune")) and prune.prunable(p)
        ]
    if not found and not (isinstance(source, torch.optim.Optimizer) and source.defaults.get("sharded")):
        what = "no nn.Linear or convolution" if isinstance(source, nn.Module) else "no group with an n:m pattern"
        raise ValueError(f"there is {what} in this {type(source).__name__}: nothing to check; give the model")
    return PatternReport([_check(*one) for one in found])


def _is_weight(name: str, module: nn.Module) -> bool:
    return isinstance(module, LAYERS) and name.rpartition(".")[2] == "weight"


@torch.no_grad()
def _check(name: str, pattern: str, w: Tensor) -> Groups:
    """The groups of one tensor."""
    n, m = prune.parse_n_m(pattern)
    w = w.full_tensor() if is_dtensor(w) else w
    wrong = (groups(w != 0, m, False).sum(-1) > n).movedim(-1, 1)  # of w's shape, but for dimension 1
    first = wrong.nonzero()[0].tolist() if bool(wrong.any()) else None
    if first:
        first[1] *= m
    return Groups(name, pattern, wrong.numel(), int(wrong.sum()), tuple(first) if first else None)
