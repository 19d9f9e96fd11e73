"""What a run's result (the JSON that step.py writes) says: tables for a terminal and for a README."""

TITLES = {
    "adamw": "AdamW, fp32",
    "sgd": "SGD with momentum, fp32",
    "adamw-bf16": "AdamW, bf16",
    "full": "mask + clip + decay + AdamW + prune + EMA, fp32",
}
SHAPE_TITLES = {
    "one": "16M parameters in 1 tensor",
    "fifty": "16M parameters in 50 tensors",
    "10": "10 tensors of 64",
    "200": "200 tensors of 64",
    "1000": "1000 tensors of 64",
}


def title(case: dict) -> str:
    """A case in words."""
    name = SHAPE_TITLES[case["shape"]]
    if case["shape"] in ("one", "fifty") and case["elements"] < 2**23:  # a quick run
        name = f"{case['elements']:,} parameters in {case['tensors']} tensor{'s' * (case['tensors'] > 1)}"
    return f"{TITLES[case['case']]}; {name}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def amount(size: float) -> str:
    """Bytes, in MB from a million on."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _spread(s: dict, show) -> str:
    return f"{show(s['low'])} .. {show(s['high'])}"


def _cells(row: dict) -> list[str]:
    """The columns of COLUMNS for a verified, timed variant."""
    factor = "{:.2f}".format
    return [
        row["name"],
        duration(row["seconds"]["median"]),
        _spread(row["seconds"], duration),
        factor(row["ratio"]["median"]),
        _spread(row["ratio"], factor),
        amount(row["bytes"]),
        f"{row['share']['median']:.0%}" if "share" in row else "",
        amount(row["allocated_bytes"]) if row["allocated_bytes"] >= 1000 else str(row["allocated_bytes"]),
        f"{row['page_faults']:.0f}",
    ]


COLUMNS = [
    "variant",
    "median",
    "quartiles",
    "x fuseopt",
    "quartiles",
    "moved",
    "of bandwidth",
    "allocated",
    "faults",
]


def table(case: dict) -> str:
    """A case as aligned text."""
    timed = [_cells(row) for row in case["variants"] if "seconds" in row]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *timed, strict=True)]
    lines = [f"{title(case)} ({case['rounds']} rounds)"]
    for cells in [COLUMNS, *timed] if timed else []:
        first = cells[0].ljust(widths[0])
        lines.append(
            "  " + "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        )
    for row in case["variants"]:
        if "seconds" not in row:
            why = "not timed" if row["verified"] else "NOT TIMED, verification failed"
            lines.append(f"  {why}: {row['name']}: {row['problem']}")
    if case["best_kernel"]:
        best = case["bandwidth"][case["best_kernel"]]
        lines.append(f"  bandwidth {best['median'] / 1e9:.1f} GB/s, by {case['best_kernel']}")
    if case["others"] is not None and case["others"] > BUSY:
        lines.append(
            f"  THE MACHINE WAS BUSY: other processes took {case['others']:.0%} of its processor time"
        )
    return "\n".join(lines)


BUSY = 0.05  # share of the processor time that makes the numbers doubtful


# ---- targets -----------------------------------------------------------------------------------------


def _best(case: dict, family: str, part: str = "") -> float | None:
    """The least ratio to fuseopt in a family, among names that contain `part`."""
    rows = [r for r in case["variants"] if r["family"] == family and part in r["name"] and "ratio" in r]
    return min((r["ratio"]["median"] for r in rows), default=None)


def _restored(case: dict, family: str, _part: str) -> float | None:
    """The least ratio to fuseopt's mode "freeze" among the recipes that restore what is frozen."""
    own = next((r for r in case["variants"] if "freeze" in r["name"] and "ratio" in r), None)
    best = _best(case, f"{family}, restored")
    return best / own["ratio"]["median"] if own and best else None


def _share(case: dict, _family: str, _part: str) -> float | None:
    return case["variants"][0].get("share", {}).get("median")


TARGETS = [  # what, least value, (cases, shapes), how it is read
    (
        "plain step: torch fused takes this many times as long",
        1.0,
        ("adamw sgd", "one fifty"),
        _best,
        "torch",
        "fused",
    ),
    ("plain step: share of the bandwidth", 0.9, ("adamw sgd", "one fifty"), _share, "", ""),
    ("full step, frozen: best recipe with float masks", 2.0, ("full", "one fifty"), _restored, "float masks", ""),
    ("full step, frozen: best recipe with boolean masks", 2.7, ("full", "one fifty"), _restored, "boolean masks", ""),
    ("full step: best recipe with float masks", 2.0, ("full", "one fifty"), _best, "float masks", ""),
    ("full step: best recipe with boolean masks", 2.7, ("full", "one fifty"), _best, "boolean masks", ""),
    (
        "full step: recipe with torch's default AdamW",
        12.0,
        ("full", "one fifty"),
        _best,
        "float masks",
        "AdamW,",
    ),
    ("200 tensors of 64: torch fused", 8.0, ("adamw sgd", "200"), _best, "torch", "fused"),
]


def targets(result: dict) -> str:
    """Each target with what the run measured."""
    lines = ["targets (at least)"]
    if result["quick"]:
        return "targets: not in a quick run"
    for what, least, (names, shapes), read, family, part in TARGETS:
        for case in result["cases"]:
            if case["case"] in names.split() and case["shape"] in shapes.split():
                value = read(case, family, part)
                if value is not None:
                    verdict = "reached" if value >= least else "MISSED"
                    lines.append(f"  {verdict:<8} {value:6.2f} >= {least:<5g} {what}; {title(case)}")
    return "\n".join(lines) if lines[1:] else ""


# ---- the whole ---------------------------------------------------------------------------------------


def machine(result: dict) -> str:
    """One line on where and what was measured."""
    m = result["machine"]
    dirty = " with uncommitted changes" if result["uncommitted_changes"] else ""
    return (
        f"{m['cpu']}, {m['cores']} cores, {result['threads']} threads; torch {result['torch']}, "
        f"fuseopt {result['fuseopt']} ({result['instruction_set']}) at {result['commit']}{dirty}, {result['date']}"
    )


def text(result: dict) -> str:
    """The whole report for a terminal."""
    parts = [machine(result), *map(table, result["cases"]), targets(result), NOTES]
    return "\n\n".join(part for part in parts if part)


NOTES = """\
median and quartiles over rounds; "x fuseopt": time of the variant / time of fuseopt, in the same round.
moved: bytes read and written, for torch counted from its passes (see "passes" in the JSON).
of bandwidth: moved / time, as a share of the fastest elementwise torch kernel of the same rounds.
allocated: tensor memory a step asks for; faults: pages a step gets fresh from the system.
full step: 80% pruned, 10% masked; masks as they stand between two selections, gradients as from backward."""


def markdown(result: dict) -> str:
    """The tables of a README: one a case, one line a variant, fuseopt first."""
    lines = []
    for name, words in TITLES.items():
        cases = [case for case in result["cases"] if case["case"] == name]
        if cases:
            lines += [f"**{words}**", "", *_pivot(cases), ""]
    command = result["command"]
    return "\n".join([*lines, f"`{command}` on {machine(result)}."])


def _pivot(cases: list[dict]) -> list[str]:
    """A line a variant, a column a shape: time, ratio, and share of the bandwidth beyond the cache."""
    names = list(dict.fromkeys(row["name"] for case in cases for row in case["variants"]))
    lines = [
        "| | " + " | ".join(title(c).split("; ")[1] for c in cases) + " |",
        "|---|" + "---:|" * len(cases),
    ]
    for name in names:
        cells = []
        for case in cases:
            row = next((r for r in case["variants"] if r["name"] == name), None)
            cells.append(_markdown_cell(row))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _markdown_cell(row: dict | None) -> str:
    if row is None:
        return ""
    if "seconds" not in row:
        return "failed verification" if not row["verified"] else "not timed"
    share = (
        f", {row['share']['median']:.0%} of bandwidth"
        if "share" in row and row["family"] == "fuseopt"
        else ""
    )
    ratio = "" if row["ratio"]["median"] == 1 else f" (x{row['ratio']['median']:.2f})"
    return duration(row["seconds"]["median"]) + ratio + share
