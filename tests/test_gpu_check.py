"""bench/gpu_check.py runs as far as it can without a GPU, and a section that fails does not take the others along."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "bench/gpu_check.py"

pytestmark = pytest.mark.skipif(
    emulated.why_not is not None or importlib.util.find_spec("triton") is None, reason="needs g++ and triton"
)


def run(folder, *arguments):
    """(what the run wrote as JSON, as Markdown, its exit status)."""
    words = [sys.executable, SCRIPT, "--dry", "--out", folder, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (written,) = folder.glob("gpu-*.json")
    assert sorted(folder.iterdir()) == [written, written.with_suffix(".md")], "something temporary was left"
    return json.loads(written.read_text()), written.with_suffix(".md").read_text(), done.returncode


def test_a_dry_run(tmp_path):
    result, text, status = run(tmp_path)
    sections = result["sections"]
    assert status == 0, [s["error"] for s in sections.values()]
    assert list(sections) == ["bits", "scalars", "roofline", "full", "host", "select", "sanitizer"]
    assert all(s["rows"] and f"## {name} (" in text for name, s in sections.items())
    assert [(row["cuda: differ"], row["triton: differ"]) for row in sections["bits"]["rows"]] == [(0, 0)]
    assert not any(row["differ in fp32"] for row in sections["scalars"]["rows"])  # the same pow, so that it must agree
    for name in ("roofline", "full"):
        assert all("x first" in row for row in sections[name]["rows"]), "a variant was not timed"
    assert "dry run" in text and {"commit", "command", "torch"} <= result["machine"].keys()


def test_a_section_that_is_stopped(tmp_path):
    """No time at all is left: both sections say so, and the files are whole."""
    result, text, status = run(tmp_path, "--minutes", "0", "--only", "bits", "host")
    assert status == 1 and {s["error"] for s in result["sections"].values()} == {"no time was left"}
    assert text.count("FAILED") == 2


def test_results_of_a_dry_run_are_not_kept():
    done = subprocess.run([sys.executable, SCRIPT, "--dry"], capture_output=True, text=True)
    assert done.returncode == 2 and "--out" in done.stderr
