"""What every reader returns, and how it reports rows that it cannot read."""

import dataclasses

SHOWN = 5  # broken rows that are named; the rest is counted


@dataclasses.dataclass
class Source:
    """What was read from one place, before classes are numbered.

    kind: "image" or "text".
    rows: list of (value, label, where): a float32 tensor (C, H, W) or a str; the class as a str; a name for errors.
    test: the same for a test part that the source itself has, or None.
    names: the classes in their own order, or None: sorted by number or by letter.
    scale: divisor of the images. Test images of another file are divided by that of the training file.
    note: what it is, for people.
    """

    kind: str
    rows: list
    note: str
    test: list | None = None
    names: list | None = None
    scale: float = 1.0


def label_text(value):
    """The name of a class: a str without surrounding space, an int or a bool as text; None for anything else."""
    if isinstance(value, (str, int)):
        return str(value).strip() or None
    return None


def refuse(problems, where, what="rows"):
    """Raise ValueError that names up to five of the problems and counts the rest; nothing without problems."""
    if not problems:
        return
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise ValueError(f"{where}: {len(problems)} broken {what}: {'; '.join(problems[:SHOWN])}{more}")
