"""`opt.explain()`, `opt.statistics()`: what a step does and moves, how long it takes, and what it did."""

from .explanation import Explanation
from .methods import ReportMethods

__all__ = ["Explanation", "ReportMethods"]
