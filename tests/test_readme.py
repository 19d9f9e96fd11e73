"""The README's Python runs as it stands, and its commands and names exist."""

import re
from pathlib import Path

import fuseopt

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_blocks_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    opt = names["opt"]
    assert opt.param_groups[0]["steps"] == 60
    assert int(opt.prune_mask(names["head"].weight).sum()) == round(0.8 * 256)
    assert opt.prune_mask(names["embedding"].weight) is None


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_option_of_the_table_exists():
    parameters = {*fuseopt.options.GROUP_OPTIONS, *fuseopt.options.WHOLE_OPTIONS}
    table = README.split("## Options")[1].split("## ")[0]
    named = set(re.findall(r"^\| `(\w+)=", table, re.MULTILINE))
    assert named - {"decoupled_weight_decay"} == parameters


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_every_file_named_exists():
    for name in re.findall(r"`((?:csrc|fuseopt|bench|tests)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / name).exists(), name
