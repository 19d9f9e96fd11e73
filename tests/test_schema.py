"""The names and orders that Python and the compiled kernels share."""

import re
from pathlib import Path

import torch

from fuseopt import rules, schema

ROOT = Path(__file__).resolve().parents[1]


def test_the_compiled_schema_is_pythons(native):
    compiled = native.schema()
    assert tuple(name for name, _ in compiled["rules"]) == schema.RULES
    storages = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
    assert {storages[d]: k for d, k in schema.STORAGES.items()} == {s: k for k, s in enumerate(compiled["storages"])}
    assert compiled["stage_scalars"] == len(schema.STAGE_SCALARS)
    assert compiled["bits"] == schema.BITS
    assert compiled["max_ema"] == schema.MAX_EMA


def test_the_order_of_the_stage_scalars_is_that_of_the_struct():
    """Their number alone would not tell two that changed places."""
    struct = re.search(r"struct StageScalars \{(.*?)\};", (ROOT / "csrc/pipeline.h").read_text(), re.DOTALL)[1]
    fields = [name.strip() for line in re.findall(r"T ([\w, ]+);", struct) for name in line.split(",")]
    assert tuple(fields) == schema.STAGE_SCALARS


def test_every_rule_has_the_slots_of_its_kernel(native):
    """Over the options that choose between kernels, every kernel is reached and agrees."""
    slots = dict(native.schema()["rules"])
    reached = set()
    for cls in rules.ALL:
        for group in ({"amsgrad": a, "momentum": m} for a in (False, True) for m in (0.0, 0.9)):
            kernel = cls.kernel(group)
            assert len(cls.slots(group)) == slots[kernel]
            reached.add(kernel)
    assert reached == set(schema.RULES)
