"""Pictures of results: a roofline and bars of ratios for the main table, curves for scaling. Drawn beside the JSON."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import report
from shapes import SHAPES

OURS, FUSED, RECIPE, LINE = "#1b6ca8", "#d9812b", "#b0b7bf", "#444444"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})


def draw(result: dict, path: Path) -> list[Path]:
    """Both pictures of a main table; their paths."""
    return [save(roofline(result), path, "roofline"), save(ratios(result), path, "ratios")]


def save(figure, path: Path, what: str) -> Path:
    """Write it whole, as RESULT-WHAT.png."""
    out = path.with_name(f"{path.stem}-{what}.png")
    temporary = out.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    plt.close(figure)
    temporary.replace(out)
    return out


def rows(case: dict, family: str) -> list[dict]:
    return [row for row in case["variants"] if row["family"] == family and "seconds" in row]


def roofline(result: dict):
    """Bytes a second against the bytes of a step: fuseopt and torch fused, and what the memory gives."""
    figure, axes = plt.subplots(figsize=(8.5, 4), layout="constrained")
    kinds = (
        ("fuseopt, plain rules", OURS, "o"),
        ("fuseopt, mask + clip + prune + EMA", OURS, "s"),
        ("torch fused", FUSED, "x"),
    )
    points: dict[str, list] = {label: [] for label, _, _ in kinds}
    for case in result["cases"]:
        ours = rows(case, "fuseopt")[:1]
        fused = [row for row in rows(case, "torch") if "fused" in row["name"]]
        label = kinds["ratio" in (ours or [{}])[0] and report.CASES[case["case"]][2] != "plain"][0]
        for row, where in [(row, label) for row in ours] + [(row, kinds[2][0]) for row in fused]:
            points[where].append((row["bytes"], row["bytes"] / row["seconds"]["median"] / 1e9))
    for label, color, marker in kinds:
        if points[label]:
            face = {"facecolors": "none"} if marker == "s" else {}
            style = {"c": color} if marker == "x" else {"edgecolors": color, **(face or {"facecolors": color})}
            axes.scatter(
                *zip(*points[label], strict=True), marker=marker, s=36, label=label, zorder=3, alpha=0.8, **style
            )
    best = [case["bandwidth"][case["best_kernel"]]["median"] / 1e9 for case in result["cases"] if case["best_kernel"]]
    if best:
        axes.axhspan(min(best), max(best), color=LINE, alpha=0.25, lw=0)
        top = max(best)
        axes.axhline(top, color=LINE, lw=1)
        axes.text(0.01, top * 1.08, f"memory, measured in the same rounds: {min(best):.0f} to {top:.0f} GB/s",
                  transform=axes.get_yaxis_transform(), color=LINE, va="bottom")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="bytes that a step reads and writes", ylabel="GB/s")
    axes.set_title(
        "One optimizer step: above the line the cache serves it, to the left calls are what it costs", fontsize=10
    )
    axes.grid(alpha=0.25, which="major")
    if any(points.values()):
        axes.legend(loc="lower right", frameon=False)
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, 2 * low, 1.6 * max(best, default=0)))
    return figure


def ratios(result: dict):
    """How many times as long as fuseopt torch takes: AdamW and all stages by shape, every rule on one large tensor."""
    panels = [panel for panel in (by_shape(result, "adamw"), by_shape(result, "full"), by_rule(result)) if panel[1]]
    figure, all_axes = plt.subplots(1, max(1, len(panels)), figsize=(12, 3.9), layout="constrained", squeeze=False)
    for axes, (title, bars) in zip(all_axes[0], panels, strict=False):
        labels, spreads, colors = zip(*bars, strict=True)
        middle = [s["median"] for s in spreads]
        error = [[s["median"] - s["low"] for s in spreads], [s["high"] - s["median"] for s in spreads]]
        drawn = axes.barh(
            labels, [m - 1 for m in middle], left=1, xerr=error, color=colors, capsize=2, error_kw={"lw": 1}
        )
        axes.bar_label(drawn, [f"x{m:.2f}" for m in middle], padding=5, fontsize=9)
        axes.axvline(1, color=LINE, lw=1, ls=":")
        widest = max(s["high"] for s in spreads)
        axes.set(xscale="log", xlim=(min(0.4, 0.35 * min(s["low"] for s in spreads)), widest * 2.2))
        axes.set_title(title, fontsize=10)
        axes.set_xticks([t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if axes.get_xlim()[0] <= t <= widest * 2], [])
        axes.set_xticklabels([f"{t:g}" for t in axes.get_xticks()])
        axes.minorticks_off()
        axes.invert_yaxis()
    figure.suptitle("Time of torch's step relative to fuseopt's (1: equal; quartiles as whiskers)", fontweight="bold")
    return figure


def short(case: dict) -> str:
    return report.shape_title(case).replace(" parameters", "").replace("of 64", "(64)")


def by_shape(result: dict, name: str) -> tuple[str, list]:
    """(title, [(shape, spread, color)]) of torch fused, or of the fastest recipe."""
    bars, title = (
        [],
        {"adamw": "AdamW, fp32: torch fused", "full": "mask + clip + AdamW + prune + EMA:\nfastest recipe"}[name],
    )
    found = {case["shape"]: case for case in result["cases"] if case["case"] == name}
    for case in [found[s] for s in SHAPES if s in found]:
        candidates = (
            [r for r in rows(case, "torch") if "fused" in r["name"]]
            + rows(case, "float masks")
            + rows(case, "boolean masks")
        )
        if candidates:
            best = min(candidates, key=lambda row: row["ratio"]["median"])
            bars.append((short(case), best["ratio"], FUSED if name == "adamw" else RECIPE))
    return title, bars


def by_rule(result: dict) -> tuple[str, list]:
    """torch fused, or the fastest of torch's where that is missing or wrong, for every rule on one large tensor."""
    bars = []
    for case in result["cases"]:
        found = rows(case, "torch")
        if case["shape"] == "one" and found:
            best = min(found, key=lambda row: ("fused" not in row["name"], row["ratio"]["median"]))
            how = "" if "fused" in best["name"] else f", {best['name'].removeprefix('torch ').removesuffix('=True')}"
            label = report.heading(case["case"]).replace(" momentum", " mom.").replace("without", "w/o")
            bars.append((label + how, best["ratio"], RECIPE if how else FUSED))
    return "every rule, one large tensor:\ntorch fused, or as named", bars


def scaling(result: dict, path: Path) -> Path:
    """Nanoseconds a parameter against size, and time against threads."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    timed = [row for row in result["scaling"] if "ratio" in row]
    for name, color in (("fuseopt", OURS), ("torch fused", FUSED)):
        sizes = [row for row in timed if row["threads"] == result["threads"]]
        sizes = list({row["elements"]: row for row in sizes}.values())
        per = [[row[name][k] * 1e9 / row["elements"] for row in sizes] for k in ("median", "low", "high")]
        x = [row["elements"] for row in sizes]
        left.plot(x, per[0], "o-", color=color, label=name)
        left.fill_between(x, per[1], per[2], color=color, alpha=0.2, lw=0)
        for n, style in zip(
            sorted({r["elements"] for r in timed if r["threads"] != result["threads"]}),
            ("o-", "s--", "^:"),
            strict=False,
        ):
            some = sorted((row for row in timed if row["elements"] == n), key=lambda row: row["threads"])
            times = [row[name]["median"] * 1e6 for row in some]
            right.plot(
                [row["threads"] for row in some],
                times,
                style,
                color=color,
                label=f"{name}, {n:.0e}".replace("e+0", "e"),
            )
    left.set(xscale="log", yscale="log", xlabel="parameters", ylabel="ns a parameter", title="AdamW, fp32, one tensor")
    right.set(yscale="log", xlabel="threads", ylabel="us a step", title="by threads")
    ticks = sorted({row["threads"] for row in timed})
    right.set_xticks(ticks, [str(t) for t in ticks])
    for axes in (left, right):
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    return save(figure, path, "curves")
