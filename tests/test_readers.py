"""The three ways in which the compiled module reads a tensor: at offsets found at import, by torch's C functions,
through Python."""

import subprocess
import sys

import pytest
import torch
from cases import (
    F32,
    ONE_EACH,
    STAGE,
    all_params,
    assert_same_bits,
    assert_same_state,
    ident,
    parameters,
    run,
)

import fuseopt
from fuseopt import cpu, plan, torch_abi, torch_layout


class Wrapped(torch.Tensor):
    """A subclass that has no storage of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    __torch_dispatch__ = classmethod(lambda cls, f, types, args=(), kwargs=None: NotImplemented)


READERS = {  # what the compiled module is told: torch's C functions and the offset of a tensor's handle, its layout
    "raw": lambda: (*torch_abi.find(), torch_layout.find()),
    "functions": lambda: (*torch_abi.find(), []),
    "python": lambda: ([], -1, []),
}


@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_all_readers_give_the_same_bits(rule, native, monkeypatch):
    """The compiled module reads tensors at known offsets, by torch's C interface, or through Python."""
    shapes = [(33, 31), (), (0, 3), (40_000,), (3, 5, 2, 2), (2, 1, 2, 1, 2, 3)]
    results, calls = [], []
    describe = torch_abi.describe
    monkeypatch.setattr(torch_abi, "describe", lambda t: (calls.append(t), describe(t))[1])
    for reader in READERS.values():
        cpu.connect(native, *reader())
        params = parameters(shapes)
        params[4] = torch.nn.Parameter(params[4].detach().contiguous(memory_format=torch.channels_last))
        results.append(run(STAGE["everything"].build(rule, params, F32, backend="cpu"), params))
    assert calls, "the fallback was not used"
    assert_same_state(results[0], results[1])
    assert_same_state(results[0], results[2])


@pytest.mark.parametrize("reader", ("raw", "functions"))
def test_the_fast_reader_is_used(reader, native, monkeypatch):
    """With this torch the fallbacks must not be what runs."""
    functions, offset, layout = READERS[reader]()
    assert functions and offset > 0 and (layout or reader != "raw")

    def describe(t):
        raise AssertionError("read through Python")

    monkeypatch.setattr(torch_abi, "describe", describe)
    cpu.connect(native, functions if reader == "functions" else [0] * len(functions), offset, layout)
    (p,) = parameters([(5,)])  # read by functions at address 0 it would crash
    run(fuseopt.AdamW([p], backend="cpu"), [p], 2)
    assert all_params(fuseopt.AdamW([p]))


@pytest.mark.parametrize("reader", READERS)
def test_the_readers_refuse_alike(reader, native):
    """Integers, other devices, sparse and complex tensors: an error either way, not a wrong address."""
    cpu.connect(native, *READERS[reader]())
    for p in (
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.int64),
        torch.ones(3, device="meta"),
        torch.ones(3, dtype=torch.float8_e4m3fn),
    ):
        p.grad = torch.ones_like(p)
        opt = fuseopt.SGD([("w", p)], lr=0.1, backend="cpu")
        with pytest.raises((TypeError, ValueError), match="w"):
            opt.step()
    p = torch.nn.Parameter(torch.ones(3))
    for g in (torch.ones(3).to_sparse(), Wrapped(torch.ones(3))):
        p.grad = g
        with pytest.raises((TypeError, ValueError), match="w"):
            fuseopt.SGD([("w", p)], lr=0.1, backend="cpu").step()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("which", ("parameter", "gradient", "exp_avg"))
def test_freed_storage_is_refused(which, reader, native):
    """FSDP frees the storage of what it does not need; there is nothing to step."""
    cpu.connect(native, *READERS[reader]())
    params = parameters([(3, 5), (4, 6)])
    opt = fuseopt.AdamW([(f"w{k}", p) for k, p in enumerate(params)], lr=0.1, backend="cpu")
    run(opt, params, 1)
    p = params[1]
    {"parameter": p, "gradient": p.grad, "exp_avg": opt.state[p]["exp_avg"]}[which].untyped_storage().resize_(0)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="w1.*storage.*freed"):
        opt.step()
    assert_same_bits(params[0], before)


def test_a_layout_that_is_not_found_is_not_used(native, monkeypatch):
    """Where a torch differs, every field that cannot be found switches the raw reader off, not the package."""
    assert torch_layout.find()
    for name in ("IMPL", "STORAGE", "AUTOGRAD"):
        with monkeypatch.context() as patch:
            patch.setattr(torch_layout, name, 16)
            assert torch_layout.find() == []
    monkeypatch.setitem(torch_layout.SCALAR_TYPES, torch.bfloat16, 99)
    assert torch_layout.find() == []


def test_inference_tensors_have_no_version(native):
    """They are stepped and have no version to bump, which torch's function would refuse."""
    with torch.inference_mode():
        p = torch.ones(16)
        p.grad = torch.ones(16)
        opt = fuseopt.SGD([p], lr=0.25, backend="cpu")
        opt.step()
    opt.step()
    assert (p == 0.5).all()


@pytest.mark.parametrize("reader", READERS)
def test_gradients_are_held_until_the_pass_is_over(reader, native):
    """The pass runs without the interpreter's lock, so another thread may drop a gradient meanwhile."""
    cpu.connect(native, *READERS[reader]())
    p = torch.nn.Parameter(torch.zeros(1000))
    opt = fuseopt.SGD([p], lr=1.0)
    (p * 3).sum().backward()
    (group,) = plan.Step(opt, 1, 1.0).groups
    table = native.TensorTable()
    assert not table.gather([cpu.spec(group, [p], (), (), ())], opt.state, {}, 1.0)
    p.grad = None
    taken = [torch.full((1000,), 9.0) for _ in range(8)]
    table.run(-1.0, False)
    assert (p == -3).all() and taken
    table.release()


def test_versions_are_bumped_without_torchs_function(native, monkeypatch):
    """Its name is not part of torch's C interface; where it is missing, Python bumps."""
    _, *rest = torch_abi.more_functions()
    monkeypatch.setattr(torch_abi, "more_functions", lambda: [0, *rest])
    cpu.connect(native, *READERS["raw"]())
    p, q = parameters([(16,), (16,)])
    opt = fuseopt.SGD([p, q], lr=1.0)
    p.grad = torch.ones(16)
    before = p._version, q._version
    opt.step()
    assert p._version > before[0] and q._version == before[1]


@pytest.mark.parametrize("default", ("set_default_dtype(torch.float64)", "set_default_device('meta')"))
def test_the_layout_is_found_whatever_torchs_defaults(default):
    """fuseopt may be imported after them, and would be slower for good."""
    code = f"import torch; torch.{default}; from fuseopt import torch_abi, torch_layout; print(len(torch_layout.find()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(torch_layout.find()) > 0
