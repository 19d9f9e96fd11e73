"""Several runs of one command over parts of the data: k-fold cross-validation and learning curves.

Every run has a folder of its own in --output_dir. With --resume_from_checkpoint those that have a checkpoint
continue from it, and those that have none start.
"""

import copy
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from fuseopt.finetune import data as sets
from fuseopt.finetune import folder, plot
from fuseopt.finetune.report import LABELS, confusion_text, used
from fuseopt.finetune.resume import last_checkpoint
from fuseopt.finetune.table import decimals, percent, table

OUTPUTS = ("fold-[0-9]*", "folds.*", "confusion.png", "share-[0-9]*", "learning_curve.*")


@dataclass
class FoldsOptions:
    """Runs over parts of the data."""

    _argument_group_name = "several runs"

    folds: int = field(
        default=0,
        metadata={
            "help": "k-fold cross-validation: k runs, each tested on another k-th of all rows, in fold-1 ... fold-k of "
            "--output_dir; 0: one run."
        },
    )
    learning_curve: list[float] = field(
        default_factory=list,
        metadata={
            "help": "One run with each of these shares of the training rows, in (0, 1], in share-0.10 ... of "
            "--output_dir, all tested on the same rows."
        },
    )


def cross_validate(options, args, train_once):
    """k runs, each tested on another k-th of all rows; returns the exit status, 1 if a verification failed.

    train_once: function (options, args, data) -> what metrics.json holds. Raises ValueError and OSError.
    """
    if options.learning_curve:
        raise ValueError("--folds and --learning_curve: choose one of them")
    parts = sets.folds(sets.load(options, args.seed), options.folds, args.seed)
    named = {f"fold-{k}": part for k, part in enumerate(parts, start=1)}
    return _train(options, args, named, train_once, _write_folds)


def learning_curve(options, args, train_once):
    """One run with each share of the training rows, all tested on the same rows; as cross_validate."""
    shares = sorted(options.learning_curve)
    for share in shares:
        if not 0.01 <= share <= 1:
            raise ValueError(f"--learning_curve {share:g}: a share must be from 0.01 to 1")
    names = [f"share-{share:.2f}" for share in shares]
    if len(set(names)) < len(names):
        raise ValueError(f"--learning_curve {' '.join(map(str, shares))}: two shares are equal to two decimals")
    parts = sets.shares(sets.load(options, args.seed), shares, args.seed)
    return _train(options, args, dict(zip(names, parts)), train_once, _write_curve)


def _train(options, args, parts, train_once, write):
    """Train the named parts in turn; the first process prints and writes what they say together."""
    _open(options, args)
    first, metrics = args.process_index == 0, {}
    for name, part in parts.items():
        if first:
            print(f"\n{name}: {len(part.train):,} training rows, {len(part.test):,} test rows", flush=True)
        metrics[name] = train_once(*part_of(options, args, name), part)
    if first:
        print("\n" + write(args.output_dir, metrics, parts.values()))
    checks = [one["verification"] for one in metrics.values()]
    return int(any(one is not None and not one["passed"] for one in checks))


def _open(options, args):
    """Refuse an output folder that is in use, unless its runs are to be continued or replaced."""
    path, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted not in (None, "last"):
        raise ValueError(f"--resume_from_checkpoint {wanted}: with several runs give it without a folder")
    folder.refuse_used(path, options.overwrite or wanted, "--resume_from_checkpoint to continue the runs in it")
    if args.process_index == 0:
        folder.clear(path, [] if wanted else OUTPUTS)


def part_of(options, args, name):
    """Options and arguments of one run: its own folder, from its last checkpoint where it is to continue."""
    options, args = copy.copy(options), copy.deepcopy(args)
    args.output_dir = str(Path(args.output_dir) / name)
    if args.resume_from_checkpoint and last_checkpoint(args.output_dir) is None:
        args.resume_from_checkpoint, options.overwrite = None, True  # it had just begun, or not yet
    return options, args


def _write_folds(output_dir, metrics, parts):
    """Accuracy of each fold with mean and deviation, and the confusions of all rows; returns the table."""
    scores = {key: [one[key][used(one)] for one in metrics.values()] for key in ("accuracy", "macro_f1", "loss")}
    rows = [
        (name, len(part.test), percent(a), decimals(f), decimals(x))
        for name, part, a, f, x in zip(metrics, parts, *scores.values())
    ]
    means = {key: statistics.fmean(values) for key, values in scores.items()}
    spread = {key: statistics.stdev(values) for key, values in scores.items()}
    for label, of in (("mean", means), ("standard deviation", spread)):
        rows.append((label, None, percent(of["accuracy"]), decimals(of["macro_f1"]), decimals(of["loss"])))
    text = "\n".join(table(("fold", "test rows", "accuracy", "macro F1", "loss"), rows))
    first = next(iter(metrics.values()))
    names, chosen = first["classes"], used(first)
    pooled = sum_of([one["confusion"][chosen] for one in metrics.values()])
    whole = f"{text}\n\nall folds together, {LABELS[chosen]}\n\n{confusion_text(pooled, names)}\n"
    content = {"scores": scores, "mean": means, "standard_deviation": spread, "confusion": pooled, "classes": names}
    writers = {
        "folds.json": folder.as_json(content),
        "folds.txt": whole,
        "confusion.png": lambda path: plot.confusion(pooled, names, "Confusions of all folds together", path),
    }
    folder.write_all(output_dir, writers)
    return text


def sum_of(matrices):
    """The sum of matrices given as lists of rows."""
    return [[sum(cells) for cells in zip(*rows)] for rows in zip(*matrices)]


def _write_curve(output_dir, metrics, parts):
    """Accuracy by number of training rows; returns the table."""
    points = [
        {"run": name, "rows": len(part.train), "weights": used(one)}
        | {key: one[key][used(one)] for key in ("accuracy", "macro_f1", "loss")}
        for (name, one), part in zip(metrics.items(), parts)
    ]
    rows = [(p["run"], p["rows"], percent(p["accuracy"]), decimals(p["macro_f1"]), decimals(p["loss"])) for p in points]
    text = "\n".join(table(("run", "training rows", "accuracy", "macro F1", "loss"), rows))
    curve = [(point["rows"], point["accuracy"]) for point in points]
    writers = {
        "learning_curve.json": folder.as_json(points),
        "learning_curve.txt": text + "\n",
        "learning_curve.png": lambda path: plot.learning_curve(curve, path),
    }
    folder.write_all(output_dir, writers)
    return text
