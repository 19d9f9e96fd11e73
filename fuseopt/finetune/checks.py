"""What the option groups of the harness have in common: checks that name the option, its value and the remedy."""

import dataclasses
import fnmatch
import math


def in_range(name, value, low, high=math.inf, open_low=False):
    """Raise ValueError unless low <= value < high; with open_low, low < value < high. NaN is in no range."""
    if not (low < value if open_low else low <= value) or not value < high:
        finite = f"a finite number {'more than' if open_low else 'of at least'} {low:g}"
        allowed = f"in {'(' if open_low else '['}{low:g}, {high:g})" if high < math.inf else finite
        raise ValueError(f"--{name} {value}: must be {allowed}")


def without_effect(options, names, kind, why):
    """Raise ValueError if one of the options `names` of the dataclass `kind` has another value than its default."""
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(options, field.name)
        if field.name in names and value != default:
            raise ValueError(f"--{field.name} {value} has no effect {why}")


def listed(names, most=5):
    """The first of some names for a message, and how many more there are."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def shortened(names):
    """Parameter names for a message: layers that differ by number alone are written once."""
    return listed(dict.fromkeys(".".join("*" if part.isdigit() else part for part in n.split(".")) for n in names), 12)


def matching(named, patterns, option, what="parameter"):
    """The names among `named` that match a shell pattern; ValueError for a pattern without a match."""
    named = list(named)
    found = set()
    for pattern in patterns:
        matches = [name for name in named if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"{option} {pattern} matches no {what}; their names are: {shortened(named)}")
        found.update(matches)
    return found


def first_sentence(error):
    """The start of a library's message, which may go on for lines."""
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
