"""Times a step that prunes, and what memory it takes beside the model, against torch.nn.utils.prune.

    python -m bench prune                          100M weights, every case; about five minutes, 4 GB
    python -m bench prune --elements 1e7 --cases global-fp32

A round takes each side once, from the same weights: an SGD step (torch's fused=True) with lr 0, so that both sides
rank the same values, and with it the pruning of a dense model to 80% (or 2:4). What was pruned is compared first.
Memory is the growth of the process's peak.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure
import record
import report
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

import fuseopt

SPARSITY = 0.8
SHAPE = (1024, 2048)  # of one weight: as many of them as the elements ask for


@dataclass
class Case:
    """What is pruned, here and with torch."""

    dtype: torch.dtype
    options: fuseopt.Prune
    by_torch: Callable[[list[nn.Module]], None]


def globally(modules: list[nn.Module]) -> None:
    torch_prune.global_unstructured(
        [(m, "weight") for m in modules], pruning_method=torch_prune.L1Unstructured, amount=SPARSITY
    )


def each_alone(modules: list[nn.Module]) -> None:
    for m in modules:
        torch_prune.l1_unstructured(m, "weight", SPARSITY)


def rows(modules: list[nn.Module]) -> None:
    for m in modules:
        torch_prune.ln_structured(m, "weight", SPARSITY, n=2, dim=0)


def two_of_four(modules: list[nn.Module]) -> None:
    for m in modules:
        groups = m.weight.detach().abs().view(-1, 4)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True)
        torch_prune.custom_from_mask(m, "weight", keep.view_as(m.weight))


CASES = {
    "global-fp32": Case(torch.float32, fuseopt.Prune(SPARSITY, begin=2), globally),
    "global-bf16": Case(torch.bfloat16, fuseopt.Prune(SPARSITY, begin=2), globally),
    "tensor-fp32": Case(torch.float32, fuseopt.Prune(SPARSITY, begin=2, scope="tensor"), each_alone),
    "rows-fp32": Case(torch.float32, fuseopt.Prune(SPARSITY, "rows", "tensor", begin=2), rows),
    "2:4-fp32": Case(torch.float32, fuseopt.Prune(pattern="2:4", begin=2), two_of_four),
    "2:4-bf16": Case(torch.bfloat16, fuseopt.Prune(pattern="2:4", begin=2), two_of_four),
}


class Side:
    """A model and its optimizer, dense again at each round."""

    def __init__(self, case: Case, start: list[Tensor], gradients: list[Tensor], ours: bool):
        self.case, self.start, self.gradients, self.ours = case, start, gradients, ours
        self.modules = [nn.Linear(1, 1, bias=False) for _ in start]
        for module, values in zip(self.modules, start, strict=True):
            module.weight = nn.Parameter(values.clone())

    def renew(self) -> None:
        """Dense weights and an optimizer that has taken one step, as in the middle of a training."""
        for module in self.modules:
            if torch_prune.is_pruned(module):
                torch_prune.remove(module, "weight")
        self.params = [module.weight for module in self.modules]
        options = {"prune": self.case.options} if self.ours else {"fused": True}
        self.opt = (fuseopt.SGD if self.ours else torch.optim.SGD)(self.params, lr=0.0, **options)
        for p, g in zip(self.params, self.gradients, strict=True):
            p.grad = g
        with torch.no_grad():
            for p, values in zip(self.params, self.start, strict=True):
                p.copy_(values)
        self.opt.step()

    def run(self) -> float:
        """Seconds of the step and the pruning."""
        self.renew()
        begin = time.perf_counter()
        self.opt.step()
        if not self.ours:
            self.case.by_torch(self.modules)
        return time.perf_counter() - begin

    def zeros(self, k: int) -> Tensor:
        return self.modules[k].weight.detach() == 0


def problem(ours: Side, theirs: Side) -> str | None:
    """What is wrong with the result; None if both pruned equally many, the same up to ties."""
    ours.run(), theirs.run()
    options, count, others = ours.case.options, 0, []
    for k in range(len(ours.modules)):
        a, b = ours.zeros(k), theirs.zeros(k)
        count += int(a.sum()) - int(b.sum())
        magnitude = ours.start[k].abs()
        if options.pattern == "2:4":
            kept = [(magnitude * ~zeros).view(-1, 4).sort(1).values for zeros in (a, b)]
            others.append(magnitude.view(-1, 4)[(kept[0] != kept[1]).any(1)])
        else:
            others.append(magnitude[a != b].unique())
    if count:
        return f"pruned {count} weights more than torch"
    if options.scope == "global" and options.pattern == "unstructured":
        others = [torch.cat(others).unique()]
    most = 0 if options.pattern == "2:4" else 1  # one value may tie
    return "pruned others than torch, which are no ties" if max(map(len, others)) > most else None


def extra_memory(side: Side) -> int | None:
    """Bytes by which the process's peak grows in a step that prunes; None where the system does not tell."""
    side.renew()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before must not serve unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    side.opt.step()
    if not side.ours:
        side.case.by_torch(side.modules)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measure_case(name: str, elements: int, rounds: int) -> dict:
    """The row of a case."""
    case, count = CASES[name], max(1, elements // (SHAPE[0] * SHAPE[1]))
    start = [torch.randn(SHAPE).to(case.dtype) for _ in range(count)]
    gradients = [torch.randn(SHAPE).to(case.dtype) for _ in range(count)]
    sides = [Side(case, start, gradients, ours) for ours in (True, False)]
    memory = [extra_memory(side) for side in sides]  # first, while no freed memory is at hand
    wrong = problem(*sides)
    if wrong:
        raise SystemExit(f"{name} is wrong and was not timed: {wrong}")
    others, samples = measure.Others(), ([], [])
    for k in range(rounds):
        for side in (0, 1) if k % 2 else (1, 0):
            samples[side].append(sides[side].run())
    row = {"case": name, "elements": count * SHAPE[0] * SHAPE[1], "tensors": count, "rounds": rounds}
    row |= {"fuseopt": measure.spread(samples[0]), "torch": measure.spread(samples[1])}
    row |= {"ratio": measure.ratios(samples[1], samples[0]), "extra_bytes": memory, "others": others.share()}
    print(line(row), flush=True)
    return row


def line(row: dict) -> str:
    """A row as text."""
    ratio = row["ratio"]
    memory = ["unknown" if b is None else f"{b / 2**20:.0f} MiB" for b in row["extra_bytes"]]
    busy = "  BUSY" if row["others"] is not None and row["others"] > report.BUSY else ""
    return (
        f"{row['case']:<14}{row['elements'] / 1e6:>7.0f}M{report.duration(row['fuseopt']['median']):>10}"
        f"{report.duration(row['torch']['median']):>13}  x{ratio['median']:<6.2f}"
        f"({ratio['low']:.2f} .. {ratio['high']:.2f}){memory[0]:>11}{memory[1]:>11}{busy}"
    )


def markdown(results: list[dict]) -> str:
    """A line a case."""
    rows = []
    for row in results[0]["prune"]:
        memory = ["unknown" if b is None else f"{b / 2**20:.0f} MiB" for b in row["extra_bytes"]]
        times = [report.duration(row[side]["median"]) for side in ("fuseopt", "torch")]
        rows.append([row["case"].replace("-", ", "), f"x{row['ratio']['median']:.2f}", *times, *memory])
    head = ["what is pruned", "torch / fuseopt", "fuseopt", "torch", "extra memory", "torch's"]
    made = f"`{results[0]['command']}` on {report.machine(results[0])}."
    return "\n".join([*report.grid(head, rows), "", made])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m bench prune", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=" ".join(CASES))
    p.add_argument("--elements", type=record.count, default=10**8, help="weights, about (default: 1e8)")
    p.add_argument("--rounds", type=record.count, default=5, help="of each case (default: 5)")
    record.common(p)
    args = p.parse_args(argv)
    result = record.begin(p, args, "prune")
    print(report.machine(result) + "\n\ncase, weights, fuseopt, torch, ratio (quartiles), extra memory of each")
    result["prune"] = [measure_case(name, args.elements, args.rounds) for name in args.cases]
    record.finish(args, result, "prune")
    return 0


if __name__ == "__main__":
    sys.exit(main())
