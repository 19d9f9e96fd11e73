"""Tiny models and data for the tests of fuseopt.finetune.models."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from fuseopt.finetune.data import Data, DataOptions, datasets, new_processor
from fuseopt.finetune.models import ModelOptions, save, start
from fuseopt.finetune.models.small import SMALL

WORDS = "the cat sat on a mat while rain fell and birds sang in old green trees by our quiet river".split()


def images(names="abc", channels=1, size=(8, 8)):
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"image": torch.rand(channels, *size, generator=generator), "labels": i % len(names)}
        for i in range(4 * len(names))
    ]
    return Data("image", rows, rows[:6], list(names), "noise")


def texts(names="abc"):
    rows = [
        {"text": " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 3 + i % 5)), "labels": i % len(names)}
        for i in range(8 * len(names))
    ]
    return Data("text", rows, rows[:6], list(names), "words")


def begin(data, seed=0, **changes):
    options = SimpleNamespace(**vars(ModelOptions()) | vars(DataOptions()) | changes)
    torch.manual_seed(seed)
    return start(options, data, lambda: new_processor(data, options))


def refused(data, **changes):
    """Expect a refusal, and return its one line."""
    with pytest.raises(ValueError) as raised:
        begin(data, **changes)
    line = str(raised.value)
    assert "\n" not in line and len(line) < 600, line
    return line


def logits(model, data, processor):
    """Logits of the test rows, in eval mode."""
    rows, collate = datasets(data, processor, DataOptions(), 0)[1:]
    inputs = collate([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in inputs.items() if k != "token_type_ids"}).logits


def differing(one, other):
    """Names of the tensors that are not bit-equal."""
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


SIZE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def config_of(kind, vocabulary):
    if kind == "vit":
        return transformers.ViTConfig(**SIZE, image_size=8, patch_size=4, num_channels=1)
    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return transformers.BertConfig(**SIZE, vocab_size=vocabulary, max_position_embeddings=64)


CLASSES = {
    "bert": transformers.BertForSequenceClassification,
    "vit": transformers.ViTForImageClassification,
    "gpt2": transformers.GPT2ForSequenceClassification,
}
KINDS = [*SMALL, *CLASSES]
TEXT = ("mlp", "bert", "gpt2")


def data_for(kind, names="abc"):
    return texts(names) if kind in TEXT else images(names)


def make_checkpoints(folder):
    """Save a folder of each kind, its head for the classes a, b, c, no parameter at zero or one; return `folder`."""
    for kind in KINDS:
        data = data_for(kind)
        processor = new_processor(data, DataOptions())
        if kind in SMALL:
            model = begin(data, model=kind, pretrained="none", seed=5).model
        else:
            config = config_of(kind, len(processor) if kind in TEXT else 0)
            config.id2label, config.label2id = dict(enumerate("abc")), {"a": 0, "b": 1, "c": 2}
            config.pad_token_id = 0
            model = CLASSES[kind](config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        save(model, processor, folder / kind)
    return folder


def state_of(folder, kind):
    """The tensors of a checkpoint by the names of the library's own model, which may differ from those in the file."""
    return (SMALL | CLASSES)[kind].from_pretrained(folder / kind).state_dict()
