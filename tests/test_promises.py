"""The promises, bit for bit: frozen and pruned entries, skipped and refused steps, same inputs same bits."""

import io

import pytest
import torch
from cases import (
    BY_NAME,
    DTYPES,
    F32,
    ONE_EACH,
    RULES,
    STAGE,
    Snapshot,
    Stage,
    all_params,
    assert_same_bits,
    assert_same_state,
    bits,
    element_mask,
    gradient,
    ident,
    like,
    parameters,
    run,
    set_gradients,
)

import fuseopt
from fuseopt import EMA, Prune

SHAPES = [(33, 31), (70,), (3, 5, 2, 2), (), (0, 3), (17, 1025)]
EVERYTHING = ("everything", "everything-sparsity")

# ---- 1, 2: what is frozen or pruned ---------------------------------------------------------------


@pytest.mark.parametrize("prune", (Prune(0.5, begin=2), Prune(threshold=0.6, begin=2), Prune(0.5, begin=2, moments="keep")),
                         ids=("sparsity", "threshold", "keep"))
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_frozen_is_frozen_and_pruned_is_zero(rule, dtype, prune, backend):
    """Ten steps with decay, momentum, Nesterov, amsgrad, maximize, clipping, L1; momentum in the buffers first."""
    p = parameters([(20, 33)], dtype)[0]
    opt = rule.ours([p], max_grad_norm=5.0, l1=0.01, prune=prune, ema=EMA(0.9), backend=backend)
    run(opt, [p], 3)
    keep = element_mask(p)
    opt.mask(p, keep)
    slots = opt.slots(opt.param_groups[0])
    before = [p.detach().clone(), *(opt.state[p][key].clone() for key in slots)]
    first = opt.prune_mask(p)
    run(opt, [p], 7, 4)
    pruned = opt.prune_mask(p)
    assert (pruned | ~first).all() and 0 < int(pruned.sum()) < p.numel()
    for now, old in zip([p, *(opt.state[p][key] for key in slots)], before, strict=True):
        assert_same_bits(now[~keep], old[~keep])
    assert not bits(p)[pruned].any() and not bits(opt.state[p]["ema_0"])[pruned].any()
    if prune.moments == "zero":
        for key in slots:
            assert not bits(opt.state[p][key])[pruned].any()
    if dtype == F32:
        assert (p[keep & ~pruned] != before[0][keep & ~pruned]).all()


# ---- 3, 5: skipped and refused steps ----------------------------------------------------------------


def _sparse(p):
    p.grad = torch.sparse_coo_tensor(torch.zeros(p.dim(), 1, dtype=torch.long), torch.ones(1), p.shape)


def _shape(p):
    p.grad = torch.ones(2, 2)
    p.data = torch.ones(3, 3)


def _dtype(p):
    p.data = p.data.double()


FAULTS = {
    "sparse-gradient": (lambda opt, p: _sparse(p), "gradient.*sparse"),
    "gradient-shape": (lambda opt, p: _shape(p), r"\(2, 2\).*\(3, 3\)"),
    "gradient-dtype": (lambda opt, p: _dtype(p), "float32.*float64"),
    "moment-shape": (lambda opt, p: opt.state[p].update(exp_avg=torch.zeros(7)), r"exp_avg.*\(7,\)"),
    "moment-dtype": (lambda opt, p: opt.state[p].update(exp_avg=torch.zeros(2, 2).double()), "exp_avg.*float64"),
    "moment-type": (lambda opt, p: opt.state[p].update(exp_avg=3.0), "exp_avg.*float"),
    "average-dtype": (lambda opt, p: opt.state[p].update(ema_0=torch.zeros(2, 2).half()), "ema_0.*float16"),
    "counter": (lambda opt, p: opt.state[p].update(step=torch.zeros(2)), "step.*one"),
    "moment-device": (lambda opt, p: opt.state[p].update(exp_avg=torch.zeros(2, 2, device="meta")), "exp_avg.*meta"),
    "prune-mask-size": (lambda opt, p: opt.state[p].update(prune_mask=torch.zeros(0, dtype=torch.uint8)), "prune_mask"),
    "mask-dtype": (lambda opt, p: opt.state[p].update(mask_keep=torch.zeros(4)), "mask_keep"),
}


@pytest.mark.parametrize("when", ("first", "later"))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_refused_changes_nothing(fault, when, backend):
    """The faulty parameter is the last; the first is good, and has state to lose or none yet."""
    breaks, message = FAULTS[fault]
    good, bad = parameters([(33, 31), (2, 2)])
    opt = fuseopt.AdamW([("stem", good), ("head", bad)], max_grad_norm=1.0, prune=Prune(threshold=0.1), ema=EMA(0.5),
                        statistics=True, backend=backend)
    if when == "later":
        opt.mask(bad, torch.tensor([[True], [False]]))
        run(opt, [good, bad], 2)
    set_gradients([good, bad], 3)
    breaks(opt, bad)
    before = Snapshot(opt)
    statistics = opt._statistics
    with pytest.raises((ValueError, TypeError), match=message) as error:
        opt.step()
    assert "'head'" in str(error.value) or "head" in str(error.value)
    before.assert_unchanged()
    assert opt._statistics is statistics


def test_a_gradient_on_another_device_is_refused(backend):
    p = parameters([(3,)])[0]
    q = torch.nn.Parameter(torch.ones(3, device="meta"))
    opt = fuseopt.SGD([("w", p), ("head", q)], lr=0.1, backend=backend)
    p.grad, q.grad = torch.ones(3), torch.ones(3, device="meta")
    before = p.detach().clone()
    with pytest.raises(ValueError, match="on meta.* on cpu"):
        opt.step()
    assert_same_bits(p, before)
    assert not opt.state


def test_a_closure_that_raises_changes_nothing(backend):
    p = parameters([(3, 3)])[0]
    opt = run(fuseopt.AdamW([p], backend=backend), [p], 1)
    before = Snapshot(opt)
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    before.assert_unchanged()


def test_a_closure_runs_once_with_gradients_and_gives_its_loss(backend):
    p = parameters([(3, 3)])[0]
    opt = fuseopt.SGD([p], lr=0.1, backend=backend)
    calls = []

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert opt.step(closure) is calls[0] and len(calls) == 1


# ---- 4: same inputs, same bits ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", EVERYTHING)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_instruction_sets_and_threads_give_the_same_bits(rule, dtype, stage, native):
    stage = STAGE[stage]
    runs = []
    for name in ("portable", "avx2", "avx512"):
        for threads in (1, 2) if name != "avx2" else (2,):
            if not native.set_instruction_set(name):
                continue
            torch.set_num_threads(threads)
            params = parameters(SHAPES, dtype)
            opt = run(stage.build(rule, params, dtype, backend="cpu"), params)
            runs.append((opt, dict(opt.statistics()) if opt.defaults["statistics"] else None))
    assert len(runs) >= 2
    for opt, statistics in runs[1:]:
        assert_same_state(opt, runs[0][0])
        assert statistics == runs[0][1]


@pytest.mark.parametrize("rule", RULES, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_the_unmasked_loops_of_all_instruction_sets_agree(rule, dtype, native):
    """Without masks other loops run. Values at the ends of the range: subnormal, huge, infinite, NaN."""
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 6e-8, 65504.0, 3e38, torch.inf, -torch.inf, torch.nan])
    opts = []
    for name in ("portable", "avx2", "avx512"):
        if native.set_instruction_set(name):
            params = parameters([(33, 31), (40_000,)], dtype)
            params[1].data[:100] = special.to(dtype).repeat(10)
            opt = rule.ours(params, backend="cpu")
            for t in (1, 2):
                set_gradients(params, t)
                params[1].grad[:100] = special.to(dtype).repeat_interleave(10)
                opt.step()
            opts.append(opt)
    for opt in opts[1:]:
        for p, q in zip(all_params(opt), all_params(opts[0]), strict=True):
            for x, y in [(p, q)] + [(opt.state[p][k], opts[0].state[q][k]) for k in opt.state.get(p, {})]:
                assert torch.equal(x.isnan(), y.isnan())  # which NaN it is, is left open
                assert_same_bits(x.detach().nan_to_num(0.5), y.detach().nan_to_num(0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_where_tensors_lie_in_memory_changes_no_bit(rule, dtype, backend):
    """Parameters and gradients as views into one buffer, in reverse, at odd offsets."""
    stage = Stage("", {"max_grad_norm": 0.5, "l1": 0.01, "ema": EMA(0.9), "prune": Prune(0.5, begin=2)}, "freeze")
    plain = parameters(SHAPES, dtype)
    sizes = [p.numel() + 3 for p in plain]
    buffers = [torch.zeros(sum(sizes) + 1, dtype=dtype) for _ in range(2)]
    views, at = [], 1
    for p in reversed(plain):
        view = buffers[0][at : at + p.numel()].view(p.shape)
        view.copy_(p.detach())
        views.insert(0, torch.nn.Parameter(view))
        at += p.numel() + 3
    a, b = stage.build(rule, plain, dtype, backend=backend), stage.build(rule, views, dtype, backend=backend)
    for t in (1, 2, 3):
        run(a, plain, 1, t)
        at = 2
        for k, p in enumerate(views):
            p.grad = buffers[1][at : at + p.numel()].view(p.shape)
            p.grad.copy_(gradient(p, k, t))
            at += p.numel() + 1
        b.step()
    assert_same_state(a, b)
    edges = torch.ones(len(buffers[0]), dtype=torch.bool)
    at = 1
    for p in reversed(plain):
        edges[at : at + p.numel()] = False
        at += p.numel() + 3
    assert not buffers[0][edges].any(), "a store went past the end of a parameter"


def test_running_twice_gives_the_same_bits(backend):
    for rule in ONE_EACH:
        first, second = parameters(SHAPES), parameters(SHAPES)
        a = run(STAGE["everything-sparsity"].build(rule, first, F32, backend=backend), first)
        b = run(STAGE["everything-sparsity"].build(rule, second, F32, backend=backend), second)
        assert_same_state(a, b)


def test_selection_does_not_depend_on_threads(native):
    """Ties by the thousand across blocks."""
    masks = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        params = [torch.nn.Parameter((p.detach() * 4).round() / 4) for p in parameters([(300, 200), (500, 77)])]
        opt = fuseopt.SGD(params, lr=0.0, prune=Prune(0.637), backend="cpu")
        run(opt, params, 1)
        masks.append([opt.prune_mask(p) for p in params])
    for other in masks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(masks[0], other, strict=True))


# ---- what a step writes, and what it never does -----------------------------------------------------


@pytest.mark.parametrize("stage", ("unscale", "mask-freeze", "mask-grad", "clip", "l1", *EVERYTHING))
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_gradients_are_never_written(rule, stage, backend):
    params = parameters(SHAPES)
    opt = STAGE[stage].build(rule, params, F32, backend=backend)
    for t in (1, 2, 3):
        set_gradients(params, t)
        before = Snapshot(opt)
        opt.step()
        before.assert_gradients_unchanged()


def test_versions_tell_what_was_stepped(backend):
    """Only what had a gradient; autograd then notices a graph whose weights have changed."""
    p, q, r = parameters([(3, 3), (3, 3), (0, 3)])
    opt = fuseopt.AdamW([p, q, r], backend=backend)
    for steps in (1, 2):
        versions = p._version, q._version
        loss = (torch.ones(3, 3, requires_grad=True) @ p).sum()
        p.grad = torch.ones(3, 3)
        opt.step()
        assert p._version > versions[0] and q._version == versions[1] == 0
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


def test_step_counts_belong_to_parameters(backend):
    p, q = parameters([(3,), (3,)])
    opt = fuseopt.AdamW([p, q], backend=backend)
    run(opt, [p], 3)
    q.grad, p.grad = torch.ones(3), None
    opt.step()
    assert opt.state[p]["step"] == 3 and opt.state[q]["step"] == 1
    assert opt.param_groups[0]["steps"] == 4


def test_a_tensor_that_requires_no_gradient_but_has_one_is_stepped(backend):
    p = torch.ones(5)
    p.grad = torch.ones(5)
    opt = fuseopt.SGD([p], lr=0.5, backend=backend)
    opt.step()
    assert (p == 0.5).all()


def test_distributed_checkpoint_may_make_state_with_an_empty_step(backend):
    """torch.distributed.checkpoint steps with lr 0 and zero gradients: nothing the user has must change."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(6, 6)
    opt = fuseopt.AdamW(model.named_parameters(), weight_decay=0.1, ema=EMA(0.5), prune=Prune(0.5), backend=backend)
    before = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, opt)
    for p, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(p, old)
    assert opt.param_groups[0]["steps"] == 0
    assert opt.state[model.bias].keys() == {"step", "exp_avg", "exp_avg_sq", "ema_0"}
    twin = torch.nn.Linear(6, 6)
    twin.load_state_dict(model.state_dict())
    other = fuseopt.AdamW(twin.named_parameters(), weight_decay=0.1, ema=EMA(0.5), prune=Prune(0.5), backend=backend)
    run(opt, list(model.parameters())), run(other, list(twin.parameters()))
    assert_same_state(opt, other)


def test_a_first_step_with_lr_zero_is_a_step(backend):
    """A warm-up from 0 counts, as soon as a gradient is not zero."""
    p = parameters([(4, 4)])[0]
    opt = fuseopt.AdamW([p], lr=0.0, prune=Prune(0.5), backend=backend)
    run(opt, [p], 1)
    assert opt.param_groups[0]["steps"] == 1 and opt.state[p]["step"] == 1 and int((p == 0).sum()) == 8


# ---- a steady step allocates nothing ----------------------------------------------------------------


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any torch operation makes within the block, in bytes."""

    largest = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("size", (1000, 100_000))
@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_a_steady_step_allocates_nothing(rule, size, native):
    """No tensor is made, and what Python makes does not grow with the parameters."""
    import tracemalloc

    params = parameters([(size // 10, 10), (7,)])
    opt = Stage("", {"max_grad_norm": 0.5, "l1": 0.01, "ema": EMA(0.9), "statistics": True, "prune": Prune(threshold=0.1)}, "freeze").build(
        rule, params, F32, backend="cpu"
    )
    run(opt, params, 3)
    set_gradients(params, 4)
    with Allocations() as made:
        opt.step()
    assert made.largest <= 64, f"a tensor of {made.largest} bytes was made"
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        opt.step()
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 20_000, f"{peak} bytes of Python objects"


def test_the_heap_does_not_grow_with_steps(native):
    """What malloc has handed out, C++ included, is the same after many steps as after a few."""
    import ctypes

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(n, ctypes.c_size_t) for n in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]]

    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("the C library has no mallinfo2")
    mallinfo.restype = Mallinfo2
    used = lambda: (lambda m: m.uordblks + m.hblkhd)(mallinfo())
    params = parameters([(64,)] * 200)
    opt = STAGE["everything"].build(BY_NAME["adamw"], params, F32, backend="cpu")
    run(opt, params, 3)
    before = used()
    for _ in range(200):
        opt.step()
    assert used() - before < 200 * 64, "at least 64 bytes a step are lost"


def test_masks_are_saved_as_booleans_not_expanded(backend):
    """Readable by anyone, and by any number of processes: pruned entries in full, a row mask as its rows."""
    p = parameters([(1000, 100)])[0]
    opt = fuseopt.SGD([p], lr=0.1, prune=Prune(0.5), backend=backend)
    rows = torch.arange(1000)[:, None] % 3 > 0
    opt.mask(p, rows)
    run(opt, [p], 1)
    state = opt.state_dict()["state"][0]
    assert torch.equal(state["mask_keep"], rows) and state["mask_freeze"] is True
    assert torch.equal(state["prune_mask"], (p == 0) & opt.prune_mask(p)) and int(state["prune_mask"].sum()) == 50_000
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    assert len(file.getvalue()) < 100_000 + 1000 + 10_000


def test_copies_share_nothing(backend):
    p = parameters([(8, 8)])
    a = run(fuseopt.AdamW(p, ema=EMA(0.5), backend=backend), p, 1)
    q = like(p)
    b = run(fuseopt.AdamW(q, ema=EMA(0.5), backend=backend), q, 1)
    assert all(
        a.state[p[0]][k].data_ptr() != b.state[q[0]][k].data_ptr() for k in ("exp_avg", "exp_avg_sq", "ema_0", "step")
    )
