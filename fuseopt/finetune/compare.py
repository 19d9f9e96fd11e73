"""`fuseopt compare RUN...`: finished runs in one table, and their curves in one plot."""

import argparse
import json
import os
import sys
from pathlib import Path

from fuseopt.finetune.table import decimals, percent, size, table

PROG = "fuseopt compare"
DESCRIPTION = """
Print the finished runs of `fuseopt finetune` in one table: accuracy of the raw, averaged and 8-bit weights on the
test rows, share of zeros, median time of a training step and of its optimizer step, peak memory, size of the model
file, whether the steps were verified, and the options in which the runs differ. Exit status: 0 done, 2 bad input.
"""
METRICS = "metrics.json"
# What a run must have said; an older or damaged file is refused.
NEEDED = ("accuracy", "sparsity", "time", "memory", "size", "options", "curves")
# Where a run is, what it shows and what it writes on its way decide nothing; max_steps says what the epochs come to.
NO_DIFFERENCE = {"output_dir", "run_name", "verify", "compare_steps", "quantize", "disable_tqdm", "report_to"}
NO_DIFFERENCE |= {"num_train_epochs", "save_strategy", "save_steps", "save_total_limit", "logging_steps"}

# {key of --sort: (title, value of a run's metrics, how it is shown)}
COLUMNS = {
    "raw": ("raw", lambda m: m["accuracy"]["raw"], percent),
    "average": ("average", lambda m: m["accuracy"].get("average"), percent),
    "int8": ("8-bit", lambda m: m["accuracy"].get("int8"), percent),
    "zeros": ("zeros", lambda m: m["sparsity"]["raw_zeros"] / max(m["sparsity"]["prunable"], 1), percent),
    "step": ("step ms", lambda m: _median(m, "train_step_ms"), decimals),
    "optimizer": ("optimizer ms", lambda m: _median(m, "optimizer_step_ms"), decimals),
    "memory": ("memory", lambda m: m["memory"]["peak_bytes"], size),
    "size": ("size", lambda m: m["size"].get("model"), size),
    "verified": ("verified", lambda m: _verdict(m), lambda verdict: verdict or "no"),
}
FALLING = ("raw", "average", "int8", "zeros")  # the best first


def main(argv=None):
    """Parse, read, print, write; returns the exit status (0 or 2)."""
    try:
        options = _parser().parse_args(argv)
        for name in ("plot", "json"):
            file = getattr(options, name)
            if file and not Path(file).parent.is_dir():
                raise ValueError(f"--{name} {file}: there is no folder {Path(file).parent}")
        named = read(options.runs)
        rows = order(named, options.sort)
        print("\n".join(lines(rows)))
        if checked := [name for name, content in named.items() if content["time"].get("with_checks")]:
            print(f"the step times of {', '.join(checked)} include the checks of --verify")
        _write(rows, named, options)
    except (ValueError, OSError) as error:
        print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog=PROG, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run, or a folder of such folders")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves together into this PNG file")
    parser.add_argument("--json", metavar="FILE", help="write the table and the curves to this file")
    parser.add_argument("--sort", metavar="KEY", choices=("name", *COLUMNS), help="one of: name, " + ", ".join(COLUMNS))
    parser.error = _refuse
    return parser


def _refuse(message):
    raise ValueError(message)


def read(folders):
    """{name: metrics} of all runs in these folders. Raises ValueError for a folder that holds no finished run."""
    found = {}
    for given in map(Path, folders):
        if not given.is_dir():
            raise ValueError(f"{given}: there is no such folder")
        inside = sorted(path.parent for path in given.glob(f"*/{METRICS}"))
        own = [given] if (given / METRICS).is_file() else []
        if not own and not inside:
            unfinished = any((given / name).exists() for name in ("config.yaml", "log.txt"))
            raise ValueError(
                f"{given}: this run is not finished, it has no {METRICS}: continue it with --resume_from_checkpoint"
                if unfinished
                else f"{given}: this is no run of fuseopt finetune, and there is none in it: no {METRICS}"
            )
        for path in own or inside:
            found[os.path.realpath(path)] = path, metrics(path)
    names = _names([path for path, _ in found.values()])
    return {name: content for name, (_, content) in zip(names, found.values())}


def metrics(folder):
    """The metrics of a finished run. Raises ValueError for a file that is damaged or not of such a run."""
    path = Path(folder) / METRICS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and Unicode's
        raise ValueError(f"{path}: this is damaged, not JSON: repeat the run with --overwrite") from error
    missing = [name for name in NEEDED if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing: this was not written by this version: repeat the run")
    return content


def _names(paths):
    """Names as short as they can be told apart: the last folder, or the path from the common one."""
    short = [path.resolve().name for path in paths]
    if len(set(short)) == len(short):
        return short
    common = os.path.commonpath([path.resolve() for path in paths])
    return [os.path.relpath(path.resolve(), common) for path in paths]


def differences(named):
    """{name: {option: value}}: the options whose value is not the same in all runs."""
    options = {name: content["options"] for name, content in named.items()}
    every = dict.fromkeys(key for one in options.values() for key in one if key not in NO_DIFFERENCE)
    differing = [key for key in every if len({json.dumps(one.get(key)) for one in options.values()}) > 1]
    return {name: {key: one.get(key) for key in differing} for name, one in options.items()}


def order(named, key):
    """The rows of the table, as dicts with "name", the columns and "differs"; None sorts last."""
    differing = differences(named)
    rows = [
        {"name": name} | {c: value(content) for c, (_, value, _) in COLUMNS.items()} | {"differs": differing[name]}
        for name, content in named.items()
    ]
    if key is None:
        return rows
    known = sorted((row for row in rows if row[key] is not None), key=lambda r: r[key], reverse=key in FALLING)
    return known + [row for row in rows if row[key] is None]


def lines(rows):
    """The table as lines of text."""
    head = ("run", *(title for title, _, _ in COLUMNS.values()))
    shown = [[row["name"], *(show(row[key]) for key, (_, _, show) in COLUMNS.items())] for row in rows]
    body = table(head, shown)
    if len(rows) == 1:
        return body
    width = max(map(len, body))
    differs = ["options that differ", *(_words(row["differs"]) for row in rows)]
    return [f"{line.ljust(width)}  {words}".rstrip() for line, words in zip(body, differs)]


def _words(options):
    return " ".join(f"{key}={_value(value)}" for key, value in options.items() if value not in (None, [], ""))


def _value(value):
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _median(content, name):
    timed = content["time"].get(name)
    return timed and timed["median"]


def _verdict(content):
    checked = content.get("verification")
    return checked and ("passed" if checked["passed"] else "FAILED")


def _write(rows, named, options):
    """The files that were asked for."""
    if options.json:
        content = {"runs": rows, "curves": {row["name"]: named[row["name"]]["curves"] for row in rows}}
        _put(options.json, json.dumps(content, indent=1) + "\n")
    if options.plot:
        from fuseopt.finetune.plot import runs

        _put(options.plot, lambda path: runs({row["name"]: named[row["name"]] for row in rows}, path))


def _put(file, write):
    from fuseopt.finetune.folder import write_all  # imports transformers, which takes seconds

    file = Path(file)
    write_all(file.parent, {file.name: write})
    print(f"written: {file}")
