"""The benchmark scripts run, verify what they time and write a whole result file. Figures are not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
SCRIPTS = {
    "prune.py": (["--elements", "1", "--rounds", "1"], "prune"),
    "masks.py": (["--elements", "1e5", "--rounds", "3"], "masks"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_and_writes_its_result(name, tmp_path):
    arguments, key = SCRIPTS[name]
    path = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, BENCH / name, *arguments, "--threads", "1", "--json", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result[key] and all(row["fuseopt"]["median"] > 0 for row in result[key])
    assert {"command", "commit", "date"} <= result.keys()
    assert done.stdout.count("\n") > len(result[key])
