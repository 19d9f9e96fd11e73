"""fuseopt.finetune.models: LoRA, which peft does, on every kind of model."""

import copy
import importlib.util
import sys

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "safetensors", "peft"):
    pytest.importorskip(extra)

from starts import (
    KINDS,
    SMALL,
    begin,
    data_for,
    differing,
    images,
    logits,
    refused,
    texts,
)

from fuseopt.finetune.models import save


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_its_matrices_and_the_head_alone_and_is_merged_when_saved(checkpoints, tmp_path, kind):
    data, folder = data_for(kind), checkpoints / kind
    plain = begin(data, pretrained=str(folder))
    begun = begin(data, pretrained=str(folder), lora_rank=2, lora_dropout=0.1)
    model, head = begun.model, "score" if kind == "gpt2" else "head" if kind in SMALL else "classifier"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or f".{head}.modules_to_save." in name for name in trained)
    assert any(f".{head}." in name for name in trained) and "LoRA of rank 2" in begun.description
    assert begun.new == {name for name in trained if "lora_" in name}
    assert torch.equal(logits(model, data, begun.processor), logits(plain.model, data, plain.processor))
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn_like(p))
    expected, before = logits(model, data, begun.processor), copy.deepcopy(model.state_dict())
    assert not torch.allclose(expected, logits(plain.model, data, plain.processor), atol=1e-2)
    save(model, begun.processor, tmp_path / "merged")
    assert not differing(model.state_dict(), before)
    merged = begin(data, pretrained=str(tmp_path / "merged"), head="keep")
    torch.testing.assert_close(logits(merged.model, data, merged.processor), expected, rtol=1e-4, atol=1e-5)
    adapted = importlib.import_module("peft").PeftModel.from_pretrained(plain.model, tmp_path / "merged/adapter")
    torch.testing.assert_close(logits(adapted, data, plain.processor), expected)


def test_lora_targets_by_name(checkpoints):
    for targets, count in ((["query"], 2), (["*.layer.0.*"], 6), (["query", "bert.encoder.layer.1.*.value"], 3)):
        begun = begin(texts(), pretrained=str(checkpoints / "bert"), lora_rank=2, lora_targets=targets)
        assert sum("lora_A" in name for name, _ in begun.model.named_parameters()) == count
    convolutions = begin(images(), lora_rank=2, lora_targets=["conv*"])
    assert sum("lora_A" in name for name, _ in convolutions.model.named_parameters()) == 4
    assert {name for name in convolutions.new if "lora_" not in name} == {
        f"base_model.model.head.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    assert "--lora_targets query matches no layer" in refused(images(), lora_rank=2, lora_targets=["query"])


def test_lora_scale():
    for asked, scale in ((dict(), 2.0), (dict(lora_alpha=1.0), 0.25)):
        model = begin(images(), lora_rank=4, **asked).model
        assert model.base_model.model.neck[0].scaling == {"default": scale}


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(images(), lora_rank=2)
