"""bench/gpu_check.py runs as far as it can without a GPU, and a section that fails does not take the others along."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench/gpu_check.py"

pytestmark = pytest.mark.skipif(
    emulated.why_not is not None or importlib.util.find_spec("triton") is None, reason="needs g++ and triton"
)


def run(folder, *arguments, script=SCRIPT):
    """(what the run wrote as JSON, as Markdown, its exit status)."""
    words = [sys.executable, script, "--dry", "--out", folder, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (written,) = folder.glob("gpu-*.json")
    assert sorted(folder.iterdir()) == [written, written.with_suffix(".md")], "something temporary was left"
    return json.loads(written.read_text()), written.with_suffix(".md").read_text(), done.returncode


def test_a_dry_run(tmp_path):
    result, text, status = run(tmp_path)
    sections = result["sections"]
    assert status == 0, [s["error"] for s in sections.values()]
    assert list(sections) == ["bits", "roofline", "full", "host", "scalars", "select", "sanitizer"]
    assert all(s["rows"] and f"## {name} (" in text for name, s in sections.items())
    assert [(row["cuda: differ"], row["triton: differ"]) for row in sections["bits"]["rows"]] == [(0, 0)] * 3
    assert not any(row["differ in fp32"] for row in sections["scalars"]["rows"])  # the same pow, so that it must agree
    for name in ("roofline", "full"):
        rows = sections[name]["rows"]
        assert all(len(row["samples"]) >= 2 and row["seconds"] > 0 for row in rows), "a variant was not timed"
        assert all(row["ratio"] > 0 and row["of copy"] > 0 for row in rows if row["variant"] != "copy")
    assert "stepped" in sections["sanitizer"]["rows"][0]["result"]
    assert "dry run" in text and {"commit", "command", "torch"} <= result["machine"].keys()


def test_a_backend_that_fails_leaves_the_others_figures(tmp_path):
    """The bench of a copy of the package whose Triton backend raises."""
    copy, out = tmp_path / "copy", tmp_path / "out"
    for part in ("fuseopt", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("emulation", "results", "__pycache__"))
    (copy / "tests/emulation").symlink_to(ROOT / "tests/emulation")  # is built already
    backend = copy / "fuseopt/triton_backend.py"
    text = backend.read_text()
    broken = text.replace("    with nullcontext()", '    raise RuntimeError("planted")\n    with nullcontext()')
    assert broken != text
    backend.write_text(broken)
    result, text, status = run(out, "--only", "bits", "roofline", script=copy / "bench/gpu_check.py")
    assert status == 1 and text.count("FAILED") == 2
    for name, found in result["sections"].items():
        failed = [row for row in found["rows"] if any("planted" in str(value) for value in row.values())]
        others = [row for row in found["rows"] if row.get("cuda: differ") == 0 or row.get("seconds", 0) > 0]
        ours = [row for row in others if "cuda" in str(list(row) + list(row.values()))]
        assert failed and ours and "rows say what failed" in found["error"], (name, found["rows"])
        assert not any("triton" in row.get("variant", "") for row in others)


def test_a_section_that_is_stopped(tmp_path):
    """No time at all is left: both sections say so, and the files are whole."""
    result, text, status = run(tmp_path, "--minutes", "0", "--only", "bits", "host")
    assert status == 1 and {s["error"] for s in result["sections"].values()} == {"no time was left"}
    assert text.count("FAILED") == 2


def test_results_of_a_dry_run_are_not_kept():
    done = subprocess.run([sys.executable, SCRIPT, "--dry"], capture_output=True, text=True)
    assert done.returncode == 2 and "--out" in done.stderr
