"""The end of pruning, and the reports: finalize_pruning, sparsity, check_n_m."""

import copy

import pytest
import torch
from cases import BF16, F32, Snapshot, assert_same_bits, bits, ident, run, set_gradients
from torch import nn
from torch.nn.utils import prune as torch_prune

import fuseopt
from fuseopt import EMA, Prune


def make_model(dtype=F32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, bias=False), nn.Flatten(), nn.Linear(12, 16), nn.Linear(16, 5))
    return model.to(dtype, memory_format=torch.channels_last)


def trained(prune, backend="cpu", dtype=F32, **more):
    """(model, optimizer) after pruning, its last layer in a group that is not pruned."""
    model = make_model(dtype)
    names = dict(model.named_parameters())
    groups = [{"params": [(n, p) for n, p in names.items() if n[0] in "02"]},
              {"params": [(n, p) for n, p in names.items() if n[0] == "3"], "prune": None}]  # fmt: skip
    opt = fuseopt.AdamW(groups, lr=0.01, prune=prune, ema=[EMA(0.9), EMA(0.5)], backend=backend, **more)
    run(opt, list(model.parameters()), 3)
    return model, opt


PRUNES = {
    "unstructured": Prune(0.6, begin=2),
    "2:4": Prune(pattern="2:4", begin=2, end=3, regrow=True),
    "rows": Prune(0.5, pattern="rows", begin=2),
    "threshold": Prune(threshold=0.05),
}


# ---- finalize_pruning ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (F32, BF16), ids=ident)
@pytest.mark.parametrize("name", PRUNES)
def test_finalize_leaves_an_ordinary_optimizer(name, dtype, backend):
    """No bit moves; then every weight moves again, as of an optimizer that never pruned and has the same state."""
    model, opt = trained(PRUNES[name], backend, dtype)
    pruned = {p: opt.prune_mask(p) for p in model.parameters()}
    assert any(x is not None and x.any() for x in pruned.values())
    before = copy.deepcopy(model.state_dict())
    opt.finalize_pruning()
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key], key)
    assert all(group["prune"] is None for group in opt.param_groups) and opt.defaults["prune"] is None
    assert all(opt.prune_mask(p) is None for p in model.parameters())
    assert not any(key.startswith(("mask_", "prune_")) for state in opt.state.values() for key in state)
    twin = copy.deepcopy(model)
    other = fuseopt.AdamW(twin.named_parameters(), lr=0.01, ema=[EMA(0.9), EMA(0.5)], backend=backend)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        other.state[q] = {k: v.clone() for k, v in opt.state[p].items()}
    for group in other.param_groups:
        group["steps"] = 3
    run(opt, list(model.parameters()), 2, 4)
    run(other, list(twin.parameters()), 2, 4)
    for (p, q), gone in zip(zip(model.parameters(), twin.parameters(), strict=True), pruned.values(), strict=True):
        assert_same_bits(p, q)
        assert gone is None or (p[gone] != 0).all()


def test_finalize_zeroes_what_was_written_meanwhile(backend):
    """Weights and averages that somebody filled, as load_state_dict of a dense model does."""
    model, opt = trained(PRUNES["unstructured"], backend)
    p = model[2].weight
    pruned = opt.prune_mask(p)
    with torch.no_grad():
        p.fill_(-1.0), opt.state[p]["ema_1"].fill_(-1.0)
    opt.finalize_pruning()
    for x in (p, opt.state[p]["ema_1"]):
        assert not bits(x)[pruned].any() and (x[~pruned] == -1).all()


def test_finalize_keeps_the_users_masks(backend):
    model, opt = trained(None, backend)
    p = model[2].weight
    opt.mask(p, torch.arange(16)[:, None] > 3)
    opt.param_groups[0]["prune"] = Prune(0.5, begin=4)
    run(opt, list(model.parameters()), 1, 4)
    opt.finalize_pruning()
    frozen = p[:4].detach().clone()
    run(opt, list(model.parameters()), 2, 5)
    assert_same_bits(p[:4], frozen)


def test_finalize_without_pruning_changes_nothing(backend):
    model, opt = trained(None, backend)
    before = Snapshot(opt)
    opt.finalize_pruning()
    opt.finalize_pruning(model)
    before.assert_unchanged()
    assert not torch_prune.is_pruned(model)


@pytest.mark.parametrize("name", PRUNES)
def test_torch_understands_the_finalized_model(name):
    """weight_orig and weight_mask, is_pruned, further pruning on top, and remove: the same forward throughout."""
    model, opt = trained(PRUNES[name])
    masks = {n: opt.prune_mask(p) for n, p in model.named_parameters()}
    x = torch.randn(4, 8, 3, 3)
    expected = model(x)
    own = dict(model.named_parameters())
    opt.finalize_pruning(model)
    assert torch_prune.is_pruned(model) and torch.equal(model(x), expected)
    for place in ("0", "2"):
        layer = model.get_submodule(place)
        assert layer.weight_orig is own[f"{place}.weight"]  # which the optimizer goes on training
        assert torch.equal(layer.weight_mask == 0, masks[f"{place}.weight"])
    assert not torch_prune.is_pruned(model[3])
    run(opt, [p for g in opt.param_groups for p in g["params"]], 1, 4)  # moves weight_orig, and the mask holds
    model(x)
    assert torch.equal(model[2].weight == 0, masks["2.weight"])
    more = int((~masks["2.weight"]).sum()) // 2
    torch_prune.l1_unstructured(model[2], "weight", amount=more)
    assert int((model[2].weight == 0).sum()) == int(masks["2.weight"].sum()) + more
    assert (model[2].weight[masks["2.weight"]] == 0).all()
    for place in ("0", "2"):
        torch_prune.remove(model.get_submodule(place), "weight")
    assert not torch_prune.is_pruned(model) and "2.weight" in dict(model.named_parameters())


def test_masks_join_those_that_torch_has_set():
    """A model that torch.nn.utils.prune had in hand before: its mask and ours together."""
    layer = nn.Linear(8, 6)
    torch_prune.random_unstructured(layer, "weight", amount=10)
    theirs = layer.weight_mask == 0
    opt = fuseopt.SGD(layer.named_parameters(), lr=0.0, prune=Prune(0.5))
    set_gradients([layer.weight_orig, layer.bias], 1)
    opt.step()
    ours = opt.prune_mask("weight_orig")
    opt.finalize_pruning(layer)
    assert torch.equal(layer.weight_mask == 0, theirs | ours)
    assert sorted(dict(layer.named_parameters())) == ["bias", "weight_orig"]


def test_a_shared_parameter_is_masked_wherever_it_is():
    model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    model[1].weight = model[0].weight
    opt = fuseopt.SGD(model.parameters(), lr=0.0, prune=Prune(0.5))
    set_gradients([model[0].weight], 1)
    opt.step()
    opt.finalize_pruning(model)
    assert model[0].weight_orig is model[1].weight_orig
    assert torch.equal(model[0].weight_mask, model[1].weight_mask) and int(model[0].weight_mask.sum()) == 32


def test_what_finalize_refuses_changes_nothing():
    model, opt = trained(PRUNES["2:4"])
    before = Snapshot(opt)
    with pytest.raises(ValueError, match="does not hold '0.weight'"):
        opt.finalize_pruning(nn.Sequential(nn.Flatten(), model[2]))
    with opt.swap_ema(), pytest.raises(RuntimeError, match="inside swap_ema"):
        opt.finalize_pruning()
    for p, value, *_ in before.params:
        assert_same_bits(p, value)
    assert opt.prune_mask("0.weight") is not None and not torch_prune.is_pruned(model)


def test_a_finalized_optimizer_saves_and_loads(backend):
    model, opt = trained(PRUNES["unstructured"], backend)
    opt.finalize_pruning()
    saved = opt.state_dict()
    assert not any("prune_mask" in state for state in saved["state"].values())
    twin = copy.deepcopy(model)
    other = fuseopt.AdamW([{"params": [p for n, p in twin.named_parameters() if n[0] in "02"]},
                           {"params": list(twin[3].parameters())}], ema=[EMA(0.9), EMA(0.5)], backend=backend)  # fmt: skip
    other.load_state_dict(copy.deepcopy(saved))
    run(opt, list(model.parameters()), 2, 4)
    run(other, list(twin.parameters()), 2, 4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(p, q)


def test_a_group_added_later_is_not_pruned():
    _, opt = trained(PRUNES["unstructured"])
    opt.finalize_pruning()
    opt.add_param_group({"params": [("new", nn.Parameter(torch.randn(4, 4)))]})
    assert opt.param_groups[-1]["prune"] is None


# ---- sparsity ------------------------------------------------------------------------------------


def test_sparsity_of_a_model_and_of_an_optimizer():
    model, opt = trained(PRUNES["2:4"])
    model[0].weight.data[0, 0, 0, 0] = float("nan")  # no zero, wherever it is
    model[3].bias.data[:2] = torch.tensor([0.0, -0.0])
    report = fuseopt.sparsity(model)
    expected = {n: (int((p == 0).sum()), p.numel()) for n, p in model.named_parameters()}
    assert {n: (row.zeros, row.elements) for n, row in report.items()} == expected
    assert report["2.weight"].share == 0.5 and report["2.weight"].name == "2.weight"
    assert report.zeros == sum(z for z, _ in expected.values()) and report.elements == sum(
        n for _, n in expected.values()
    )
    assert report.share == report.zeros / report.elements
    assert dict(fuseopt.sparsity(opt)) == dict(report)
    lines = str(report).splitlines()
    assert lines[0].split() == ["tensor", "zeros", "elements", "share"] and len(lines) == len(report) + 2
    assert lines[-1].split() == ["all", str(report.zeros), f"{report.elements:,}", f"{report.share:.2%}"]


def test_sparsity_without_names_and_of_torchs_optimizer():
    p = nn.Parameter(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    for cls in (fuseopt.SGD, torch.optim.SGD):
        report = fuseopt.sparsity(cls([p], lr=0.1))
        assert [(row.zeros, row.elements) for row in report.values()] == [(3, 4)]
        assert list(report) == ["parameter 0 of group 0"]
    assert fuseopt.sparsity(nn.ReLU()).share == 0.0
    with pytest.raises(TypeError, match="Tensor.*a model or an optimizer"):
        fuseopt.sparsity(p.data)


def test_sparsity_sees_torchs_masks():
    """What torch.nn.utils.prune masks is zero in the forward pass, whatever weight_orig holds."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    torch_prune.l1_unstructured(model[0], "weight", amount=30)
    assert fuseopt.sparsity(model)["0.weight"].zeros == 30
    assert fuseopt.sparsity(model).elements == 48 + 6 + 12 + 2


def test_a_tied_weight_counts_once():
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    assert fuseopt.sparsity(model).elements == 16


# ---- check_n_m -----------------------------------------------------------------------------------


def test_check_n_m_proves_a_pruned_model(backend):
    model, opt = trained(PRUNES["2:4"], backend)
    assert fuseopt.check_n_m(opt) and fuseopt.check_n_m(opt).passed
    assert list(fuseopt.check_n_m(opt)) == ["0.weight", "2.weight"]
    report = fuseopt.check_n_m(model)
    assert not report and report["3.weight"].violations > 0  # it was not to be pruned
    assert (report["0.weight"].violations, report["2.weight"].violations) == (0, 0)
    assert report["0.weight"].groups == 12 * 2 * 9 and report["2.weight"].groups == 16 * 3
    assert str(report).endswith("FAIL: 1 of 3 tensors")
    assert str(fuseopt.check_n_m(opt)).endswith("PASS: every group has its zeros")
    opt.finalize_pruning(model)  # weight_orig and weight_mask
    assert fuseopt.check_n_m(model)["2.weight"].violations == 0


def test_check_n_m_names_the_first_violation():
    model = nn.Sequential(nn.Linear(10, 3, bias=False), nn.Conv2d(6, 2, (1, 2), bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[0].weight[:, :2] = model[0].weight[:, 8:] = 1.0  # of the short group both may stay
        model[1].weight[:, 2:6:2] = 1.0
    assert fuseopt.check_n_m(model)
    with torch.no_grad():
        model[0].weight[2, 4:7] = model[0].weight[1, 5:8] = 1.0
        model[1].weight[1, 0, 0, 1] = model[1].weight[1, 1, 0, 1] = 1.0
    report = fuseopt.check_n_m(model)
    assert not report.passed
    assert (report["0.weight"].violations, report["0.weight"].first) == (2, (1, 4))
    assert (report["1.weight"].violations, report["1.weight"].first) == (1, (1, 0, 0, 1))
    assert "(1, 0, 0, 1)" in str(report)
    assert fuseopt.check_n_m(model, "3:4") and not fuseopt.check_n_m(model, "1:2")


def test_check_n_m_takes_each_groups_own_pattern():
    a, b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
    opt = fuseopt.SGD(
        [{"params": [a], "prune": Prune(pattern="1:4")}, {"params": [b], "prune": Prune(pattern="6:8")}], lr=0.1
    )
    run(opt, [a, b], 1)
    report = fuseopt.check_n_m(opt)
    assert report and [row.pattern for row in report.values()] == ["1:4", "6:8"]
    assert not fuseopt.check_n_m(opt, "1:4")


@pytest.mark.parametrize(
    ("source", "pattern", "error", "message"),
    [
        (lambda: nn.BatchNorm1d(4), None, ValueError, "no nn.Linear or convolution.*nothing to check"),
        (
            lambda: fuseopt.SGD([nn.Parameter(torch.ones(4, 4))], prune=Prune(0.5)),
            None,
            ValueError,
            "no group with an n:m",
        ),
        (lambda: torch.optim.SGD([nn.Parameter(torch.ones(4, 4))]), None, ValueError, "no group with an n:m"),
        (lambda: nn.Linear(4, 4), "4:2", ValueError, "'4:2'.*n < m"),
        (lambda: torch.ones(4, 4), None, TypeError, "Tensor.*a model or an optimizer"),
    ],
)
def test_check_n_m_refuses(source, pattern, error, message):
    with pytest.raises(error, match=message):
        fuseopt.check_n_m(source(), pattern)


def test_a_proven_weight_survives_torchs_conversion():
    """torch.sparse.to_sparse_semi_structured drops nothing of what passed; of what did not pass it does."""
    layer = nn.Linear(64, 32, bias=False).to(BF16)
    opt = fuseopt.AdamW(layer.parameters(), prune=Prune(pattern="2:4"))
    dense = layer.weight.detach().clone()
    run(opt, [layer.weight], 1)
    assert fuseopt.check_n_m(layer) and not _survives(dense)
    assert _survives(layer.weight.detach())


def _survives(dense):
    """Whether torch's compressed form of 2 of every 4, which its conversion makes, holds every value."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    values, meta = sparse_semi_structured_from_dense_cutlass(dense)
    return torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), dense)


def channels_last(opt, p):
    p.data = p.data.to(memory_format=torch.channels_last)


def no_value(opt, p):
    opt.state[p] = {"momentum_buffer": None}


def booleans(opt, p):  # as ZeroRedundancyOptimizer writes a checkpoint's entries
    opt.state[p]["prune_mask"] = torch.zeros(p.shape, dtype=torch.bool)


@pytest.mark.parametrize("pattern", ("unstructured", "2:4", "rows"))
@pytest.mark.parametrize("change", (channels_last, no_value, booleans))
def test_what_lies_still_is_pruned_whatever_the_form_of_its_state(change, pattern, backend):
    still, moved = [nn.Parameter(torch.randn(8, 8, 3, 3)) for _ in range(2)]
    options = Prune(None if ":" in pattern else 0.5, pattern=pattern, begin=2, scope="tensor")
    opt = fuseopt.SGD([still, moved], lr=0.1, momentum=0.9, prune=options, backend=backend)
    for p in (still, moved):
        p.grad = torch.randn_like(p)
    opt.step()
    change(opt, still)
    still.grad = None
    opt.step()
    for p in (still, moved):
        assert opt.prune_mask(p).sum() == (p == 0).sum() == p.numel() // 2


def test_state_of_what_lies_still_is_checked_before_anything_is_written(backend):
    still, moved = [nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    opt = fuseopt.AdamW([still, moved], prune=Prune(0.5, begin=2), backend=backend)
    for p in (still, moved):
        p.grad = torch.randn_like(p)
    opt.step()
    still.grad = None
    opt.state[still]["exp_avg"] = torch.zeros(3)
    before = moved.detach().clone()
    with pytest.raises(ValueError, match="exp_avg.*has shape"):
        opt.step()
    assert torch.equal(moved, before) and opt.state[moved]["step"] == 1
