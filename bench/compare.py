"""What changed between two results of the main table, beyond what two runs of the same code differ by.

fuseopt's time is not compared as such, since machines and hours differ, but relative to what ran in the same rounds:
to torch's fused optimizer, or the first other of torch's or of its recipes where there is none, and to the fastest
bandwidth kernel beyond the cache. Either changed if the ranges between its quartiles do not overlap and the medians
differ by more than LEAST. Bytes are exact, so any difference is a change.
"""

from collections.abc import Iterator

import report

LEAST = 0.05  # of the median; what else runs on a machine moves quiet runs by as much
EXACT = {"bytes": "moved", "allocated_bytes": "allocated", "state_bytes": "state"}
CRITERION = f"(changed: quartile ranges that do not overlap and medians over {LEAST:.0%} apart; bytes: any difference)"


def text(old: dict, new: dict) -> str:
    """The changes, a line each, or that there is none."""
    before = {key(case): case for case in old["cases"]}
    pairs = [(before[key(case)], case) for case in new["cases"] if key(case) in before]
    head = f"old: {report.machine(old)}\nnew: {report.machine(new)}"
    if not pairs:
        return f"{head}\nthe two results have no case in common"
    lines = [f"  {report.title(b)}: {line}" for a, b in pairs for line in changes(a, b)]
    said = (
        f"{len(lines)} changes in {len(pairs)} cases"
        if lines
        else f"nothing changed beyond the noise in {len(pairs)} cases"
    )
    return "\n".join([head, f"{said} {CRITERION}", *lines])


def key(case: dict) -> tuple:
    """Cases that may be compared: a quick run has other sizes."""
    return case["case"], case["shape"], case["elements"], case["tensors"]


def changes(old: dict, new: dict) -> Iterator[str]:
    """Lines on one case."""
    rows = [{row["name"]: row for row in case["variants"]} for case in (old, new)]
    for name, row in rows[1].items():
        was = rows[0].get(name)
        if was is None:
            continue
        if ("seconds" in was) != ("seconds" in row):
            yield f"{name}: {state(was)} before, {state(row)} now"
        elif "seconds" in row and row["family"] == "fuseopt":
            yield from compared(name, was, row, *(reference(found, name) for found in rows))


def state(row: dict) -> str:
    return "timed" if "seconds" in row else f"not timed ({row.get('skipped') or row.get('problem')})"


def reference(rows: dict, name: str) -> dict:
    """What fuseopt's time is relative to: torch's variants by name, those that both results have."""
    first = next(iter(rows.values()))
    if first["name"] != name:  # ratios are to the first row
        return {}
    return {n: r for n, r in rows.items() if r["family"] in ("torch", "float masks", "recipe") and "ratio" in r}


def compared(name: str, was: dict, row: dict, old: dict, new: dict) -> Iterator[str]:
    """Lines on one variant of fuseopt: its time, its share of the bandwidth, its bytes."""
    shared = [other for other in old if other in new]
    if shared:
        a, b = old[shared[0]]["ratio"], new[shared[0]]["ratio"]
        if differ(a, b):
            word = "faster" if b["median"] > a["median"] else "SLOWER"
            yield f"{name} is {word}: {shared[0]} took x{a['median']:.2f} its time, now x{b['median']:.2f}"
    if "share" in was and "share" in row and differ(was["share"], row["share"]):
        a, b = was["share"]["median"], row["share"]["median"]
        yield f"{name}: {a:.0%} of the bandwidth before, {b:.0%} now"
    for field, word in EXACT.items():
        if field in was and field in row and was[field] != row[field]:
            yield f"{name}: {word} {report.amount(was[field])} before, {report.amount(row[field])} now"


def differ(a: dict, b: dict) -> bool:
    """Whether two spreads differ beyond the noise."""
    apart = a["low"] > b["high"] or b["low"] > a["high"]
    return apart and abs(a["median"] - b["median"]) > LEAST * a["median"]
