"""The plots, as PNG files: of one run, of several beside one another, confusions, trials, learning curves."""

import contextlib
import math
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

from fuseopt.finetune.stages import pruning

OURS, OTHER, NEUTRAL = "#1b6ca8", "#d9822b", "#667085"
NUMBERED_CLASSES, NAMED_CLASSES = 30, 60  # up to so many classes a matrix shows its counts, its names
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7ec",
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "text.parse_math": False,  # a class or a run may have dollars in its name
}


@contextlib.contextmanager
def _figure(path, rows, columns, size, title=None):
    """A figure with its axes in one list, written to `path` as a PNG at the end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False)
        try:
            yield list(axes.flat)
            if title:
                figure.suptitle(title, fontsize=12)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing")  # of a name; its place shows a box
                figure.savefig(path, dpi=130, format="png", bbox_inches="tight")
        finally:
            plt.close(figure)


def _plain(axis):
    """Numbers at a logarithmic axis without the mathtext that STYLE turns off."""
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


# ---- one run ---------------------------------------------------------------------------------------


def draw(run, results, path):
    """The panels of a finished run: loss and accuracy, then what there is of learning rate, sparsity, step times."""
    curves, step = results["curves"], results.get("step", {"skipped": ""})
    panels = [_loss, _accuracy]
    panels += [_learning_rate] if _series(curves, "learning_rate")[0] else []
    panels += [_sparsity] if results["sparsity"]["asked"] else []
    columns = 2 if len(panels) + ("ratio" in step) in (2, 4) else 3
    rows = math.ceil((len(panels) + ("ratio" in step)) / columns)
    with _figure(path, rows, columns, (5.5 * columns, 3.6 * rows), _title(run, results)) as axes:
        for axis, panel in zip(axes, panels):
            panel(axis, curves)
            _shade_pruning(axis, run)
            axis.set_xlim(0, max([row.get("step", 0) for row in curves], default=0) or 1)
            axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
            axis.set_xlabel("optimizer step")
        if "ratio" in step:
            _times(axes[len(panels)], step)
        for axis in axes[len(panels) + ("ratio" in step) :]:
            axis.set_axis_off()


def _title(run, results):
    accuracy, counts = results["accuracy"], results["sparsity"]
    average = f", averaged {accuracy['average']:.1%}" if "average" in accuracy else ""
    text = f"{type(run.optimizer).__name__}: accuracy {accuracy['raw']:.1%}{average}"
    if counts["asked"]:
        share = counts["raw_zeros"] / max(counts["prunable"], 1)
        text += f", {share:.0%} of the {counts['unit']} pruned (shaded: the steps that prune)"
    return text


def _series(curves, key):
    rows = [(row["step"], row[key]) for row in curves if row.get(key) is not None]
    return [step for step, _ in rows], [value for _, value in rows]


def _lines(axis, curves, lines):
    """Draw the series that there are; a single evaluation is a dot. Returns all values."""
    everything = []
    for key, color, label in lines:
        steps, values = _series(curves, key)
        if values:
            axis.plot(steps, values, color=color, label=label, marker="o" if len(values) == 1 else None)
            everything += values
    if everything:
        axis.legend()
    else:
        axis.text(0.5, 0.5, "nothing was logged", ha="center", va="center", transform=axis.transAxes)
    return everything


def _loss(axis, curves):
    lines = [("loss", NEUTRAL, "training"), ("eval_loss", OTHER, "test"), ("average_loss", OURS, "test, averaged")]
    values = _lines(axis, curves, lines)
    axis.set(title="Loss", ylabel="loss")
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
        _plain(axis.yaxis)


def _accuracy(axis, curves):
    lines = [("eval_accuracy", OTHER, "raw weights"), ("average_accuracy", OURS, "averaged weights")]
    values = _lines(axis, curves, lines)
    axis.set(title="Accuracy on the test rows", ylabel="accuracy", ylim=(_floor(values), 1.005))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _floor(values):
    """Leave out the first steep climb, so that the differences at the end can be seen."""
    settled = values[len(values) // 8 :]
    return max(0.0, min(settled) - 0.03) if settled else 0.0


def _learning_rate(axis, curves):
    axis.plot(*_series(curves, "learning_rate"), color=OURS)
    axis.set(title="Learning rate", ylabel="learning rate of the first group")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))


def _sparsity(axis, curves):
    axis.plot(*_series(curves, "sparsity"), color=OURS, drawstyle="steps-post")
    axis.set(title="Sparsity", ylabel="zeros in the prunable weights", ylim=(0, 1))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _shade_pruning(axis, run):
    prune = pruning(run.optimizer)
    if prune is not None:
        axis.axvspan(prune["begin"], prune["end"] or prune["begin"] + 1, color="#f2f4f7", zorder=0)


def _times(axis, step):
    axis.set(title="Time of one optimizer step")
    for place, (key, color) in enumerate((("fuseopt", OURS), ("torch", OTHER))):
        median, (low, high) = step[key]["ms"], step[key]["quartiles"]
        axis.barh(place, median, color=color, height=0.55, xerr=[[median - low], [high - median]], capsize=4)
        axis.text(high, place, f"  {median:.3f} ms", va="center")
    axis.set_yticks([0, 1], ["fuseopt\none pass", "torch\nseparate\npasses"])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, 1.4 * max(step["fuseopt"]["quartiles"][1], step["torch"]["quartiles"][1]))
    low, high = step["ratio"]["quartiles"]
    axis.set_xlabel(f"milliseconds, median and quartiles\nratio {step['ratio']['ratio']:.1f} ({low:.1f} to {high:.1f})")


# ---- confusions ------------------------------------------------------------------------------------


def confusion(matrix, names, title, path):
    """A confusion matrix, coloured by the share of each true class; counts up to 30 classes, names up to 60."""
    count = len(names)
    side = min(16, max(4.5, 2.5 + 0.38 * count))
    shares = [[n / max(sum(row), 1) for n in row] for row in matrix]
    with _figure(path, 1, 1, (side + 0.8, side)) as (axis,):
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        bar = axis.figure.colorbar(image, ax=axis, fraction=0.04, format=PercentFormatter(1, decimals=0))
        bar.set_label("share of the true class")
        axis.grid(False)
        axis.set(title=title, xlabel="found", ylabel="true")
        if count <= NAMED_CLASSES:
            short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
            angle = 90 if count > 8 and max(map(len, short)) > 2 else 30 if max(map(len, short)) > 7 else 0
            axis.set_xticks(range(count), short, rotation=angle, ha="right" if angle == 30 else "center")
            axis.set_yticks(range(count), short)
            axis.tick_params(labelsize=10 if count <= NUMBERED_CLASSES else 7)
        if count <= NUMBERED_CLASSES:
            _counts(axis, matrix, shares)


def _counts(axis, matrix, shares):
    """Write each count that is not 0 into its cell."""
    for true, row in enumerate(matrix):
        for found, number in enumerate(row):
            if number:
                color = "white" if shares[true][found] > 0.55 else "#101828"
                axis.text(found, true, number, ha="center", va="center", color=color, fontsize=9)


# ---- several runs ----------------------------------------------------------------------------------


def runs(named, path):
    """Training loss, accuracy and final accuracy of several runs. named: {name: metrics}."""
    colors = matplotlib.colormaps["tab20" if len(named) > 10 else "tab10"]
    with _figure(path, 1, 3, (17, max(4.5, 1.5 + 0.3 * len(named)))) as (loss, accuracy, final):
        for k, (name, metrics) in enumerate(named.items()):
            curves, color = metrics["curves"], colors(k % colors.N)
            loss.plot(*_series(curves, "loss"), color=color, label=name)
            for key, style in (("eval_accuracy", "-"), ("average_accuracy", "--")):
                accuracy.plot(*_series(curves, key), color=color, linestyle=style)
            _final(final, k, metrics["accuracy"], color)
        loss.set(title="Training loss", xlabel="optimizer step", ylabel="loss")
        dashed = any(_series(m["curves"], "average_accuracy")[0] for m in named.values())
        title = "Accuracy on the test rows" + (" (dashed: averaged)" if dashed else "")
        accuracy.set(title=title, xlabel="optimizer step")
        accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        values = [
            v for m in named.values() for key in ("eval", "average") for v in _series(m["curves"], f"{key}_accuracy")[1]
        ]
        accuracy.set_ylim(_floor(sorted(values)), 1.005)
        final.set(title="At the end (bar: raw, ring: averaged, cross: 8-bit)", xlabel="accuracy")
        final.set_yticks(range(len(named)), list(named))
        final.invert_yaxis()
        final.grid(axis="y", visible=False)
        ends = [v for m in named.values() for key, v in m["accuracy"].items() if key in ("raw", "average", "int8")]
        final.set_xlim(max(0.0, min(ends) - 0.1), 1.005)
        final.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _final(axis, place, accuracy, color):
    axis.barh(place, accuracy["raw"], color=color, height=0.6, alpha=0.7)
    for key, marker in (("average", "o"), ("int8", "x")):
        if key in accuracy:
            face = {"markerfacecolor": "none"} if marker == "o" else {}
            axis.plot(accuracy[key], place, marker, color="#101828", **face)


def trials(scores, best, name, parameters, path):
    """The scores of a search in their order, and each option against the score.

    scores: {number: score}; best: number of the best; parameters: {option: ("log" or "linear", {number: value})}.
    """
    columns = min(3, 1 + len(parameters))
    rows = math.ceil((1 + len(parameters)) / columns)
    with _figure(path, rows, columns, (4.6 * columns, 3.4 * rows)) as axes:
        axes[0].plot(list(scores), list(scores.values()), "o-", color=OURS, linewidth=0.8)
        axes[0].plot(best, scores[best], "o", color=OTHER, markersize=9, label=f"best: trial {best}")
        axes[0].set(title="Trials", xlabel="trial", ylabel=name)
        axes[0].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes[0].legend()
        for axis, (option, (scale, values)) in zip(axes[1:], parameters.items()):
            for number, score in scores.items():
                axis.plot(values[number], score, "o", color=OTHER if number == best else OURS)
            axis.set(title=option, ylabel=name)
            if scale == "log":
                axis.set_xscale("log")
                _plain(axis.xaxis)
            elif all(isinstance(value, int) for value in values.values()):
                axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        for axis in axes[1 + len(parameters) :]:
            axis.set_axis_off()


def learning_curve(rows, path):
    """Accuracy by the number of training rows, as given: [(rows, accuracy of the test rows)]."""
    with _figure(path, 1, 1, (6.5, 4.2), "Accuracy by the number of training rows") as (axis,):
        axis.plot(*zip(*rows), "o-", color=OURS)
        axis.set(xlabel="training rows", ylabel="accuracy on the test rows")
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
