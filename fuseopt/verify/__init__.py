"""Repeats a live optimizer's steps with torch.optim and separate passes, and reports the difference.

    checker = fuseopt.verify.attach(opt)
    train(...)
    print(checker.report())

Nothing here imports the formulas of fuseopt: `recipe` states them anew, the way a user writes them, in
float64. `shadow` runs the recipe beside the optimizer, `judge` decides what may differ and by how much,
`report` holds the table of bounds and prints the result. The command `fuseopt verify` (`sweep`) runs every rule
and stage so on this machine: `cases` says on what, `trial` runs one cell, `shapes` reads those of a model.
"""

from .checker import Checker, attach
from .report import BOUNDS, Report

__all__ = ["BOUNDS", "Checker", "Report", "attach"]
