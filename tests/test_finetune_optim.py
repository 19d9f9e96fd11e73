"""The optimizer that the harness makes of its options: groups, learning rates, freezing, decay, averages, pruning."""

import copy
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import fuseopt
from fuseopt.finetune import optim, stages
from fuseopt.finetune.layers import factors

STEPS = 20


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(
        str(tmp_path), learning_rate=0.05, weight_decay=0.1, max_grad_norm=0.0, use_cpu=True, report_to=[]
    )


def chosen(**values):
    """The options with their defaults, but for `values`."""
    options = vars(optim.OptimizerOptions()) | vars(stages.StageOptions())
    assert values.keys() <= options.keys()
    return SimpleNamespace(**options | values)


def net():
    torch.manual_seed(0)
    blocks = {
        "stem": nn.Conv2d(1, 4, 3),
        "norm": nn.GroupNorm(1, 4),
        "flat": nn.Flatten(),
        "neck": nn.Linear(16, 12),
        "head": nn.Linear(12, 4),
    }
    model = nn.Sequential()
    for name, block in blocks.items():
        model.add_module(name, block)
    return model


def bert(**more):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, **more
    )
    return BertForSequenceClassification(config)


def train(model, optimizer, first=0, steps=STEPS, after=lambda: None):
    """Steps on batches that depend on their number alone."""
    for k in range(first, first + steps):
        torch.manual_seed(k)
        images, labels = torch.randn(8, 1, 4, 4), torch.randint(4, (8,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        after()


def made(args, steps=STEPS, model=None, **values):
    model = model or net()
    return model, optim.build_optimizer(model, chosen(**values), args, steps)


def rates(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def same_bits(x, y):
    return torch.equal(x.detach().view(torch.int32), y.detach().view(torch.int32))


# ---- groups ----------------------------------------------------------------------------------------


def test_decay_is_for_matrices_alone(args):
    model, optimizer = made(args, l1=0.01)
    decayed = {p for g in optimizer.param_groups if g["weight_decay"] and g["l1"] for p in g["params"]}
    assert decayed == {model.stem.weight, model.neck.weight, model.head.weight}
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(model.parameters())


def test_layer_decay_of_a_transformer(args):
    model = bert()
    for (name, _), factor in zip(model.named_parameters(), factors(model, 0.5).values(), strict=True):
        expected = 0.125 if "embeddings" in name else 0.25 if "layer.0." in name else 0.5 if "layer.1." in name else 1.0
        assert factor == expected, name


def test_layer_decay_of_blocks_and_lr_scale_multiply(args):
    model, optimizer = made(args, layer_decay=0.5, lr_scale=["head.*=10", "*.bias=2"])
    expected = {
        "stem.weight": 0.125,
        "stem.bias": 0.25,
        "norm.weight": 0.25,
        "norm.bias": 0.5,
        "neck.weight": 0.5,
        "neck.bias": 1,
        "head.weight": 10,
        "head.bias": 20,
    }
    assert rates(model, optimizer) == pytest.approx({name: 0.05 * factor for name, factor in expected.items()})
    assert optimizer.param_groups[0]["lr"] == 0.05 * 20  # the highest first


def test_layer_decay_through_wrappers_and_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = peft.get_peft_model(bert(), config)
    found = {name: f for (name, p), f in zip(model.named_parameters(), factors(model, 0.5).values(), strict=True)}
    assert {f for name, f in found.items() if "layer.1" in name and "lora_" in name} == {0.5}
    assert {f for name, f in found.items() if "classifier" in name} == {1.0}
    wrapped = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert list(factors(wrapped, 0.5).values()) == [0.5, 0.5, 1.0, 1.0]


def test_lora_trains_the_adapter_and_refuses_to_prune(args):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    model, optimizer = made(args, model=model)
    assert {p for g in optimizer.param_groups for p in g["params"]} == {
        p for p in model.parameters() if p.requires_grad
    }
    for values in ({"sparsity": 0.5}, {"prune_pattern": "2:4"}, {"keep_zeros": True}):
        with pytest.raises(ValueError, match="with --lora_rank"):
            made(args, model=model, **values)


def test_trainer_and_optimizer_agree_who_clips(args):
    args.max_grad_norm = 0.01
    (ours, fused), (theirs, plain) = made(args), made(args, optimizer="torch-adamw")
    assert optim.clips(fused) and not optim.clips(plain)
    step = plain.step
    plain.step = lambda: (nn.utils.clip_grad_norm_(theirs.parameters(), 0.01), step())
    train(ours, fused)
    train(theirs, plain)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# ---- rules -----------------------------------------------------------------------------------------


ALIKE = [
    (name, decay) for name in ("adamw", "adam", "sgd", "nadam", "adagrad") for decay in (None, "coupled", "decoupled")
]


@pytest.mark.parametrize(
    "name, decay", [(n, d) for n, d in ALIKE if not d or optim.FIXED_DECAY.get(f"torch-{n}", d) == d]
)
def test_fused_and_torch_train_alike(name, decay, args):
    args.adam_beta1 = 0.8 if name in optim.ADAMS else 0.9
    theirs, plain = made(args, optimizer=f"torch-{name}", decay=decay, layer_decay=0.5)
    ours, fused = made(args, optimizer=name, decay=decay, layer_decay=0.5)
    train(ours, fused)
    train(theirs, plain)
    assert any(not same_bits(p, q) for p, q in zip(ours.parameters(), net().parameters(), strict=True))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize("name", ["sgd", "adam", "nadam", "adagrad"])
def test_decay_and_l1_are_coupled_or_not(name, decay, args):
    """Without a gradient: decoupled, p shrinks by lr*wd and then by lr*l1; coupled, sgd takes the sum for a gradient."""
    model, optimizer = made(args, optimizer=name, decay=decay, l1=0.2)
    before = model.head.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = before * (1 - 0.05 * 0.1)
    decoupled = shrunk.sign() * (shrunk.abs() - 0.05 * 0.2).clamp(min=0)
    if decay == "decoupled":
        torch.testing.assert_close(model.head.weight, decoupled)
    elif name == "sgd":
        torch.testing.assert_close(model.head.weight, before - 0.05 * (0.1 * before + 0.2 * before.sign()))
    else:
        assert not torch.allclose(model.head.weight, decoupled)
    assert same_bits(model.head.bias, net().head.bias)


def test_lion_trains(args):
    model, optimizer = made(args, optimizer="lion")
    assert type(optimizer) is fuseopt.Lion and optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    train(model, optimizer, steps=1)
    moved = net().head.bias - model.head.bias
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.05))


# ---- freezing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["mask", "requires_grad"])
def test_frozen_parameters_keep_their_bits(by, args):
    on = {"average": "ema", "ema_decay": 0.5, "sparsity": 0.5, "prune_every": 5, "l1": 0.01}
    model, optimizer = made(args, freeze=["stem.*", "*.bias"], freeze_by=by, **on)
    names = optim.frozen_names(model, ["stem.*", "*.bias"])
    assert names == {"stem.weight", "stem.bias", "norm.bias", "neck.bias", "head.bias"}
    train(model, optimizer)
    start = dict(net().named_parameters())

    def frozen():
        return {name for name, p in model.named_parameters() if same_bits(p, start[name])}

    assert frozen() == names
    with optimizer.swap_ema():
        assert frozen() == names
    assert model.stem.weight not in set(stages.prunable(optimizer))
    inside = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name in names:
            assert (p in inside) == p.requires_grad == (p.grad is not None) == (by == "mask")
    made(args, model=copy.deepcopy(model), freeze=["stem.*", "*.bias"], freeze_by=by)  # a second time, as compare does


def test_a_tied_parameter_is_frozen_by_either_name(args):
    model = nn.Sequential(nn.Embedding(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    assert optim.frozen_names(model, ["1.weight"]) == {"0.weight"}
    _, optimizer = made(args, model=model, freeze=["1.weight"])
    assert sorted(len(g["params"]) for g in optimizer.param_groups) == [1, 1]


def test_none_freezes_nothing(args):
    for name in ("adamw", "torch-adamw"):
        model, optimizer = made(args, optimizer=name, freeze=["none"])
        train(model, optimizer)
        assert not any(same_bits(p, q) for p, q in zip(model.parameters(), net().parameters(), strict=True))


def test_a_bad_option_changes_nothing(args):
    model = net()
    with pytest.raises(ValueError, match="--lr_scale x matches no"):
        made(args, model=model, freeze=["stem.*"], freeze_by="requires_grad", lr_scale=["x=1"])
    assert all(p.requires_grad for p in model.parameters())


# ---- averages --------------------------------------------------------------------------------------


def test_mean_has_equal_weights(args):
    model, optimizer = made(args, average="mean", average_start=6, average_every=4)
    weights = []
    train(model, optimizer, after=lambda: weights.append(model.head.weight.detach().double().clone()))
    with optimizer.swap_ema():
        expected = torch.stack([weights[t - 1] for t in (10, 14, 18)]).mean(0)
        torch.testing.assert_close(model.head.weight.double(), expected, rtol=1e-5, atol=1e-7)


def test_ema_follows_its_formula(args):
    model, optimizer = made(args, average="ema", ema_decay=0.7, ema_warmup="none", average_start=2)
    weights = []
    train(model, optimizer, after=lambda: weights.append(model.head.weight.detach().double().clone()))
    expected = weights[2]
    for w in weights[3:]:
        expected = 0.7 * expected + 0.3 * w
    with optimizer.swap_ema():
        torch.testing.assert_close(model.head.weight.double(), expected, rtol=1e-5, atol=1e-6)


# ---- pruning ---------------------------------------------------------------------------------------


def pruned(args, **values):
    model, optimizer = made(args, average="ema", **values)
    history = []
    train(model, optimizer, after=lambda: history.append(stages.sparsity(stages.prunable(optimizer))))
    return model, optimizer, history


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_sparsity_is_reached_where_asked(scope, args):
    model, optimizer, history = pruned(args, sparsity=0.75, prune_scope=scope, prune_every=2)
    entries = [p.numel() for p in stages.prunable(optimizer)]
    assert entries == [36, 192, 48]
    assert history[4] == 0 < history[6] and history[13] < history[14] == history[-1] == 0.75  # from 5 to 15 of 20
    shares = [stages.sparsity([p]) for p in stages.prunable(optimizer)]
    assert (shares == [0.75] * 3) == (scope == "tensor")
    with optimizer.swap_ema():
        assert stages.sparsity(stages.prunable(optimizer)) == 0.75


def test_schedules_differ_as_they_say(args):
    early = {}
    for schedule in ("cubic", "linear"):
        _, _, history = pruned(args, sparsity=0.75, prune_schedule=schedule, prune_begin=1, prune_end=17, prune_every=4)
        early[schedule] = history[4]
    assert early["linear"] == pytest.approx(0.75 / 4, abs=0.01)
    assert early["cubic"] == pytest.approx(0.75 * (1 - 0.75**3), abs=0.01)
    _, _, history = pruned(args, sparsity=0.75, prune_schedule="once", prune_begin=7)
    assert history[5] == 0 and history[6] == 0.75


def test_rows_and_2_4(args):
    model, _, _ = pruned(args, sparsity=0.5, prune_pattern="rows", prune_scope="tensor", prune_every=1)
    rows = (model.neck.weight == 0).sum(1)
    assert sorted(rows.tolist()) == [0] * 6 + [16] * 6
    model, optimizer, _ = pruned(args, prune_pattern="2:4", prune_begin=4)
    assert fuseopt.check_n_m(optimizer) and stages.sparsity([model.head.weight, model.neck.weight]) == 0.5


def test_keep_zeros_goes_on_from_a_pruned_model(args):
    model, _, _ = pruned(args, sparsity=0.75, prune_every=2)
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim > 1}
    before = model.head.weight.detach().clone()
    model, optimizer = made(args, model=model, keep_zeros=True, average="mean")
    train(model, optimizer)
    assert stages.sparsity(stages.prunable(optimizer)) == 0.75 and not same_bits(before, model.head.weight)
    with optimizer.swap_ema():
        assert all(torch.equal(p == 0, zeros[name]) for name, p in model.named_parameters() if p.ndim > 1)


def test_continues_from_its_state_to_the_same_bits(args):
    on = {"average": "ema", "sparsity": 0.75, "prune_every": 2, "freeze": ["stem.*"], "layer_decay": 0.5}
    whole, optimizer = made(args, **on)
    train(whole, optimizer)
    first, optimizer = made(args, **on)
    train(first, optimizer, steps=9)
    second, again = made(args, model=copy.deepcopy(first), **on)
    again.load_state_dict(optimizer.state_dict())
    train(second, again, first=9, steps=11)
    assert all(same_bits(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))


# ---- bad input -------------------------------------------------------------------------------------

BAD = [
    ({"learning_rate": -1.0}, "--learning_rate -1.0: must be a finite number of at least 0"),
    ({"weight_decay": float("nan")}, "--weight_decay nan: must be"),
    ({"adam_beta2": 1.0}, "--adam_beta2 1.0: must be in [0, 1)"),
    ({"optimizer": "lion", "adam_beta2": 0.99}, "--adam_beta2 0.99 has no effect on --optimizer lion"),
    ({"momentum": 0.5}, "--momentum 0.5 has no effect on --optimizer adamw"),
    ({"optimizer": "sgd", "momentum": 1.0}, "--momentum 1.0: must be in [0, 1)"),
    ({"decay": "coupled"}, "--decay coupled: the decay of adamw is decoupled; use --optimizer adam"),
    (
        {"optimizer": "torch-sgd", "decay": "decoupled"},
        "--decay decoupled: the decay of torch-sgd is coupled; use --optimizer sgd",
    ),
    ({"optimizer": "torch-adamw", "l1": 0.1}, "--l1 0.1: torch-adamw cannot; use --optimizer adamw"),
    ({"optimizer": "torch-sgd", "average": "ema"}, "--average ema: torch-sgd cannot; use --optimizer sgd"),
    ({"optimizer": "torch-adamw", "sparsity": 0.5}, "--sparsity 0.5: torch-adamw cannot"),
    (
        {"optimizer": "torch-adamw", "freeze": ["stem.*"]},
        "--freeze_by mask: torch-adamw has no masks; use --freeze_by requires_grad",
    ),
    ({"l1": -0.1}, "--l1 -0.1: must be"),
    ({"freeze": ["body.*"]}, "--freeze body.* matches no parameter; their names are: stem.weight, stem.bias,"),
    ({"freeze": ["*"]}, "--freeze * leaves no parameter to train"),
    ({"freeze_by": "requires_grad"}, "--freeze_by requires_grad has no effect without --freeze"),
    ({"layer_decay": 0.0}, "--layer_decay 0: must be more than 0 and at most 1"),
    ({"lr_scale": ["head.*"]}, "--lr_scale head.*: give PATTERN=FACTOR"),
    ({"lr_scale": ["head.*=-1"]}, "--lr_scale head.*=-1: give PATTERN=FACTOR"),
    ({"average": "ema", "ema_decay": 2.0}, "--ema_decay 2.0: must be in [0, 1)"),
    ({"ema_decay": 0.9}, "--ema_decay 0.9 has no effect without --average"),
    ({"average": "mean", "ema_decay": 0.9}, "--ema_decay 0.9 has no effect on --average mean"),
    ({"average": "mean", "average_start": 20}, "--average_start 20 and --average_every 1: no step up to the last, 20,"),
    ({"average": "mean", "average_every": 0}, "--average_every 0: must be"),
    ({"sparsity": 1.0}, "--sparsity 1.0: must be in [0, 1)"),
    ({"prune_begin": 3}, "--prune_begin 3 has no effect without --sparsity"),
    ({"prune_pattern": "rows"}, "--prune_pattern rows has no effect without --sparsity"),
    ({"prune_pattern": "4:2"}, "--prune_pattern 4:2: give none, rows, or N:M"),
    ({"prune_pattern": "2:4", "sparsity": 0.5}, "--sparsity 0.5 has no effect with --prune_pattern 2:4"),
    ({"prune_pattern": "2:4", "prune_end": 9}, "--prune_end 9 has no effect where --prune_begin alone prunes"),
    ({"sparsity": 0.5, "prune_begin": 12, "prune_end": 8}, "--prune_begin 12 is after --prune_end 8"),
    ({"sparsity": 0.5, "prune_begin": 21}, "--prune_begin 21: must be a step from 1 to the last, 20"),
    ({"sparsity": 0.5, "prune_end": 25}, "--prune_end 25 is after the last step, 20"),
    (
        {"sparsity": 0.5, "prune_begin": 5, "prune_end": 12},
        "--prune_end 12 is not a whole number of --prune_every 10 after --prune_begin 5",
    ),
    ({"sparsity": 0.5, "prune_every": 0}, "--prune_every 0: must be"),
    ({"keep_zeros": True}, "--keep_zeros: no matrix of this model has a zero"),
    ({"keep_zeros": True, "sparsity": 0.5}, "--keep_zeros with pruning"),
]


@pytest.mark.parametrize("values, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_values_in_one_line(values, message, args):
    for name in [name for name in values if hasattr(args, name)]:
        setattr(args, name, values[name])
    with pytest.raises(ValueError) as caught:
        made(args, **{name: value for name, value in values.items() if name in vars(chosen())})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_unknown_names_are_shortened():
    with pytest.raises(ValueError) as caught:
        optim.frozen_names(bert(), ["encoder"])
    assert "bert.encoder.layer.*.attention.self.query.weight" in str(caught.value) and len(str(caught.value)) < 800
