"""The pages under docs/: they build without a warning, their Python runs, their pictures can be made again."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
PICTURES = sorted((ROOT / "docs" / "pages" / "pictures").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def stem(path: Path) -> str:
    return path.stem


def test_the_pages_build_in_strict_mode(tmp_path):
    """Strict: a broken link between pages, a missing picture or a page outside the navigation is an error."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "docs" / "mkdocs.yml", "-d", tmp_path]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    for page in PAGES:
        built = tmp_path / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
        assert built.exists(), f"{page.name} was not built"
    assert all((tmp_path / "pictures" / f"{script.stem}.png").exists() for script in PICTURES)


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_the_code_blocks_run_one_after_the_other(page, tmp_path, monkeypatch):
    """The blocks of a page share their names, as they would for a reader who types them in."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names: dict = {"__name__": "__main__"}
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(1))
        exec(compile("\n" * line + found[1], str(page), "exec"), names)  # a traceback shows the page's line


def test_every_page_that_teaches_shows_code():
    for page in PAGES:
        assert len(BLOCK.findall(page.read_text())) >= 1, page.name


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_every_file_named_exists(page):
    for name in re.findall(r"`((?:csrc|fuseopt|bench|tests|docs|examples)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", PICTURES, ids=stem)
def test_each_picture_can_be_made_again(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", "--out", str(tmp_path / "picture.png")])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runpy.run_path(str(script), run_name="__main__")  # in this process: importing torch anew takes longer than it
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert script.with_suffix(".png").exists(), "the picture in the page was not committed"
    assert any(f"pictures/{script.stem}.png" in page.read_text() for page in PAGES), "no page shows it"


SHELL = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands():
    """Every `fuseopt COMMAND ...` of the shell blocks of the pages and the README, as words."""
    for page in [*PAGES, ROOT / "README.md"]:
        for block in SHELL.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["fuseopt"]:
                    yield pytest.param(words[1:], id=f"{page.stem}: {' '.join(words[1:])[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_each_command_is_one_that_fuseopt_takes(words, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from fuseopt.__main__ import COMMANDS
    from fuseopt.finetune import options, search

    assert words[0] in COMMANDS
    for place, word in enumerate(words):
        if word == "--config":  # of a run that the reader has made
            (tmp_path / "config.yaml").write_text("data: digits\n")
            words[place + 1] = str(tmp_path / "config.yaml")
    if words[0] == "finetune":
        options.parse(words[1:])
    if words[0] == "search":
        settings, rest = search._parser().parse_known_args(words[1:])
        assert settings.space and options.parse(rest)


def test_the_options_that_the_page_names_are_there():
    pytest.importorskip("transformers")
    from fuseopt.finetune import options

    known = {name for action in options.make_parser()._actions for name in action.option_strings}
    known |= {"--space", "--trials", "--plot", "--nproc-per-node", "--encoder"}
    named = set(re.findall(r"--[a-z]\w*(?:-\w+)*", (ROOT / "docs" / "pages" / "finetune.md").read_text()))
    assert len(named) > 50 and named <= known


def test_the_tables_are_those_of_the_result_that_the_page_names():
    page = (ROOT / "docs" / "pages" / "finetune.md").read_text()
    (name,) = re.findall(r"`(bench/results/[\w.-]+-finetune\.json)`", page)
    command = [sys.executable, ROOT / "bench" / "finetune.py", "--markdown", ROOT / name]
    tables = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True).stdout
    assert tables.count("|") > 100 and tables.strip() in page
