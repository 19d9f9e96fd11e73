"""fuseopt.finetune.models: the small models, saving and loading, and weights that are refused."""

import json
import os

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "safetensors"):
    pytest.importorskip(extra)

from safetensors.torch import load_file, save_file
from starts import (
    CLASSES,
    KINDS,
    SMALL,
    TEXT,
    begin,
    data_for,
    differing,
    images,
    logits,
    refused,
    state_of,
    texts,
)
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from fuseopt.finetune.data import Pixels
from fuseopt.finetune.folder import write_all
from fuseopt.finetune.models import save

# Small models


def test_parameters_are_named_by_what_they_do():
    for kind, parts in (("cnn", "stem body neck head"), ("rnn", "stem body neck head"), ("mlp", "stem body head")):
        model = begin(data_for(kind), model=kind, pretrained="none").model
        assert sorted({n.split(".")[0] for n, _ in model.named_parameters()}) == sorted(parts.split())
    assert begin(images("01234")).model.num_parameters() == 98533


SIZE_OF = {
    "cnn": lambda model: (1 + len(model.body), model.stem.conv1.out_channels, model.neck[0].in_features),
    "rnn": lambda model: (model.body.num_layers, model.body.hidden_size, model.neck[0].in_features),
    "mlp": lambda model: (len(model.body), model.stem.embedding_dim, model.head.in_features),
}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("depth", [1, 3])
def test_sizes_by_option(kind, depth):
    data, labels = data_for(kind), torch.tensor([0, 2])
    model = begin(data, model=kind, pretrained="none", depth=depth, width=12, activation="tanh", dropout=0.3).model
    assert SIZE_OF[kind](model) == (depth, 12, 4 * 12 * 2 ** (depth - 1) if kind == "cnn" else 12)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert kind != "rnn" or model.body.dropout == (0.3 if depth > 1 else 0.0)
    kinds = {type(m) for m in model.modules()}
    assert nn.Tanh in kinds and nn.ReLU not in kinds
    output = model(**_inputs(data), labels=labels)
    assert output.logits.shape == (2, 3)
    assert torch.equal(output.loss, nn.functional.cross_entropy(output.logits, labels))


def _inputs(data):
    if data.kind == "image":
        return {"pixel_values": torch.stack([row["image"] for row in data.train[:2]])}
    return {"input_ids": torch.tensor([[2, 3, 4], [5, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (33, 32), (4, 40)])
def test_cnn_takes_images_of_any_size_from_4_pixels(size):
    data = images(size=size)
    for depth in (1, 2, 5):
        model = begin(data, pretrained="none", depth=depth, width=4).model
        assert model(**_inputs(data)).logits.isfinite().all()


def test_cnn_halves_the_image_while_it_can():
    model, sizes = begin(images(size=(24, 24)), pretrained="none", depth=5, width=4).model, []
    for block in (model.stem, *model.body):
        block.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    model(torch.rand(1, 1, 24, 24))
    assert sizes == [24, 12, 6, 3, 3]


def test_cnn_sees_every_corner():
    model, x = begin(images(), pretrained="none", depth=1).model.eval(), torch.rand(1, 1, 8, 8, requires_grad=True)
    model(x).logits.square().sum().backward()
    assert x.grad[..., [0, 0, -1, -1], [0, -1, 0, -1]].all()


def test_rnn_reads_the_rows_in_order_and_names_a_wrong_width():
    model = begin(images(), model="rnn", pretrained="none").model
    x = torch.rand(2, 1, 8, 8)
    assert not torch.equal(model(x).logits, model(x.flip(2)).logits)
    model.eval()
    rows, _ = model.body(model.stem(x[:, 0]))
    assert torch.equal(model(x).logits, model.head(model.neck(rows[:, -1])))
    assert model(torch.rand(1, 1, 3, 8)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="9 pixels wide.* made for 8"):
        model(torch.rand(1, 1, 8, 9))


def test_mlp_averages_the_tokens_that_are_not_padding():
    model = begin(texts(), model="mlp", pretrained="none").model
    short, padded = torch.tensor([[2, 3]]), torch.tensor([[2, 3, 0, 0]])
    expected = model(short).logits
    assert torch.equal(model.stem(short).mean(1), model.stem(short).sum(1) / 2)
    torch.testing.assert_close(model(padded).logits, expected)  # the mask follows from the padding
    torch.testing.assert_close(model(torch.tensor([[2, 3, 7, 7]]), torch.tensor([[1, 1, 0, 0]])).logits, expected)
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()


# Saving and loading


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_gives_the_same_bits(checkpoints, tmp_path, kind):
    data = data_for(kind)
    begun = begin(data, pretrained=str(checkpoints / kind))
    expected = logits(begun.model, data, begun.processor)
    save(begun.model, begun.processor, tmp_path / "saved")
    auto = AutoModelForSequenceClassification if kind in TEXT else AutoModelForImageClassification
    model = auto.from_pretrained(tmp_path / "saved")
    processor = (AutoTokenizer if kind in TEXT else Pixels).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(model, data, processor), expected)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    again = begin(data, pretrained=str(tmp_path / "saved"))
    assert torch.equal(logits(again.model, data, again.processor), expected)
    assert not again.new and "nothing new" in again.description
    saved, before = load_file(tmp_path / "saved/model.safetensors"), load_file(checkpoints / kind / "model.safetensors")
    assert not differing(saved, before)


def test_a_folder_is_saved_whole_or_not_at_all(tmp_path):
    begun = begin(images())
    write_all(tmp_path, {"model": lambda path: save(begun.model, begun.processor, path)})
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    class Broken:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    for folder in ("model", "other"):
        with pytest.raises(OSError, match="No space"):
            write_all(tmp_path, {folder: lambda path: save(begin(images("ab")).model, Broken(), path)})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    write_all(tmp_path, {"model": lambda path: save(begin(images("ab")).model, begun.processor, path)})
    assert json.loads((tmp_path / "model/config.json").read_text())["id2label"] == {"0": "a", "1": "b"}


# Weights


def test_files_of_weights(checkpoints, tmp_path):
    tensors = load_file(checkpoints / "cnn" / "model.safetensors")
    torch.save(tensors, tmp_path / "bare.pt")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "lightning.ckpt")
    torch.save({"model": {f"module.{name}": p for name, p in tensors.items()}}, tmp_path / "ddp.bin")
    save_file(tensors, tmp_path / "no_suffix")
    for name in os.listdir(tmp_path):
        begun = begin(images(), pretrained=str(tmp_path / name), head="keep")
        assert not differing(begun.model.state_dict(), tensors), name


@pytest.mark.parametrize("kind", CLASSES)
def test_weights_from_a_file_into_a_transformers_model(checkpoints, kind):
    folder, data, before = checkpoints / kind, data_for(kind), state_of(checkpoints, kind)
    begun = begin(data, model=str(folder), pretrained=str(folder / "model.safetensors"), head="keep")
    assert not begun.new and not differing(begun.model.state_dict(), before)
    assert begin(data, model=str(folder)).new == set()
    scratch = begin(data, model=str(folder), pretrained="none")
    names = {name for name, _ in scratch.model.named_parameters()}
    assert "random weights" in scratch.description and scratch.new == names
    assert differing(scratch.model.state_dict(), before) >= names  # the checkpoint has no zeros and ones


def test_half_precision_is_loaded_as_float32(checkpoints, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoints / "bert", dtype=torch.bfloat16)
    save(model, AutoTokenizer.from_pretrained(checkpoints / "bert"), tmp_path / "half")
    begun = begin(texts(), pretrained=str(tmp_path / "half"))
    assert {p.dtype for p in begun.model.parameters()} == {torch.float32}
    expected = {name: p.float() for name, p in model.state_dict().items()}
    assert not differing({n: p.float() for n, p in begun.model.state_dict().items()}, expected)


class Malicious:
    def __init__(self, folder):
        self.made = str(folder / "executed")

    def __reduce__(self):
        return (os.mkdir, (self.made,))


@pytest.fixture(scope="module")
def damaged(checkpoints, tmp_path_factory):
    """Files and folders that must be refused."""
    folder = tmp_path_factory.mktemp("damaged")
    whole = (checkpoints / "cnn" / "model.safetensors").read_bytes()
    tensors = load_file(checkpoints / "cnn" / "model.safetensors")
    torch.save(tensors, folder / "half.pt")
    for name, content in (("half", whole), ("half.pt", (folder / "half.pt").read_bytes())):
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "empty").write_bytes(b"")
    (folder / "noise").write_bytes(bytes(range(256)) * 9)
    torch.save({"model": Malicious(folder)}, folder / "pickle")
    torch.save([1, 2], folder / "list")
    torch.save({"a": torch.zeros(1), "epoch": 3}, folder / "epoch")
    save_file({n: p for n, p in tensors.items() if "conv" not in n}, folder / "lacking")
    save_file(tensors | {"extra": torch.zeros(2)}, folder / "other")
    save_file(tensors | {"stem.conv1.bias": torch.zeros(5)}, folder / "reshaped")
    save_file(tensors | {"neck.0.bias": tensors["neck.0.bias"] * torch.nan}, folder / "nan")
    torch.save(dict(enumerate(tensors.values())), folder / "numbered")
    torch.save({name: p.to(torch.int8) for name, p in tensors.items()}, folder / "int8")
    torch.save({name: p.to(torch.complex64) for name, p in tensors.items()}, folder / "complex")
    for name in ("truncated", "broken", "unweighted", "pickled", "untyped", "inactive"):
        (folder / name).mkdir()
        config = (checkpoints / "cnn" / "config.json").read_text()
        (folder / name / "config.json").write_text(
            {"broken": "{", "untyped": "{}", "inactive": config.replace("relu", "rely")}.get(name, config)
        )
    (folder / "truncated" / "model.safetensors").write_bytes(whole[:999])
    torch.save({"model": Malicious(folder)}, folder / "pickled" / "pytorch_model.bin")
    (folder / "run" / "model").mkdir(parents=True)
    (folder / "run" / "model" / "config.json").write_text("{}")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


DAMAGES = [
    ("missing", "no such file"),
    ("half", "not whole"),
    ("half.pt", "not whole"),
    ("empty", "empty: cannot be read"),
    ("noise", "noise: "),
    ("pickle", "safetensors"),
    ("list", "list"),
    ("epoch", "epoch"),
    (
        "lacking",
        "missing: body.0.conv1.bias, body.0.conv1.weight, body.0.conv2.bias, body.0.conv2.weight, stem.conv1.bias and 3 more",
    ),
    ("other", "unknown: extra"),
    ("reshaped", "stem.conv1.bias (5,) for (32,)"),
    ("nan", "NaN or infinite values in neck.0.bias"),
    ("numbered", "is not a tensor: save model.state_dict() alone"),
    ("int8", "integers where this model has weights"),
    ("complex", "complex numbers in"),
    ("inactive", "no model has such a configuration: 'rely'"),
    ("truncated", "not whole"),
    ("broken", "JSON"),
    ("untyped", "untyped"),
    ("unweighted", "model.safetensors"),
    ("pickled", "pickled objects"),
    ("run", os.path.join("run", "model")),
    ("adapter", "LoRA adapter"),
]


@pytest.mark.parametrize("name, said", DAMAGES, ids=[name for name, _ in DAMAGES])
def test_weights_that_are_refused(damaged, name, said):
    line = refused(images(), pretrained=str(damaged / name))
    assert line.startswith(f"--pretrained {damaged / name}: ") and said in line
    assert not (damaged / "executed").exists()
