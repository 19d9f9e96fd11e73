"""Puts the tables of committed results into the README and the pages under docs/, between their markers.

    python -m bench pages                           again from the results that the pages name
    python -m bench pages NEW.json [NEW.json ...]   these in place of those of their kind
    python -m bench pages --check                   only say whether the pages are as their results ask

A marker is <!-- KIND: RESULT.json ... --> and ends at <!-- end -->. The pictures of the main table go to
docs/pages/pictures/. A marker of `paper` takes parameters and GPUs in place of results.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import host
import masks
import paper
import prune
import record
import report
import scaling

ROOT = record.HERE.parent
PAGES = ("README.md", "docs/pages/speed.md", "docs/pages/scale.md")
PICTURES = ROOT / "docs" / "pages" / "pictures"
MARKED = re.compile(r"<!-- (\w+): ([^>]*) -->\n.*?<!-- end -->", re.DOTALL)
KINDS: dict[str, tuple[str, Callable[[list], str]]] = {  # of marker: (of result, what stands there)
    "summary": ("cases", lambda results: report.summary(results[0])),
    "step": ("cases", lambda results: report.markdown(results[0])),
    "host": ("host", host.markdown),
    "prune": ("prune", prune.markdown),
    "masks": ("masks", masks.markdown),
    "scaling": ("scaling", scaling.markdown),
    "paper": ("", lambda words: paper.text(float(words[0]), int(words[1]))),
}


def filled(text: str, given: dict[str, list[str]]) -> str:
    """A page with its tables made anew. given: {kind of result: names of files} in place of those in the markers."""

    def table(found: re.Match) -> str:
        kind, made = KINDS[found[1]]
        names = given.get(kind, found[2].split())
        body = made([record.read(ROOT / name, kind) for name in names] if kind else names)
        return f"<!-- {found[1]}: {' '.join(names)} -->\n{body.strip()}\n<!-- end -->"

    return MARKED.sub(table, text)


def sorted_out(paths: list[Path]) -> dict[str, list[str]]:
    """{kind: names relative to the repository} of results that lie in it."""
    given: dict[str, list[str]] = {}
    for path in paths:
        kind = record.kind_of(record.read(path))
        if kind not in {of for of, _ in KINDS.values()}:
            raise SystemExit(f"{path} has {kind}, which no page shows as it stands")
        if not path.resolve().is_relative_to(ROOT):
            raise SystemExit(f"{path} lies outside the repository: move it to bench/results first")
        given.setdefault(kind, []).append(str(path.resolve().relative_to(ROOT)))
    return given


def main(argv: list[str] | None = None) -> int:
    how = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("python -m bench pages", description=__doc__, formatter_class=how, allow_abbrev=False)
    p.add_argument("results", nargs="*", type=Path, metavar="RESULT", help="results in bench/results")
    p.add_argument("--check", action="store_true", help="change nothing; exit status 1 if something would change")
    args = p.parse_args(argv)
    given, stale = sorted_out(args.results), []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        new = filled(text, given)
        stale += [name] * (new != text)
        if not args.check:
            page.write_text(new)
    print(
        "\n".join(f"{name}: {'differs from its results' if args.check else 'written'}" for name in stale)
        or "as they are"
    )
    if "cases" in given and not args.check:
        draw(ROOT / given["cases"][0])
    return int(args.check and bool(stale))


def draw(path: Path) -> None:
    """The pictures of a main table, into the folder of the pages."""
    import plot

    for picture in plot.draw(record.read(path, "cases"), path):
        shutil.move(picture, PICTURES / f"speed-{picture.stem.rsplit('-', 1)[1]}.png")


if __name__ == "__main__":
    sys.exit(main())
