"""What one step of an optimizer does, the bytes it moves, and the time that takes."""

from html import escape
from textwrap import fill
from typing import Any

from .. import backends
from . import bandwidth, fallbacks, traffic
from .launches import launches
from .printing import WIDE, WIDTH, Table, duration, number, several, shortened, size


class Explanation:
    """The steady step of an optimizer as it is configured now; prints as tables, in a notebook too.

    backend: name of the backend that runs it; why: the reason it was chosen; device: where the parameters lie.
    launches: one dict a kind of launch, in order: what, launches (their number), when, rules, dtypes, groups,
        tensors, elements, names. Of what only some steps add, pruning and masks, the number is None.
    rows: one dict a parameter group and dtype: group, rule, dtype, tensors, elements, names, and bytes a step by
        stream (param, grad, moments, ema, masks, norm; ema_0, ... of each average), of all in `bytes`.
    bytes_per_step: their sum, read plus written. Over the parameters that have a gradient; where none has one,
        over those that require one. Of parameters that processes share, elements and bytes are this process's.
    memory_bytes: how much memory that is, each byte counted once.
    notes: sentences on what does not go the direct way, and why.
    last_seconds: how long the last step took since opt.time_steps(); None where there is none.
    """

    def __init__(self, opt: Any):
        every = traffic.every(opt)
        members = traffic.trained(every)
        self.optimizer = type(opt).__name__
        self.backend, self.why = backends.choose(opt), backends.why(opt)
        self.device = backends.device_of(opt)
        self.rows = traffic.rows(opt, members)
        self.bytes_per_step: int = sum(row["bytes"] for row in self.rows)
        self.memory_bytes: int = sum(row["memory"] for row in self.rows)
        in_turn = fallbacks.in_turn(self.backend, members)
        self.launches = launches(opt, self.backend, members, in_turn)
        self.notes = fallbacks.notes(opt, self.backend, every, members)
        self.timed = opt._stopwatch is not None
        self.last_seconds: float | None = opt._stopwatch.seconds() if self.timed else None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of the device's memory; measured when first asked for, in a tenth of a second or so.

        See explain/bandwidth.py. None where there is no memory to measure.
        """
        return bandwidth.of(self.device)

    @property
    def least_seconds(self) -> float | None:
        """The time that bytes_per_step take at `bandwidth`; None where all of it may lie in the device's cache."""
        if not self.bytes_per_step or self.memory_bytes <= (bandwidth.cache(self.device) or 0) or not self.bandwidth:
            return None
        return self.bytes_per_step / self.bandwidth

    def __str__(self) -> str:
        times = "\n".join(fill(line, WIDTH) for line in self._times())
        notes = "\n".join(fill(note, WIDTH, initial_indent="- ", subsequent_indent="  ") for note in self.notes)
        parts = [fill(self._head(), WIDTH), *(table.text() for table in self._tables(WIDTH)), times, notes]
        return "\n\n".join(filter(None, parts))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        times = "<br>".join(map(escape, self._times()))
        return (
            f"<div><p>{escape(self._head())}</p>"
            f"{''.join(table.html() for table in self._tables(WIDE))}<p>{times}</p><ul>{notes}</ul></div>"
        )

    def _head(self) -> str:
        return f"{self.optimizer}, backend {self.backend}: {self.why}"

    def _tables(self, width: int) -> list[Table]:
        streams = _bytes_table(self.rows, each=True)
        if streams.width() > width:
            streams = _bytes_table(self.rows, each=False)
        return [_launch_table(self.launches, width)] * bool(self.launches) + [streams] * bool(self.bytes_per_step)

    def _times(self) -> list[str]:
        least, moved = self.least_seconds, f"A step reads and writes {size(self.bytes_per_step)}"
        if least and self.bandwidth:
            moved += f", which takes at least {duration(least)} at {size(self.bandwidth)}/s"
        return [f"{moved}{self._of_cache()}.", self._of_last(least)]

    def _of_cache(self) -> str:
        """How far the cache may serve a step in place of the memory."""
        cache = bandwidth.cache(self.device)
        if not cache or not self.bytes_per_step or self.memory_bytes > bandwidth.TIMES * cache:
            return ""
        if self.memory_bytes > cache:
            return f"; part of it may stay in the cache of {size(cache)}"
        return f"; all of it fits in the cache of {size(cache)}, so the memory's bandwidth is no bound"

    def _of_last(self, least: float | None) -> str:
        if not self.timed:
            return "Steps are not timed: call opt.time_steps()."
        if self.last_seconds is None:
            return "No step since opt.time_steps()."
        ratio = f", {self.last_seconds / least:.2f} times the least" if least else ""
        return f"The last step took {duration(self.last_seconds)}{ratio}."


def _launch_table(rows: list[dict[str, Any]], width: int) -> Table:
    head: tuple[str, ...] = ("pass", "launches", "rule", "dtype", "group", "tensors", "elements")
    cells: list[tuple[str, ...]] = [
        (
            row["what"],
            row["when"] if row["launches"] is None else f"{row['launches']} a step",
            several(row["rules"], "rules"),
            several(row["dtypes"], "dtypes"),
            several(list(map(str, row["groups"])), "groups"),
            str(row["tensors"]),
            f"{row['elements']:,}",
        )
        for row in rows
    ]
    left = frozenset({"pass", "launches", "rule", "dtype", "group", "parameters"})
    room = width - 2 - Table("", head, cells, left).width()
    if any(row["names"] for row in rows) and room >= LEAST_ROOM:
        names = [shortened(row["names"], room) for row in rows]
        head, cells = (*head, "parameters"), [(*line, name) for line, name in zip(cells, names, strict=True)]
    return Table("Launches, and what each covers", head, cells, left)


LEAST_ROOM = 16  # for names


def _bytes_table(rows: list[dict[str, Any]], each: bool) -> Table:
    """each: a column for each average, not one for all."""
    averages = sorted({key for row in rows for key in row if key.startswith("ema_")}) if each else ["ema"]
    streams = ["param", "grad", "moments", *averages, "masks", "norm"]
    streams = [name for name in streams if any(row.get(name) for row in rows)]

    def line(group: str, dtype: str, some: list[dict[str, Any]]) -> tuple[str, ...]:
        n = sum(row["elements"] for row in some)
        counts = [sum(row.get(name, 0) for row in some) for name in (*streams, "bytes")]
        per_element = [number(count / n) if n else "-" for count in counts]
        return (group, dtype, f"{n:,}", *per_element, size(counts[-1]))

    cells = [line(str(row["group"]), row["dtype"], [row]) for row in rows]
    cells += [line("all", "", rows)] * (len(rows) > 1)
    head = ("group", "dtype", "elements", *streams, "total", "a step")
    return Table("Bytes read and written, for each element", head, cells, frozenset({"group", "dtype"}))
