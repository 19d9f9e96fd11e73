"""Draws a result of bench/step.py as the bars of the README.

python bench/plot.py RESULT.json PATH.png
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import report
from step import read

BARS = [  # label, family, part of the name; the fastest of a family is drawn
    ("fuseopt, one pass", "fuseopt", "freeze"),
    ("torch fused + separate passes,\nmasks as floats", "float masks, restored", ""),
    ("torch fused + separate passes,\nmasks as booleans", "boolean masks, restored", ""),
]


def draw(result: dict, path: Path) -> None:
    """Median time of the full step, a panel a shape, quartiles as whiskers."""
    cases = [c for c in result["cases"] if c["case"] == "full" and c["shape"] in ("fifty", "1000")]
    figure, panels = plt.subplots(1, len(cases), figsize=(11, 2.6), layout="constrained")
    for panel, case in zip(panels, cases, strict=True):
        rows = [_row(case, family, part) for _, family, part in BARS]
        times = [row["seconds"]["median"] * 1e3 for row in rows]
        error = [[t - row["seconds"]["low"] * 1e3 for t, row in zip(times, rows, strict=True)],
                 [row["seconds"]["high"] * 1e3 - t for t, row in zip(times, rows, strict=True)]]
        labels = [label for label, _, _ in BARS]
        bars = panel.barh(labels, times, xerr=error, color=["#1b6ca8", "#d9812b", "#b0b7bf"], capsize=3)
        panel.bar_label(bars, [f"{t:.3g} ms  ({t / times[0]:.1f}x)" for t in times], padding=6)
        panel.set(title=report.SHAPE_TITLES[case["shape"]], xlim=(0, 1.35 * max(times)), xlabel="ms a step")
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_yticklabels([])
    figure.suptitle("freeze mask + clip + decay + AdamW + prune + EMA, fp32, one step", fontweight="bold")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    temporary.replace(path)


def _row(case: dict, family: str, part: str) -> dict:
    rows = [r for r in case["variants"] if r["family"] == family and part in r["name"] and "seconds" in r]
    return min(rows, key=lambda row: row["seconds"]["median"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    draw(read(Path(sys.argv[1])), Path(sys.argv[2]))
