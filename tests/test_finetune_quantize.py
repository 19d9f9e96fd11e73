"""8-bit weights: what is stored, that inference computes from it, and that a file brings the same bits back."""

import copy
import sys
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from fuseopt.finetune import quantize


@pytest.fixture
def torchao():
    """Not at the top: one test is of what is said without it."""
    pytest.importorskip("torchao")


class Images(nn.Module):
    """A convolution, a norm, two recurrent layers in both directions, a head: for images (N, 1, 8, 8)."""

    def __init__(self, recurrent=nn.GRU, width=4):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width)
        self.layer = recurrent(6 * width, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        x = self.norm(self.stem(images)).permute(0, 2, 1, 3).flatten(2)
        return self.head(self.layer(x)[0].mean(1))


def gru():
    return Images(), torch.randn(64, 1, 8, 8)


def lstm():
    return Images(nn.LSTM), torch.randn(64, 1, 8, 8)


def bert():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertForSequenceClassification(config), torch.randint(50, (64, 6))


def gpt2():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8, pad_token_id=0)
    return GPT2ForSequenceClassification(config), torch.randint(1, 50, (64, 6))


def made(case):
    torch.manual_seed(0)
    model, inputs = case()
    return model.eval(), inputs


@torch.no_grad()
def logits(model, inputs):
    found = model(inputs)
    return getattr(found, "logits", found)


CASES = pytest.mark.parametrize("case", [gru, lstm, bert, gpt2])


@CASES
def test_computes_nearly_the_same_from_a_quarter_of_the_bytes(case, torchao):
    model, inputs = made(case)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    small = quantize.quantized(model)
    assert {name: torch.equal(p, before[name]) for name, p in model.named_parameters()} == dict.fromkeys(before, True)
    exact, found = logits(model, inputs), logits(small, inputs)
    assert 0 < (found - exact).abs().max() < 0.05 * exact.std()
    matrices = [name for name, p in before.items() if p.ndim > 1]
    stored = quantize._tensors(small)
    assert [name for name in matrices if not quantize._is_8_bit(stored[name])] == []
    assert quantize.size(small) < 0.55 * quantize.size(model)  # biases and scales weigh in models as small as these


@CASES
def test_weights_are_int8_with_a_scale_a_row(case, torchao, tmp_path):
    model, _ = made(case)
    small = quantize.quantized(model)
    quantize.save(small, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(x.numel() * x.element_size() for x in stored.values()) == quantize.size(small)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(stored[name], p)
            continue
        rows, scale = stored[name].flatten(1).int(), stored[f"{name}.scale"]
        assert stored[name].dtype == torch.int8 and scale.shape == (len(p), 1)
        error = (rows * scale - p.detach().flatten(1)).abs()
        assert (error <= 0.501 * scale).all()
        assert torch.equal(rows.abs().amax(1) >= 127, p.flatten(1).any(1))  # the range is used, save by rows of zeros


@CASES
def test_a_file_brings_the_same_bits_back(case, torchao, tmp_path):
    model, inputs = made(case)
    small = quantize.quantized(model)
    quantize.save(small, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    again = quantize.load(case()[0], tmp_path / "model.safetensors")
    assert torch.equal(logits(again, inputs), logits(small, inputs))
    assert torch.equal(logits(copy.deepcopy(again), inputs), logits(small, inputs))


@CASES
def test_inference_reads_the_8_bit_weights(case, torchao):
    """Twice the scale of any of them changes the output; so none is a leftover beside a float copy."""
    model, inputs = made(case)
    small = quantize.quantized(model)
    before = logits(small, inputs)
    for name, x in quantize._tensors(small).items():
        if quantize._is_8_bit(x):
            x.scale.mul_(2)
            changed = not torch.equal(logits(small, inputs), before)
            x.scale.div_(2)
            assert changed, name
    floats = [x for module in small.modules() for x in vars(module).get("_flat_weights", []) if x is not None]
    assert floats == []  # nor is a float copy left behind
    assert torch.equal(logits(small, inputs), before)


def test_zeros_and_ties_stay(torchao, tmp_path):
    model, images = made(gru)
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[::2] = 0
        model.stem.weight[0] = 0
    small = quantize.quantized(model)
    for name, x in quantize._tensors(small).items():
        if quantize._is_8_bit(x):
            p = model.get_parameter(name).flatten(1)
            assert (x.dequantize()[p == 0] == 0).all()
    assert logits(small, images).isfinite().all()
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(shared, nn.ReLU(), shared)
    small = quantize.quantized(tied)
    assert small[0] is small[2] and len(quantize._tensors(small)) == 2
    quantize.save(small, tmp_path / "tied.safetensors")
    again = quantize.load(copy.deepcopy(tied), tmp_path / "tied.safetensors")
    assert torch.equal(again(torch.ones(1, 4)), small(torch.ones(1, 4)))


def test_no_deprecated_call(torchao):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        logits(quantize.quantized(made(bert)[0]), made(bert)[1])
    assert [str(w.message) for w in seen if "deprecat" in str(w.message)] == []


def test_files_that_do_not_fit(torchao, tmp_path):
    file = tmp_path / "model.safetensors"
    quantize.save(quantize.quantized(made(gru)[0]), file)
    with pytest.raises(ValueError, match="is of another architecture; it differs in .*bert"):
        quantize.load(made(bert)[0], file)
    with pytest.raises(ValueError, match=r"stem.bias is \(4,\) torch.float32, this model needs \(5,\) torch.float32"):
        quantize.load(Images(width=5), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        quantize.load(made(gru)[0], file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="it differs in"):
        quantize.load(made(gru)[0], file)


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="^--quantize needs the package torchao .*: pip install torchao$"):
        quantize.quantized(nn.Linear(2, 2))


def test_nothing_to_quantise(torchao):
    with pytest.raises(ValueError, match="--quantize: LayerNorm has no linear, embedding"):
        quantize.quantized(nn.LayerNorm(4))
