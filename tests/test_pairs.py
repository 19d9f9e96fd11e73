"""The table of pairs in docs/pages/together.md is held to the code: every pair runs, and every statement is a test."""

import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from cases import BF16, COUNTERS, EMA_ONE_STEP, ONE_STEP, all_params, assert_close
from pair_options import OPTIONS
from pair_statements import STATEMENTS
from pairs import STEPS, Run, Setup, has_value, pruned, selects

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "pages" / "together.md").read_text()
PAIRS = list(combinations(OPTIONS, 2))
SENTENCES = dict(re.findall(r"^(\d+)\. (.*)$", PAGE, re.MULTILINE))


def read_table() -> dict[tuple[str, str], str]:
    """What stands in the cell of each pair: a dot or the number of a sentence."""
    lines = [line for line in PAGE.split("## Every pair")[1].splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    names = {number: name for number, name in (row[0].split(" ", 1) for row in rows)}
    cells = (
        (row[0].split(" ", 1)[1], names[column], cell)
        for row in rows
        for column, cell in zip(columns, row[1:], strict=True)
    )
    return {(one, other): cell for one, other, cell in cells if cell}


TABLE = read_table()
PARTICULAR = [pair for pair in PAIRS if TABLE.get(pair, "·") != "·"]


def pair_id(pair) -> str:
    return " + ".join(pair)


def setup_of(pair) -> Setup:
    """Both options on. The dtype comes first: others choose their numbers by it."""
    setup = Setup()
    for name in sorted(pair, key=lambda name: name != "EMA dtype"):
        OPTIONS[name].on(setup)
    return setup


def agrees(run: Run) -> None:
    """The run, after a step from equal state, agrees with its float64 oracle."""
    dtype = run.setup.dtype
    acts = any(group["prune"] and selects(group["prune"], run.t) for group in run.opt.param_groups)
    # The oracle ranks what was not rounded: in bf16, and among weights that all took the same first step, as what
    # regrows does, it may choose others of nearly equal size. pair_options.py checks the choice itself.
    ranked_otherwise = acts and (dtype is BF16 or run.setup.jump == run.t)
    for k, (p, q) in enumerate(zip(all_params(run.opt), all_params(run.oracle), strict=True)):
        mine, other = run.opt.state[p], run.oracle.state[q]
        at, may = f"step {run.t} parameter {k}", torch.ones(p.shape, dtype=torch.bool)
        if ranked_otherwise:
            may = ~(pruned(mine, p) | pruned(other, q))
        else:
            assert torch.equal(pruned(mine, p), pruned(other, q)), at
        assert_close(p[may], q[may], ONE_STEP[dtype], at)
        for key in (*run.slots(), *(key for key in mine if key.startswith("ema_"))):
            assert has_value(mine, key) == has_value(other, key), f"{at} {key}"
            bound = (EMA_ONE_STEP if key.startswith("ema_") else ONE_STEP)[dtype]
            assert_close(mine[key].nan_to_num(9.0)[may], other[key].nan_to_num(9.0)[may], bound, f"{at} {key}")
        for key in COUNTERS:
            assert key not in mine or float(mine[key]) == float(other[key])


def rules_of(pair) -> tuple[str, ...]:
    """AdamW decays decoupled, SGD coupled; where decay or L1 is what the pair is about, each the other way too."""
    return ("adamw", "sgd", "adam", "sgd-decoupled") if {"weight decay", "l1"} & {*pair} else ("adamw", "sgd")


def sentence(pair) -> str:
    return SENTENCES.get(TABLE[pair], "")


def test_the_table_has_a_cell_for_every_pair_and_a_test_for_every_sentence():
    assert set(TABLE) == set(PAIRS)
    assert {cell for cell in TABLE.values() if cell != "·"} == set(SENTENCES)
    assert set(SENTENCES.values()) == set(STATEMENTS)


def test_the_options_are_those_that_the_page_explains():
    """Same names, numbers and order in the list of options as in the table."""
    listed = re.findall(
        r"^\| (\d+) \| ([\w:, ]+?) \| `", PAGE.split("## The options")[1].split("## Every pair")[0], re.MULTILINE
    )
    assert listed == [(str(k), name) for k, name in enumerate(OPTIONS, 1)]
    tabled = re.findall(r"^\| (\d+) ([\w:, ]+?) \|", PAGE.split("## Every pair")[1], re.MULTILINE)
    assert tabled == listed


@pytest.mark.parametrize("pair", PARTICULAR, ids=pair_id)
def test_what_the_cell_says(pair):
    STATEMENTS[sentence(pair)](pair)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not sentence(pair).startswith("Refused")], ids=pair_id)
def test_both_hold_together(pair):
    """Each option's promise holds at every step with the other on, and every step agrees with the float64 oracle."""
    for rule in rules_of(pair):
        run = Run(setup_of(pair), rule)
        for _ in range(STEPS):
            run.step()
            agrees(run)
            for name in pair:
                OPTIONS[name].holds(run)
