"""`fuseopt search`: a hyper-parameter search with optuna over any options of `fuseopt finetune`.

Note: what the score is made of. A part of the training rows is kept out of each trial's training and scores it; the
test rows, on which accuracy is reported, are not looked at. The part is the same in all trials.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import sys
from pathlib import Path

import numpy as np
import optuna
import yaml
from optuna.trial import TrialState
from transformers.utils import logging as transformers_logging

from fuseopt.finetune import cli, plot
from fuseopt.finetune import data as sets
from fuseopt.finetune import options as finetune_options
from fuseopt.finetune import space as spaces
from fuseopt.finetune.checks import in_range
from fuseopt.finetune.folder import as_json, write_all
from fuseopt.finetune.report import used
from fuseopt.finetune.resume import last_checkpoint
from fuseopt.finetune.study import open_study
from fuseopt.finetune.table import decimals, table

PROG = "fuseopt search"
DESCRIPTION = f"""
Search values of any options of `fuseopt finetune` with optuna's TPE sampler. Every trial is a run of its own in
--output_dir/trial-000, ...; all other options are those of `fuseopt finetune` and hold for all trials. The score is
that of a part of the training rows which no trial trains on; the test rows are not looked at. Writes best.yaml
(for `fuseopt finetune --config`, which then trains on all training rows), trials.txt, trials.json and trials.png. A
trial that fails is recorded and the search goes on. The same command finds the same. --space takes {spaces.FORMS}.
Exit status: 0 done, 1 every trial failed, 2 bad input, 130 interrupted (continue with --continue).
"""
MAXIMISED = {"accuracy": True, "macro_f1": True, "loss": False}
FAILURES = (ValueError, OSError, RuntimeError)  # bad values together, a full disk, out of memory


@dataclasses.dataclass
class Search:
    """A search whose every option has been checked.

    argv: the words that hold for all trials; data: that of every trial, None where the search is over options of it.
    """

    settings: argparse.Namespace
    argv: list
    space: dict
    output_dir: Path
    seed: int
    data: sets.Data | None
    study: optuna.Study | None = None


def main(argv=None):
    """Parse, search, write; returns the exit status."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    search = None
    try:
        search = prepare(sys.argv[1:] if argv is None else list(argv))
        return execute(search)
    except (ValueError, OSError) as error:
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = f"; go on with the same command and --continue ({search.output_dir})" if search else ""
        print(f"{PROG}: interrupted{again}", file=sys.stderr)
        return 130


# ---- before the first trial ------------------------------------------------------------------------


def _parser():
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=DESCRIPTION,
        usage="%(prog)s --space NAME=VALUES ... [--trials N] [options of fuseopt finetune]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--space", nargs="+", required=True, metavar="NAME=VALUES", help="what is searched")
    add("--trials", type=int, default=20, metavar="N", help="trials in all (default: 20)")
    add("--score", choices=list(MAXIMISED), default="accuracy", help="what is searched for, of the averaged weights "
        "where a trial keeps an average, else of the raw ones (default: accuracy; loss: the lowest)")  # fmt: skip
    add("--validation_share", type=float, default=0.25, metavar="SHARE", help="share of the training rows that is kept "
        "out to score the trials, in (0, 1) (default: 0.25)")  # fmt: skip
    add("--continue", dest="again", action="store_true", help="go on with the search that is in --output_dir, up to "
        "--trials in all")  # fmt: skip
    parser.error = _refuse
    return parser


def _refuse(message):
    raise ValueError(message)


def prepare(argv):
    """Everything that can be wrong is found here, before anything is written. Raises ValueError, OSError."""
    settings, rest = _parser().parse_known_args(argv)
    in_range("trials", settings.trials, 1)
    in_range("validation_share", settings.validation_share, 0, 1, open_low=True)
    space = spaces.read(settings.space)
    if not any(word.partition("=")[0].replace("-", "_") == "__output_dir" for word in rest):
        rest += ["--output_dir", "runs/search"]
    options, args = finetune_options.parse(rest)
    if args.resume_from_checkpoint:
        raise ValueError("--resume_from_checkpoint: a search goes on with --continue")
    if options.folds or options.learning_curve:
        raise ValueError("--folds and --learning_curve: a trial is one run")
    for values in spaces.examples(space):
        try:
            finetune_options.parse([*rest, *spaces.words(values)])
        except ValueError as error:
            raise ValueError(f"--space {next(iter(values))}: {error}") from error
    data = held_out(sets.load(options, args.seed), settings.validation_share, args.seed)
    if {field.name for field in dataclasses.fields(sets.DataOptions)} & space.keys():
        data = None
    search = Search(settings, rest, space, Path(args.output_dir), args.seed, data)
    common = {k: v for k, v in spaces.given(rest).items() if k not in ("output_dir", "overwrite")}
    same = {"space": sorted(settings.space), "options": common, "score": settings.score}
    same |= {"validation_share": settings.validation_share}
    direction = "maximize" if MAXIMISED[settings.score] else "minimize"
    search.study = open_study(search.output_dir, direction, same, settings.again, options.overwrite)
    return search


def held_out(data, share, seed):
    """The data of a trial: a stratified part of the training rows in place of the test rows."""
    parts = sets.split([row["labels"] for row in data.train], share, seed, "--validation_share")
    train, validation = ([data.train[i] for i in part] for part in parts)
    text = f"{data.description}; of the training rows {len(validation)} are kept out to score {len(train)}"
    return dataclasses.replace(data, train=train, test=validation, description=text)


# ---- the trials ------------------------------------------------------------------------------------


def execute(search):
    """Run the trials that are left and write what they say; returns 0, or 1 if none succeeded."""
    try:
        while True:
            trial = _next(search)
            if trial is None:
                break
            _run(search, *trial)
    finally:
        finished = _finished(search.study)
        if finished:
            _write(search)
    if not finished:
        errors = {_why(search.study, t) for t in search.study.trials}
        print(f"{PROG}: every trial failed: {'; '.join(sorted(errors))}", file=sys.stderr)
        return 1
    print("\n" + "\n".join(_table(search)))
    best, score = search.study.best_trial, search.settings.score
    print(f"\nbest: trial {best.number}, {score} {best.value:.4f} on rows kept out of the training rows; train with")
    print(f"fuseopt finetune --config {search.output_dir / 'best.yaml'}")
    return 0


def _next(search):
    """(number, values) of the trial to run: the one that was interrupted, else a new one; None at the end.

    Each new trial draws from a sampler seeded with its own number, so that a search that was interrupted goes on as
    if it had not been.
    """
    trials = search.study.trials
    running = [t for t in trials if t.state == TrialState.RUNNING]
    if running:
        return running[0].number, running[0].params
    if len(trials) >= search.settings.trials:
        return None
    seed = int(np.random.SeedSequence([search.seed, len(trials)]).generate_state(1)[0])
    search.study.sampler = optuna.samplers.TPESampler(seed=seed)
    trial = search.study.ask(search.space)
    return trial.number, trial.params


def _run(search, number, values):
    """Run one trial and record its score, or why it has none."""
    study, name = search.study, search.settings.score
    print(f"trial {number}: {_text(values)}", flush=True)
    try:
        score = _score(search, number, values)
    except FAILURES as error:
        message = " ".join(str(error).split())
        study.set_user_attr(_error(number), message)
        study.tell(number, state=TrialState.FAIL)
        print(f"trial {number} failed: {message}", file=sys.stderr)
    else:
        study.tell(number, score)
        print(f"trial {number}: {name} {score:.4f}", flush=True)


def _score(search, number, values):
    output_dir = search.output_dir / f"trial-{number:03d}"
    options, args = finetune_options.parse([*search.argv, *spaces.words(values), "--output_dir", str(output_dir)])
    checkpoint = last_checkpoint(output_dir) if search.settings.again else None
    args.resume_from_checkpoint = checkpoint and "last"
    options.overwrite = not checkpoint
    data = search.data
    if data is None:
        data = held_out(sets.load(options, search.seed), search.settings.validation_share, search.seed)
    with contextlib.redirect_stdout(io.StringIO()):  # report.txt has it
        metrics = cli.train_once(options, args, dataclasses.replace(data))  # which a head relabels
    if metrics["verification"] is not None and not metrics["verification"]["passed"]:
        raise ValueError("the verification failed")
    score = metrics[search.settings.score][used(metrics)]
    if not math.isfinite(score):
        raise ValueError(f"the {search.settings.score} is {score}")
    return score


# ---- what they say ---------------------------------------------------------------------------------


def _finished(study):
    return [trial for trial in study.trials if trial.state == TrialState.COMPLETE]


def _error(number):
    return f"error of trial {number}"


def _why(study, trial):
    """Why a trial failed; None for one that did not."""
    return study.user_attrs.get(_error(trial.number))


def _text(values):
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(search):
    """The trials, the best first, the failed last."""
    finished = sorted(_finished(search.study), key=lambda t: t.value, reverse=MAXIMISED[search.settings.score])
    failed = [t for t in search.study.trials if t.state == TrialState.FAIL]
    rows = [
        (f"trial-{t.number:03d}", decimals(t.value, 4), *(_short(t.params[name]) for name in search.space))
        for t in finished + failed
    ]
    lines = table(("trial", search.settings.score, *search.space), rows)
    return lines + [f"trial-{t.number:03d} failed: {_why(search.study, t)}" for t in failed]


def _write(search):
    """best.yaml, trials.txt, trials.json and trials.png."""
    study, name = search.study, search.settings.score
    finished, best = _finished(study), study.best_trial
    content = [{"trial": t.number, name: t.value, "options": t.params, "error": _why(study, t)} for t in study.trials]
    scores = {t.number: t.value for t in finished}
    parameters = {
        option: ("log" if getattr(of, "log", False) else "linear", {t.number: t.params[option] for t in finished})
        for option, of in search.space.items()
    }
    head = f"# trial {best.number} of fuseopt search: {name} {best.value:.4f} on rows kept out of the training rows\n"
    writers = {
        "best.yaml": head + yaml.safe_dump(_best(search)),
        "trials.txt": "\n".join(_table(search)) + "\n",
        "trials.json": as_json(content),
        "trials.png": lambda path: plot.trials(scores, best.number, name, parameters, path),
    }
    write_all(search.output_dir, writers)


def _best(search):
    """The options of the best trial as a --config file gives them, without where the search wrote."""
    values = spaces.given([*search.argv, *spaces.words(search.study.best_trial.params)])
    options, args = finetune_options.parse(search.argv)
    for name in values:
        if isinstance(getattr(options, name, getattr(args, name, None)), list) and not isinstance(values[name], list):
            values[name] = [values[name]]
    return {name: value for name, value in values.items() if name not in ("output_dir", "overwrite")}
