"""What the option groups of the harness have in common: checks that name the option, its value and the remedy."""

import dataclasses
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


def shortened(names, most=12):
    """Parameter names for a message: layers that differ by number alone are written once, the rest are counted."""
    patterns = list(dict.fromkeys(".".join("*" if part.isdigit() else part for part in n.split(".")) for n in names))
    more = f" and {len(patterns) - most} more" if len(patterns) > most else ""
    return ", ".join(patterns[:most]) + more
