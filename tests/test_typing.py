"""What static checkers say of the package and of a program that uses it: mypy, strict on the public face, and ruff."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(module, *arguments):
    """Run a checker, set up in pyproject.toml, on the tree; fail the test with what it says."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mypy():
    """The face has types throughout, and typed_user.py gets those it expects; its wrong calls are errors."""
    pytest.importorskip("mypy")
    run("mypy")


def test_ruff():
    pytest.importorskip("ruff")
    run("ruff", "check", "--quiet", ".")
