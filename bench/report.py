"""What a result of the main table says: text for a terminal, Markdown for the pages."""

from collections.abc import Callable, Iterator

from case import CASES, RULES
from shapes import SHAPES

BUSY = 0.05  # share of the processor time that others took from which on the numbers are doubtful


def heading(name: str) -> str:
    """A case without its shape, in words."""
    rule, dtype, stages = CASES[name]
    if stages == "full":
        return f"mask + clip + decay + AdamW + prune + EMA, {dtype}"
    if stages == "ema":
        return f"AdamW, {dtype}, with an fp32 EMA"
    more = {"sgd": " with momentum", "sgd-plain": " without momentum"}.get(rule, "")
    return f"{RULES[rule][0].__name__}{more}, {dtype}"


def shape_title(case: dict) -> str:
    """A case's tensors in words."""
    if case["shape"] in ("one", "fifty") and case["elements"] < 2**23:  # a quick run
        return f"{case['elements']:,} parameters in {case['tensors']} tensor{'s' * (case['tensors'] > 1)}"
    return SHAPES[case["shape"]][0]


def title(case: dict) -> str:
    return f"{heading(case['case'])}; {shape_title(case)}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def amount(size: float) -> str:
    """Bytes, in kB from a thousand and in MB from a million on."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB" if size >= 1e3 else f"{size:.0f} B"


def _spread(s: dict, show: Callable) -> str:
    return f"{show(s['low'])} .. {show(s['high'])}"


# ---- a case as text ----------------------------------------------------------------------------------

COLUMNS = (
    "variant",
    "x fuseopt",
    "quartiles",
    "median",
    "quartiles",
    "host",
    "moved",
    "of bandwidth",
    "allocated",
    "state",
)


def _cells(row: dict) -> list[str]:
    """The columns of COLUMNS for a verified, timed variant."""
    factor = "{:.2f}".format
    return [
        row["name"],
        factor(row["ratio"]["median"]),
        _spread(row["ratio"], factor),
        duration(row["seconds"]["median"]),
        _spread(row["seconds"], duration),
        duration(row["host_seconds"]["median"]) if "host_seconds" in row else "",
        amount(row["bytes"]) if row["bytes"] else "",
        f"{row['share']['median']:.0%}" if "share" in row else "",
        amount(row["allocated_bytes"]),
        amount(row["state_bytes"]) if "state_bytes" in row else "",
    ]


def table(case: dict) -> str:
    """A case as aligned text."""
    timed = [_cells(row) for row in case["variants"] if "seconds" in row]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *timed, strict=True)]
    lines = [f"{title(case)} ({case['rounds']} rounds)"]
    for cells in [COLUMNS, *timed] if timed else []:
        rest = [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join([cells[0].ljust(widths[0]), *rest]))
    lines += [f"  WRONG, not timed: {row['name']}: {row['problem']}" for row in case["variants"] if "problem" in row]
    if case["best_kernel"]:
        best = case["bandwidth"][case["best_kernel"]]
        lines.append(f"  bandwidth {best['median'] / 1e9:.1f} GB/s, by {case['best_kernel']}")
    if case["others"] is not None and case["others"] > BUSY:
        lines.append(f"  THE MACHINE WAS BUSY: other processes took {case['others']:.0%} of its processor time")
    return "\n".join(lines)


def untimed(result: dict) -> str:
    """What was not timed in a run, and why, each reason once."""
    found: dict[tuple[str, str], list[str]] = {}
    for case in result["cases"]:
        for row in case["variants"]:
            if "skipped" in row:
                found.setdefault((row["name"], f"skipped: {row['skipped']}"), []).append("")
            elif "problem" in row:
                found.setdefault((row["name"], "WRONG"), []).append(f"{title(case)}: {row['problem']}")
    lines = [
        f"- {name}: {why}{first[0] and f' in {first[0]}'} ({len(first)} cases)" for (name, why), first in found.items()
    ]
    return "\n".join(["Not timed:", "", *lines]) if lines else ""


# ---- targets -----------------------------------------------------------------------------------------


def _row(case: dict, part: str) -> dict | None:
    """The first timed variant with this in its name."""
    return next((r for r in case["variants"] if part in r["name"] and "ratio" in r), None)


def _fused(case: dict) -> dict | None:
    """The spread of torch fused's time relative to fuseopt's."""
    row = _row(case, "torch fused") if CASES[case["case"]][2] == "plain" else _row(case, "AdamW(fused=True), fp32")
    return row and row["ratio"]


def _share(case: dict) -> dict | None:
    row = _row(case, "fuseopt")
    return row and row.get("share")


def _restored(kind: str) -> Callable[[dict], dict | None]:
    """The time of the recipe that restores what is frozen, relative to fuseopt's mode "freeze"."""

    def read(case: dict) -> dict | None:
        own, other = _row(case, "freeze"), _row(case, f"{kind} masks, AdamW(fused=True), lerp EMA, restored")
        if not (own and other) or "share" not in own:
            return None
        return {k: other["ratio"][k] / own["ratio"]["median"] for k in ("low", "median", "high")}

    return read


TARGETS = [  # what, least value, how it is read from a case; None where it does not apply
    ("torch's fused optimizer takes so many times as long", 1.0, _fused),
    ("share of the bandwidth", 0.9, _share),
    ("frozen entries restored with float masks take so many times as long", 2.0, _restored("float")),
    ("frozen entries restored with boolean masks take so many times as long", 2.7, _restored("boolean")),
]


def targets(result: dict) -> str:
    """Each target with what the run measured."""
    if result["quick"]:
        return "targets: not in a quick run"
    lines = []
    for what, least, read in TARGETS:
        for case in result["cases"]:
            if value := read(case):
                near = "within the noise" if value["high"] >= least else "MISSED"
                verdict = "reached" if value["median"] >= least else near
                lines.append(f"  {verdict:<16} {value['median']:6.2f} >= {least:<4g} {what}; {title(case)}")
    return "\n".join(["targets (at least)", *lines]) if lines else ""


# ---- the whole ---------------------------------------------------------------------------------------


def machine(result: dict) -> str:
    """One line on where and what was measured."""
    m = result["machine"]
    dirty = " with uncommitted changes" if result["uncommitted_changes"] else ""
    return (
        f"{m['cpu']}, {m['cores']} cores, {result['threads']} threads; torch {result['torch']}, "
        f"fuseopt {result['fuseopt']} ({result['instruction_set']}) at {result['commit']}{dirty}, {result['date']}"
    )


NOTES = """\
median and quartiles over rounds; "x fuseopt": time of the variant / time of fuseopt, in the same round.
host: a step of as many tensors of 64 entries, all in the cache: what a step costs beside arithmetic and memory.
moved: bytes read and written, for torch counted from its passes (see "passes" in the JSON).
of bandwidth: moved / time, as a share of the fastest elementwise torch kernel of the same rounds.
allocated: tensor memory a step asks for; state: tensors kept between steps, beside parameters and gradients.
full step: 80% of matrices pruned, 10% masked; masks as they stand between selections, gradients as from backward."""


def markdown(result: dict) -> str:
    """All tables: one a case, one line a variant, fuseopt first; then bytes and memory; then what was not timed."""
    lines = []
    for name in CASES:
        cases = [case for case in result["cases"] if case["case"] == name]
        if cases:
            lines += [f"**{heading(name)}**", "", *pivot(cases), ""]
    if any("state_bytes" in row for case in result["cases"] if case["best_kernel"] for row in case["variants"]):
        lines += ["**Bytes and memory**", "", *memory(result), ""]
    lines += [untimed(result), ""] if untimed(result) else []
    return "\n".join([*lines, f"`{result['command']}` on {machine(result)}."])


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, the first column to the left."""
    ruler = "|---|" + "---:|" * (len(head) - 1)
    return ["| " + " | ".join(head) + " |", ruler, *("| " + " | ".join(cells) + " |" for cells in rows)]


def pivot(cases: list[dict]) -> list[str]:
    """A line a variant that was timed somewhere, a column a shape."""
    names = dict.fromkeys(row["name"] for case in cases for row in case["variants"] if "skipped" not in row)
    found = [{row["name"]: row for row in case["variants"]} for case in cases]
    return grid(["", *map(shape_title, cases)], [[name, *(_cell(rows.get(name)) for rows in found)] for name in names])


def _cell(row: dict | None) -> str:
    """Ratio, then time; of fuseopt the share of the bandwidth, beyond the cache."""
    if row is None or "skipped" in row:
        return ""
    if "problem" in row:
        return "wrong, not timed"
    share = f", {row['share']['median']:.0%} of bandwidth" if "share" in row and row["family"] == "fuseopt" else ""
    time, ratio = duration(row["seconds"]["median"]), row["ratio"]["median"]
    return (time if ratio == 1 else f"x{ratio:.2f} ({time})") + share


def memory(result: dict) -> list[str]:
    """Bytes a parameter of fuseopt and the best of what it is compared with, a line a case beyond the cache."""
    head = ["bytes a parameter", "moved", "of bandwidth", "state", "allocated in a step", "host time"]
    return grid(head, [line for case in result["cases"] if case["best_kernel"] for line in _memory_lines(case)])


def _memory_lines(case: dict) -> Iterator[list[str]]:
    fused = _row(case, "fused=True") or _row(case, "foreach=True")
    for row in filter(None, (_row(case, "fuseopt"), fused)):
        per = [
            f"{row[key] / case['elements']:.3g}" if row[key] else "0"
            for key in ("bytes", "state_bytes", "allocated_bytes")
        ]
        share = f"{row['share']['median']:.0%}" if "share" in row else ""
        host = duration(row["host_seconds"]["median"]) if "host_seconds" in row else ""
        yield [f"{title(case)}: {row['name']}", per[0], share, per[1], per[2], host]


SUMMARY = ("adamw", "adamw-bf16", "sgd", "full", "ema-bf16")


def summary(result: dict) -> str:
    """The table of the README: a line a case, a column a shape; fuseopt's time and how many times torch takes."""
    found = {(case["case"], case["shape"]): case for case in result["cases"]}
    shapes = [s for s in SHAPES if any((name, s) in found for name in SUMMARY)]
    rows = [
        [heading(n), *(_summary(found.get((n, s))) for s in shapes)]
        for n in SUMMARY
        if any((n, s) in found for s in shapes)
    ]
    head = ["", *(SHAPES[s][0] for s in shapes)]
    return "\n".join([*grid(head, rows), "", f"`{result['command']}` on {machine(result)}."])


def _summary(case: dict | None) -> str:
    """fuseopt's time and, in brackets, the least that torch or a recipe which computes the same takes."""
    own = case and _row(case, "fuseopt")
    if not own:
        return ""
    rows = [
        r
        for r in case["variants"]
        if r["family"] in ("torch", "float masks", "boolean masks", "recipe") and "ratio" in r
    ]
    best = min((r["ratio"]["median"] for r in rows), default=None)
    return duration(own["seconds"]["median"]) + (f" (x{best:.2f})" if best else "")
