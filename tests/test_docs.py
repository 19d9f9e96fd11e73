"""The pages under docs/: they build without a warning, their Python runs, their pictures can be made again."""

import ast
import fnmatch
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch

import fuseopt
from fuseopt.explain import Explanation

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))
PICTURES = sorted((ROOT / "docs" / "pages" / "pictures").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)  # not those marked {.python .not-run}
WITHOUT_CODE = ("reference", "contributing", "changelog", "limits", "libraries")  # made of other files, or prose
OF_RULES = {"kernel", "slots", "counters", "hyper", "initial", "update"}  # methods for CONTRIBUTING.md, not for users
OF_TORCH = {"profile_hook_step"}  # what torch calls while it makes a class


def stem(path: Path) -> str:
    return path.stem


def build(folder: Path) -> None:
    """Build the site in strict mode: a broken link, a missing picture, a page outside the navigation is an error."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / "docs" / "mkdocs.yml", "-d", folder]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


def test_the_site(tmp_path):
    build(tmp_path)
    every_page_and_picture_is_there(tmp_path)
    no_row_has_fallen_out_of_its_table(tmp_path)
    nothing_is_fetched_from_other_hosts(tmp_path)
    the_reference_has_every_public_name(tmp_path)
    its_signatures_are_pythons(tmp_path)


def html(site: Path, page: str) -> str:
    return (site / ("index.html" if page == "index" else f"{page}/index.html")).read_text()


def every_page_and_picture_is_there(site: Path) -> None:
    for page in PAGES:
        assert html(site, page.stem)
    for picture in (ROOT / "docs" / "pages" / "pictures").glob("*.[ps][nv]g"):
        assert (site / "pictures" / picture.name).exists()
    assert "class Adamax" in re.sub("<[^>]+>", "", html(site, "contributing"))
    assert "0.1.0" in html(site, "changelog")


def no_row_has_fallen_out_of_its_table(site: Path) -> None:
    """As one after an empty line has, of which Markdown makes a paragraph."""
    for page in PAGES:
        assert not re.search(r"<p>\s*\|", html(site, page.stem)), page.name


def nothing_is_fetched_from_other_hosts(site: Path) -> None:
    for page in PAGES:
        outside = re.findall(
            r"""<(?:script|link|img|iframe)[^>]+?(?:src|href)=["']?(https?:)?//[^>]*""", html(site, page.stem)
        )
        assert not outside, page.name


def public() -> dict[str, object]:
    """What users may name, as the reference calls it: classes, functions, and the methods of every optimizer."""
    found = {f"fuseopt.{name}": getattr(fuseopt, name) for name in fuseopt.__all__}
    found |= {"fuseopt.pruning.Zeros.share": fuseopt.pruning.Zeros.share}
    for name in ("bandwidth", "least_seconds"):
        found[f"{Explanation.__module__}.Explanation.{name}"] = getattr(Explanation, name)
    for module in (fuseopt.masks, fuseopt.verify):
        found |= {f"{module.__name__}.{name}": getattr(module, name) for name in module.__all__ if not name.isupper()}
    for name, cls in {
        "fuseopt.optimizer.FusedOptimizer": fuseopt.optimizer.FusedOptimizer,
        "fuseopt.verify.Checker": fuseopt.verify.Checker,
        "fuseopt.verify.Report": fuseopt.verify.Report,
    }.items():
        for method, value in inspect.getmembers(cls):
            of = value.fget if isinstance(value, property) else value
            ours = (getattr(of, "__module__", None) or "").startswith("fuseopt")
            if ours and callable(of) and not method.startswith("_") and method not in OF_RULES | OF_TORCH:
                found[f"{name}.{method}"] = value
    found.pop("fuseopt.verify")  # its members have entries of their own
    return found


def test_every_public_name_has_a_docstring():
    names = public()
    assert len(names) > 35 and "fuseopt.optimizer.FusedOptimizer.swap_ema" in names
    for name, value in names.items():
        text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__  # not a base's
        assert text and not text.startswith(f"{name.rpartition('.')[2]}("), (
            f"{name} has no docstring"
        )  # nor dataclass's


def the_reference_has_every_public_name(site: Path) -> None:
    """And no formula of which asterisks have made emphasis, nor a condition of which > has made a quotation."""
    page = html(site, "reference")
    for name in public():
        assert f'id="{name}"' in page, f"{name} is missing from docs/pages/reference.md"
    assert not re.search("<(em|strong|blockquote)>.*", page)


def its_signatures_are_pythons(site: Path) -> None:
    """The reference is made without importing: what a base class declares and another takes away, it may not see."""
    page, compared = html(site, "reference"), 0
    for name, value in public().items():
        if found := re.search(rf'id="{re.escape(name)}".*?doc-signature.*?<code>(.*?)</code>', page, re.DOTALL):
            text = unescape(re.sub("<[^>]+>", "", found[1]))
            if callable(value) and text.startswith(f"{name.rpartition('.')[2]}("):
                says = ast.parse(f"def {text.strip()}: pass").body[0].args
                takes = [p for p in inspect.signature(value).parameters if p != "self"]
                assert [a.arg for a in _all_arguments(says)] == takes, name
                compared += 1
    assert compared > 30


def _all_arguments(of: ast.arguments) -> list[ast.arg]:
    return [a for a in (*of.posonlyargs, *of.args, of.vararg, *of.kwonlyargs, of.kwarg) if a is not None]


def test_every_test_is_on_the_page_of_checks():
    text = (ROOT / "docs" / "pages" / "checks.md").read_text()
    patterns = re.findall(r"`tests/(test_[\w*]+\.py)`", text)
    for file in (ROOT / "tests").glob("test_*.py"):
        assert any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns), f"{file.name} is not explained there"


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
        assert len(BLOCK.findall(page.read_text())) >= 1 or page.stem in WITHOUT_CODE, page.name


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
        sys.modules["matplotlib.pyplot"].close("all")
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
