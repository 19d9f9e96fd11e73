"""The space of a search: which options take which values, read and checked against the parser."""

import itertools
from pathlib import Path

import optuna
import yaml

KINDS = {"log": (float, True), "float": (float, False), "int": (int, False), "intlog": (int, True)}
FORMS = "NAME=log:LOW:HIGH, NAME=float:LOW:HIGH, NAME=int:LOW:HIGH, NAME=intlog:LOW:HIGH or NAME=VALUE,VALUE,..."
# Options that say where and how the search itself goes, or which rows its score comes from.
FIXED = {"output_dir", "overwrite", "resume_from_checkpoint", "config", "seed", "data_seed", "data", "classes"}
FIXED |= {"test_data", "test_share", "folds", "learning_curve"}


def read(texts):
    """{option: optuna distribution} of texts such as "learning_rate=log:1e-4:1e-2" or "optimizer=adamw,lion".

    Raises ValueError that names the text.
    """
    space = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not name or not values:
            raise ValueError(f"--space {text}: write {FORMS}")
        if name in FIXED:
            raise ValueError(f"--space {text}: {name} is the same in all trials")
        if name in space:
            raise ValueError(f"--space {text}: {name} is given twice")
        space[name] = _distribution(text, values)
    return space


def _distribution(text, values):
    kind, *ends = values.split(":")
    if kind not in KINDS:
        choices = [value.strip() for value in values.split(",")]
        if len(choices) < 2 or "" in choices or len(set(choices)) < len(choices):
            raise ValueError(f"--space {text}: give two different values or more, or write {FORMS}")
        return optuna.distributions.CategoricalDistribution(choices)
    number, log = KINDS[kind]
    try:
        low, high = map(number, ends)
    except ValueError:
        raise ValueError(f"--space {text}: {kind} takes two numbers, {kind}:LOW:HIGH") from None
    if not (float("-inf") < low < high < float("inf")) or (log and low <= 0):
        above = " above 0" if log else ""
        raise ValueError(f"--space {text}: LOW and HIGH must be numbers{above}, the first the smaller")
    if number is int:
        return optuna.distributions.IntDistribution(low, high, log=log)
    return optuna.distributions.FloatDistribution(low, high, log=log)


def examples(space):
    """For each option the values to try on the parser: every choice, or both ends."""
    for name, of in space.items():
        for value in getattr(of, "choices", None) or (of.low, of.high):
            yield {name: value}


def words(values):
    """The command-line words of {option: value}; a choice of several words, as "flip crop", becomes several."""
    parts = ([f"--{name}", *str(value).split()] for name, value in values.items())
    return list(itertools.chain.from_iterable(parts))


def given(argv):
    """{option: value} of command-line words, those of a --config file first, as one would write them in YAML."""
    found = {}
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        else:
            found[name].append(word)
    plain = {name: _plain(values) for name, values in found.items()}
    if "config" not in plain:
        return plain
    content = yaml.safe_load(Path(plain.pop("config")).read_text(encoding="utf-8")) or {}
    return {**content, **plain}


def _plain(values):
    values = [_scalar(value) for value in values]
    return values[0] if len(values) == 1 else values or True


def _scalar(word):
    for read_as in (int, float):
        try:
            return read_as(word)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(word.lower(), word)
