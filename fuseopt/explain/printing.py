"""Tables and numbers for a terminal and a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, WIDE = 100, 160  # columns of a terminal, of a notebook


@dataclass(frozen=True)
class Table:
    """Cells as text; the columns whose titles are in `left` begin flush left, the others end flush right."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: frozenset[str] = frozenset()

    def text(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        flush = [str.ljust if name in self.left else str.rjust for name in self.head]
        cells = [[put(cell, w) for put, cell, w in zip(flush, line, widths, strict=True)] for line in lines]
        return "\n".join([self.title, *("  " + "  ".join(line).rstrip() for line in cells)])

    def width(self) -> int:
        """Columns that the text takes, but for the title."""
        return max(map(len, self.text().splitlines()[1:]))

    def html(self) -> str:
        sides = ["left" if name in self.left else "right" for name in self.head]

        def line(tag: str, cells: Sequence[str]) -> str:
            pairs = zip(sides, map(escape, cells), strict=True)
            inner = "".join(f'<{tag} style="text-align:{side}">{cell}</{tag}>' for side, cell in pairs)
            return f"<tr>{inner}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        return f"<p>{escape(self.title)}</p><table><thead>{line('th', self.head)}</thead><tbody>{body}</tbody></table>"


def shortened(names: Sequence[str], width: int) -> str:
    """As many of the names as fit into so many columns, and how many more there are."""
    for count in range(len(names), 0, -1):
        more = f", ... {len(names) - count} more" if count < len(names) else ""
        if len(text := ", ".join(names[:count]) + more) <= width:
            return text
    cut = max(1, width - len(more) - 2)
    return names[0][:cut] + ".." + more if names else ""


def several(words: Sequence[str], what: str) -> str:
    """The words, or how many there are where they are long."""
    text = ", ".join(words)
    return text if len(words) < 2 or len(text) <= 12 else f"{len(words)} {what}"


def number(x: float) -> str:
    """Up to three decimals, without trailing zeros."""
    return f"{x:.3f}".rstrip("0").rstrip(".")


def size(count: float) -> str:
    """Bytes in the unit that suits them: 532 B, 1.20 kB, 34.1 MB."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them: 4.10 us, 250 ms, 1.20 s."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{_three(seconds * factor)} {unit}"
    return f"{_three(seconds)} s"


def _scaled(x: float, units: tuple[str, ...]) -> str:
    k = 0
    while x >= 1000 and k < len(units) - 1:
        x, k = x / 1000, k + 1
    return f"{x:.0f} {units[0]}" if k == 0 else f"{_three(x)} {units[k]}"


def _three(x: float) -> str:
    """Three digits."""
    return f"{x:.{0 if x >= 99.95 else 1 if x >= 9.995 else 2}f}"
