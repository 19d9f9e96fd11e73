"""The table of pairs in docs/pages/together.md is held to the code: every pair runs, and every statement is a test."""

import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from cases import BF16, COUNTERS, EMA_ONE_STEP, ONE_STEP, all_params, assert_close
from pair_options import OPTIONS
from pairs import STEPS, Run, Setup, has_value, pruned, selects

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "pages" / "together.md").read_text()
PAIRS = list(combinations(OPTIONS, 2))


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
    ranked_otherwise = dtype is BF16 and any(g["prune"] and selects(g["prune"], run.t) for g in run.opt.param_groups)
    for k, (p, q) in enumerate(zip(all_params(run.opt), all_params(run.oracle), strict=True)):
        mine, other = run.opt.state[p], run.oracle.state[q]
        at, may = f"step {run.t} parameter {k}", torch.ones(p.shape, dtype=torch.bool)
        if ranked_otherwise:  # on what is stored; the oracle ranks what is not rounded. pair_options.py checks the choice
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


@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_both_hold_together(pair):
    """Each option's promise holds at every step with the other on, and every step agrees with the float64 oracle."""
    for rule in rules_of(pair):
        run = Run(setup_of(pair), rule)
        for _ in range(STEPS):
            run.step()
            agrees(run)
            for name in pair:
                OPTIONS[name].holds(run)
