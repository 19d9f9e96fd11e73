"""fuseopt.integrations: what is imported when, accelerate's wrapper, timm's registry."""

import dataclasses
import importlib
import pickle
import subprocess
import sys
import types
from importlib.machinery import PathFinder

import pytest
import torch
from torch import nn
from weights import same

import fuseopt
from fuseopt.integrations import unwrap

LIBRARIES = ("transformers", "accelerate", "lightning", "pytorch_lightning", "timm", "peft", "trl", "datasets")


# ---- imports ---------------------------------------------------------------------------------------


def test_fuseopt_imports_none_of_them():
    code = f"import sys, fuseopt, fuseopt.integrations; print([n for n in {LIBRARIES} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module, packages", [
    ("transformers", ["transformers"]),
    ("lightning", ["lightning", "lightning.pytorch", "pytorch_lightning"]),
    ("timm", ["timm"]),
])  # fmt: skip
def test_a_missing_library_is_named_with_its_remedy(module, packages, monkeypatch):
    monkeypatch.delitem(sys.modules, f"fuseopt.integrations.{module}", raising=False)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    said = rf"fuseopt.integrations.{module} needs {module}, .*{packages[-1]}.*: pip install {module}, or 'fuseopt\[integrations\]'"
    with pytest.raises(ImportError, match=said):
        importlib.import_module(f"fuseopt.integrations.{module}")


def test_a_library_that_lacks_another_says_which(monkeypatch):
    monkeypatch.delitem(sys.modules, "fuseopt.integrations.timm", raising=False)
    for name in [n for n in sys.modules if n.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    if PathFinder.find_spec("timm") is None:
        pytest.skip("needs timm (pip install --no-deps timm)")
    with pytest.raises(ImportError, match="needs timm, which cannot be imported .*torchvision"):
        importlib.import_module("fuseopt.integrations.timm")


# ---- accelerate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ema": fuseopt.EMA(0.5)}])
def test_accelerates_scaler_steps_and_skips_as_with_torch_fused(options, accelerate_afresh):
    """AcceleratedOptimizer round-trips the state_dict and, to scale, replaces `step` on the instance."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    made = []
    for cls, extra in ((fuseopt.AdamW, options), (torch.optim.AdamW, {"fused": True})):
        p = nn.Parameter(torch.ones(5))
        inner = cls([p], lr=0.1, **extra)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
        trace = []
        for gradient in (2.0, float("inf"), 3.0):
            scaler.scale((p * gradient).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            trace += [p.detach().clone(), torch.tensor([optimizer.step_was_skipped, scaler.get_scale()])]
        made.append((inner, trace))
        assert unwrap(optimizer) is inner and torch.equal(trace[0], trace[2]) and not torch.equal(trace[2], trace[4])
    (ours, trace), (_, expected) = made
    assert same(trace, expected)
    assert float(next(iter(ours.state.values()))["step"]) == 2 and "step" not in vars(pickle.loads(pickle.dumps(ours)))


def test_a_gradient_scaler_leaves_the_gradients_to_the_step():
    p = nn.Parameter(torch.ones(5))
    optimizer, scaler = fuseopt.AdamW([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((p * 2).sum()).backward()
    scaler.step(optimizer)
    assert p.grad.tolist() == [8.0] * 5  # it was not unscaled before
    assert optimizer.state[p]["exp_avg"].tolist() == pytest.approx([0.2] * 5)
    assert not optimizer._step_supports_amp_scaling  # as torch's, where fused=True was not passed
    assert fuseopt.AdamW([p], fused=True)._step_supports_amp_scaling


# ---- timm ------------------------------------------------------------------------------------------


@pytest.fixture
def optim(monkeypatch):
    """timm.optim with fuseopt registered. timm asks for torchvision; its optimizers do without."""
    for name in [n for n in sys.modules if n.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "fuseopt.integrations.timm", raising=False)
    found = PathFinder.find_spec("timm")
    if found is None:
        pytest.skip("needs timm (pip install --no-deps timm)")
    folder = found.submodule_search_locations[0]
    for name, path in (("timm", folder), ("timm.models", f"{folder}/models")):  # packages without their contents
        package = types.ModuleType(name)
        package.__path__ = [path]
        monkeypatch.setitem(sys.modules, name, package)
    sys.modules["timm.models"].group_parameters = None
    before = set(sys.modules)
    importlib.import_module("fuseopt.integrations.timm")
    yield sys.modules["timm.optim"]
    for name in set(sys.modules) - before:
        del sys.modules[name]


NAMES = ["adamw", "adam", "nadam", "sgd", "momentum", "adagrad", "lion"]


@pytest.mark.parametrize("name", NAMES)
def test_timm_makes_the_same_optimizer_as_its_own(optim, name):
    made = []
    for prefix in ("fuseopt-", ""):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2))
        optimizer = optim.create_optimizer_v2(model, opt=prefix + name, lr=0.1, weight_decay=0.05)
        for _ in range(3):
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append((model, optimizer))
    (ours, fused), (theirs, plain) = made
    assert type(fused).__module__.startswith("fuseopt") and type(plain).__module__.startswith(("torch", "timm"))
    assert type(fused).__name__ == type(plain).__name__
    for a, b in zip(fused.param_groups, plain.param_groups, strict=True):
        assert {key: a[key] for key in b.keys() & a.keys() - {"params"}} == {
            key: b[key] for key in b.keys() & a.keys() - {"params"}
        }
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_timm_passes_fuseopts_options(optim):
    model = nn.Linear(3, 2)
    optimizer = optim.create_optimizer_v2(
        model, opt="fuseopt-adamw", lr=0.1, weight_decay=0.1, betas=(0.8, 0.9), foreach=True, ema=fuseopt.EMA(0.9)
    )
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.1]
    assert all(
        g["ema"] == [dataclasses.asdict(fuseopt.EMA(0.9))] and g["betas"] == (0.8, 0.9) for g in optimizer.param_groups
    )


def test_timm_lists_every_class(optim):
    listed = optim.list_optimizers("fuseopt-*")
    assert {optim.get_optimizer_class(name, bind_defaults=False) for name in listed} == set(fuseopt.rules.ALL)
    assert listed == sorted(f"fuseopt-{name}" for name in NAMES)


def test_timm_takes_an_underscore_for_its_own(optim):
    """Why the names have a hyphen: timm reads what follows the last underscore."""
    made = optim.create_optimizer_v2(nn.Linear(3, 2), opt="fuseopt_adamw", lr=0.1)
    assert type(made) is torch.optim.AdamW


def test_timms_lookahead_goes_around_it(optim):
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = optim.create_optimizer_v2([p], opt="lookahead_fuseopt-adamw", lr=0.1)
    assert type(optimizer) is optim.Lookahead
    for _ in range(12):  # two of its synchronisations
        p.grad = torch.ones_like(p)
        optimizer.step()
    q = nn.Parameter(torch.ones(2, 2))
    own = optim.create_optimizer_v2([q], opt="lookahead_adamw", lr=0.1)
    for _ in range(12):
        q.grad = torch.ones_like(q)
        own.step()
    torch.testing.assert_close(p, q)
