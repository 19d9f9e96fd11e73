"""Times AdamW (fp32) under masks of every form, relative to no mask at all.

    python -m bench masks                          16M weights, about a minute
    python -m bench masks --elements 1e6 --rounds 5

All variants step the same memory, so that what differs is the mask; each is checked first. Rounds alternate all of
them in an order drawn anew; ratios are medians within a round. Every other row, column or entry (at random) is kept.
"""

import argparse
import random
import sys
import time

import measure
import record
import report
import torch
from torch import Tensor

import fuseopt

COLUMNS = (64, 768, 4096)


def masks(rows: int, columns: int) -> dict[str, Tensor | None]:
    """The masks of one shape, by name."""
    every_other = torch.arange(max(rows, columns)) % 2 == 0
    return {
        "none": None,
        "rows": every_other[:rows, None],
        "columns": every_other[None, :columns],
        "elements": torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.5,
        "all frozen": torch.zeros(1, 1, dtype=torch.bool),
    }


class Variant:
    """An optimizer over the common memory, seen as a matrix with so many columns."""

    def __init__(self, streams: list[Tensor], columns: int, name: str, keep: Tensor | None, mode: str):
        self.columns, self.name, self.mode, self.keep = columns, name, mode, keep
        w, g, m, v = (x.view(-1, columns) for x in streams)
        self.p = torch.nn.Parameter(w)
        self.p.grad = g
        self.opt = fuseopt.AdamW([self.p], lr=1e-4, weight_decay=0.0)
        self.opt.state[self.p] = {"step": torch.tensor(1.0), "exp_avg": m, "exp_avg_sq": v}
        if keep is not None:
            self.opt.mask(self.p, keep, mode)
        self.seconds: list[float] = []

    def problem(self) -> str | None:
        """What is wrong with a step; None if nothing is."""
        streams = [self.p.detach(), *(self.opt.state[self.p][key] for key in ("exp_avg", "exp_avg_sq"))]
        before = [x.clone() for x in streams]
        self.opt.step()
        kept = torch.ones_like(self.p, dtype=torch.bool) if self.keep is None else self.keep.expand(self.p.shape)
        if not bool((streams[0] != before[0])[kept].all()):
            return "an entry did not move"
        if self.mode == "freeze" and any(bool((x != old)[~kept].any()) for x, old in zip(streams, before, strict=True)):
            return "a frozen entry moved"
        return None

    def run(self) -> None:
        start = time.perf_counter()
        self.opt.step()
        self.seconds.append(time.perf_counter() - start)


def variants(elements: int) -> list[Variant]:
    """The first, without a mask, is what the others relate to."""
    n = max(1, elements // (64 * 768)) * 64 * 768  # whole rows in every shape but the longest
    streams = [torch.randn(n), torch.randn(n) + 10, torch.zeros(n), torch.ones(n)]
    out = []
    for columns in COLUMNS:
        part = [x[: n // columns * columns] for x in streams]
        for name, keep in masks(len(part[0]) // columns, columns).items():
            for mode in ("freeze", "grad") if name not in ("none", "all frozen") else ("freeze",):
                if part[0].numel():
                    out.append(Variant(part, columns, name, keep, mode))
    return out


def row(one: Variant, first: Variant) -> dict:
    ratio = measure.ratios(one.seconds, first.seconds)
    what = {"mask": one.name, "mode": one.mode, "columns": one.columns, "elements": one.p.numel()}
    return what | {"fuseopt": measure.spread(one.seconds), "ratio": ratio, "rounds": len(one.seconds)}


def line(one: dict) -> str:
    """A row as text."""
    ratio = one["ratio"]
    return (
        f"{one['columns']:>8} {one['mask']:<12}{one['mode']:<8}{report.duration(one['fuseopt']['median']):>9}"
        f"  x{ratio['median']:<5.2f} ({ratio['low']:.2f} .. {ratio['high']:.2f})"
    )


def markdown(results: list[dict]) -> str:
    """A line a mask and mode, a column a number of columns; a table a run."""
    tables = []
    for result in results:
        found = {(row["mask"], row["mode"], row["columns"]): row["ratio"] for row in result["masks"]}
        columns = list(dict.fromkeys(row["columns"] for row in result["masks"]))
        kinds = list(dict.fromkeys((row["mask"], row["mode"]) for row in result["masks"] if row["mask"] != "none"))
        head = ["mask", *(f"rows of {count}" for count in columns)]
        lines = [
            [f'{mask}, "{mode}"', *(f"x{found[mask, mode, k]['median']:.2f}" for k in columns)] for mask, mode in kinds
        ]
        tables += [*report.grid(head, lines), "", f"`{result['command']}` on {report.machine(result)}.", ""]
    return "\n".join(tables).rstrip()


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m bench masks", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--elements", type=record.count, default=2**24, help="weights, about (default: 16M)")
    p.add_argument("--rounds", type=record.count, default=60, help="how often each variant runs (default: 60)")
    record.common(p)
    args = p.parse_args(argv)
    result = record.begin(p, args, "masks")
    print(report.machine(result) + "\n\ncolumns, mask, mode, a step, relative to no mask (quartiles)")
    every = variants(args.elements)
    for one in every:
        if wrong := one.problem():
            raise SystemExit(f"{one.name}, {one.mode}, {one.columns} columns was not timed: {wrong}")
    others, order = measure.Others(), list(every)
    for _ in range(args.rounds):
        random.shuffle(order)
        for one in order:
            one.run()
    result |= {"others": others.share(), "masks": [row(one, every[0]) for one in every]}
    print("\n".join(map(line, result["masks"])))
    record.finish(args, result, "masks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
