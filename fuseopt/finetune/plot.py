"""One PNG: loss, accuracy, sparsity, and the two step times."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

OURS, OTHER, NEUTRAL = "#1b6ca8", "#d9822b", "#667085"


def draw(run, results, path):
    """Draw the four panels of a finished run to `path`."""
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e4e7ec",
        "axes.axisbelow": True,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
        curves = results["curves"]
        _loss(axes[0, 0], curves)
        _accuracy(axes[0, 1], curves)
        _sparsity(axes[1, 0], curves, run.options.sparsity)
        _times(axes[1, 1], results["step"])
        for axis in (axes[0, 0], axes[0, 1], axes[1, 0]):
            _shade_pruning(axis, run)
            axis.set_xlim(0, run.args.max_steps)
            axis.set_xlabel("optimizer step")
        figure.suptitle(_title(run, results), fontsize=12)
        figure.savefig(path, dpi=130, format="png")
        plt.close(figure)


def _title(run, results):
    accuracy, counts = results["accuracy"], results["sparsity"]
    final = f"raw {accuracy['raw']:.1%}" + (f", EMA {accuracy['ema']:.1%}" if "ema" in accuracy else "")
    share = counts["raw_zeros"] / max(counts["prunable"], 1)
    shaded = " (shaded: the steps that prune)" if counts["asked"] else ""
    return f"fuseopt {type(run.optimizer).__name__}: {final} accuracy at {share:.0%} sparsity{shaded}"


def _series(curves, key):
    rows = [(row["step"], row[key]) for row in curves if key in row]
    return [step for step, _ in rows], [value for _, value in rows]


def _loss(axis, curves):
    axis.plot(*_series(curves, "loss"), color=OURS, label="training, raw weights")
    axis.plot(*_series(curves, "eval_loss"), color=OTHER, label="test, raw weights")
    axis.set(title="Loss", ylabel="cross entropy", yscale="log")
    axis.legend()


def _accuracy(axis, curves):
    steps, raw = _series(curves, "eval_accuracy")
    axis.plot(steps, raw, color=OTHER, label="raw weights")
    ema_steps, ema = _series(curves, "ema_accuracy")
    if ema:
        axis.plot(ema_steps, ema, color=OURS, label="EMA weights")
    axis.set(title="Accuracy on the test images", ylabel="accuracy", ylim=(_floor(raw + ema), 1.005))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(loc="lower right")


def _floor(values):
    """Leave out the first steep climb, so that the differences at the end can be seen."""
    settled = values[len(values) // 8 :] or [0]
    return max(0.0, min(settled) - 0.03)


def _sparsity(axis, curves, target):
    axis.plot(
        *_series(curves, "sparsity"),
        color=OURS,
        drawstyle="steps-post",
        label="zeros in the prunable weights",
    )
    if target:
        axis.axhline(target, color=NEUTRAL, linestyle=":", label=f"asked for: {target:.0%}")
    axis.set(title="Sparsity", ylabel="share of zeros", ylim=(0, 1))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(loc="upper left")


def _shade_pruning(axis, run):
    prune = next((g["prune"] for g in run.optimizer.param_groups if g["prune"] is not None), None)
    if prune is not None:
        axis.axvspan(prune["begin"], prune["end"] or prune["begin"] + 1, color="#f2f4f7", zorder=0)


def _times(axis, step):
    axis.set(title="Time of one optimizer step")
    if "skipped" in step:
        axis.text(
            0.5, 0.5, f"not compared:\n{step['skipped']}", ha="center", va="center", transform=axis.transAxes
        )
        axis.set_axis_off()
        return
    labels = ["fuseopt\none pass", "torch\nseparate passes"]
    for place, (key, color) in enumerate((("fuseopt", OURS), ("torch", OTHER))):
        median, (low, high) = step[key]["ms"], step[key]["quartiles"]
        axis.barh(place, median, color=color, height=0.55, xerr=[[median - low], [high - median]], capsize=4)
        axis.text(high, place, f"  {median:.3f} ms, {step[key]['bytes'] / 1e6:.1f} MB moved", va="center")
    axis.set_yticks([0, 1], labels)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1.85 * max(step["fuseopt"]["quartiles"][1], step["torch"]["quartiles"][1]))
    low, high = step["ratio"]["quartiles"]
    axis.set_xlabel(
        f"milliseconds (median, quartiles); ratio {step['ratio']['ratio']:.1f} ({low:.1f} to {high:.1f})"
    )
