"""Tables and numbers as text."""

import numpy as np


def table(head, rows, left=1):
    """Lines of a table: the first `left` columns flush left, the others right; None is a dash.

    The last column stays as it is where it is flush left, so that long text may end a line.
    """
    cells = [[str(c) for c in head], *([("-" if c is None else str(c)) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for line in cells:
        parts = [c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths))]
        lines.append("  ".join(parts).rstrip())
    return lines


def percent(share):
    """0.9312 as 93.1%; None stays None."""
    return None if share is None else f"{share:.1%}"


def decimals(value, places=3):
    """A number with so many decimals; None stays None."""
    return None if value is None else f"{value:.{places}f}"


def size(count):
    """Bytes in the unit that suits them: 532 B, 1.2 kB, 3.4 MB; None stays None."""
    if count is None:
        return None
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def spread(values, name):
    """{name: median, "quartiles": [lower, upper]} of some numbers."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {name: float(median), "quartiles": [float(low), float(high)]}
