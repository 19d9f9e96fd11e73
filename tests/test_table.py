"""What a step works on: sizes, layouts, moved storage, replaced state, groups that come late."""

import copy

import pytest
import torch
from cases import (
    ALL_SIZES,
    BF16,
    BY_NAME,
    F32,
    F64,
    ONE_EACH,
    STAGE,
    TRAJECTORY,
    Stage,
    assert_close,
    assert_same_bits,
    assert_same_state,
    gradient,
    ident,
    like,
    parameters,
    run,
)

import fuseopt
from fuseopt import EMA, Prune


@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_one_huge_and_a_thousand_tiny(rule, native):
    """Together in one table each ends as it does alone."""
    shapes = [(3,)] * 400 + [(300, 700)] + [(1,), (), (0,), (33,)] * 100
    together = parameters(shapes)
    alone = like(together)
    run(rule.ours(together, backend="cpu"), together, 2)
    for k in [0, 7, 399, 400, 401, 402, 403, 404, 799]:
        opt = rule.ours([alone[k]], backend="cpu")
        for t in (1, 2):
            alone[k].grad = gradient(alone[k], k, t)
            opt.step()
        assert_same_bits(together[k], alone[k], f"parameter {k}")


@pytest.mark.parametrize("shape", ALL_SIZES, ids=str)
def test_nothing_is_written_past_the_end(shape, backend):
    for stage in ("everything", "clip"):
        for dtype in (F32, BF16):
            n = torch.Size(shape).numel()
            buffer = torch.full((n + 64,), 7.0, dtype=dtype)
            p = torch.nn.Parameter(buffer[32 : 32 + n].view(shape))
            start = p.detach().clone()
            opt = STAGE[stage].build(BY_NAME["adam"], [p], dtype, backend=backend)
            run(opt, [p], 2)
            assert (buffer[:32] == 7).all() and (buffer[32 + n :] == 7).all()
            assert n == 0 or stage != "clip" or dtype != F32 or (p != start).all()


def memory(p: torch.Tensor, how: str) -> torch.nn.Parameter:
    """A parameter with p's values that lies in memory in another order."""
    if how == "channels_last":
        return torch.nn.Parameter(p.detach().contiguous(memory_format=torch.channels_last))
    order = {"transposed": (3, 2, 1, 0), "permuted": (1, 3, 0, 2)}[how]
    back = [order.index(d) for d in range(4)]
    return torch.nn.Parameter(p.detach().permute(order).contiguous().permute(back))


@pytest.mark.parametrize("gradients", ("own", "row-major", "strided", "expanded"))
@pytest.mark.parametrize("how", ("channels_last", "transposed", "permuted"))
@pytest.mark.parametrize("name", ("adamw-amsgrad-maximize", "sgd-nesterov", "lion"))
def test_memory_order_changes_no_bit(name, how, gradients, backend):
    """Parameters that lie in another order, gradients in the same or yet another; masks, pruning with ties."""
    rule = BY_NAME[name]
    (plain,) = parameters([(6, 5, 7, 4)])
    plain.data = (plain.data * 8).round() / 8
    other = memory(plain, how)
    assert not other.is_contiguous()
    stage = Stage("", {"l1": 0.01, "ema": EMA(0.9), "prune": Prune(0.5, begin=1)}, "freeze")
    a, b = stage.build(rule, [plain], F32, backend=backend), stage.build(rule, [other], F32, backend=backend)
    for t in (1, 2, 3):
        g = gradient(plain, 0, t)
        if gradients == "expanded":
            g = g[:, :1].expand(6, 5, 7, 4)
        plain.grad = g.contiguous()
        if gradients == "own":
            other.grad = memory(g, how).detach()
        elif gradients == "strided":
            other.grad = torch.zeros(6, 5, 7, 8)[..., ::2].copy_(g)
        else:
            other.grad = g
        a.step(), b.step()
        assert_same_bits(other, plain)
        assert torch.equal(a.prune_mask(plain), b.prune_mask(other))
        for key in (*a.slots(a.param_groups[0]), "ema_0"):
            assert_same_bits(b.state[other][key], a.state[plain][key], key)
            assert b.state[other][key].stride() == other.stride()


@pytest.mark.parametrize("sparsity", (0.05, 0.3, 0.55, 0.8))
@pytest.mark.parametrize("scope", ("global", "tensor"))
def test_ties_in_any_memory_order(sparsity, scope, backend):
    """Nearly all magnitudes tie, in weights that lie in different orders beside each other."""
    plain = parameters([(6, 5, 7, 4), (40, 50), (8, 3, 33, 31), (70, 9)])
    for p in plain:
        p.data = p.data.round()
    hows = ("channels_last", None, "permuted", None)
    others = [memory(p, how) if how else like([p])[0] for p, how in zip(plain, hows, strict=True)]
    options = {"lr": 0.5, "prune": Prune(sparsity, scope=scope), "backend": backend}
    a, b = fuseopt.SGD(plain, **options), fuseopt.SGD(others, **options)
    for opt in (a, b):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        opt.step()
    sizes = [p.numel() for p in plain]
    expected = [round(sparsity * n) for n in (sizes if scope == "tensor" else [sum(sizes)])]
    assert sum(int(b.prune_mask(p).sum()) for p in others) == sum(expected)
    for p, q in zip(plain, others, strict=True):
        assert torch.equal(a.prune_mask(p), b.prune_mask(q))
        assert_same_bits(q, p)


def test_memory_order_and_the_norm(backend):
    """The norm's sum follows memory, so here by tolerance."""
    (plain,) = parameters([(6, 5, 7, 4)], F64)
    other = memory(plain, "channels_last")
    a, b = (fuseopt.SGD([p], lr=0.1, max_grad_norm=0.1, backend=backend) for p in (plain, other))
    run(a, [plain]), run(b, [other])
    assert_close(other, plain, TRAJECTORY[F64])


SLICES = {
    "columns": lambda x: x[:, ::2],
    "rows-of-transposed": lambda x: x.t()[3:, 1::3],
    "corner": lambda x: x[20:, 10:45],
    "one-column": lambda x: x[:, 7:8],
    "channels-last": lambda x: x.view(2, 20, 5, 12).permute(0, 3, 1, 2)[:, ::2],
    "none": lambda x: x[:0, ::2],
}


@pytest.mark.parametrize("how", SLICES)
@pytest.mark.parametrize("stage", ("everything", "everything-sparsity", "ema", "statistics"))
@pytest.mark.parametrize("name", ("adamw-amsgrad-maximize", "sgd-momentum", "nadam", "lion"))
@pytest.mark.filterwarnings("ignore:the checkpoint does not hold all")  # of an empty parameter there are no bits
def test_slices_are_stepped_as_dense_copies_are(name, stage, how, backend):
    """Only the slice is written; the rest of the tensor that it is a part of keeps its bits."""
    (base,) = parameters([(40, 60)])
    whole = base.detach().clone()
    p = torch.nn.Parameter(SLICES[how](base.data))
    inside = SLICES[how](torch.arange(2400).view(40, 60)).flatten()
    q = torch.nn.Parameter(torch.empty_like(p).copy_(p))
    a, b = (STAGE[stage].build(BY_NAME[name], [x], F32, backend=backend) for x in (p, q))
    for t in range(1, 5):
        version = p._version
        run(a, [p], 1, t), run(b, [q], 1, t)
        assert_same_state(a, b)
        assert p._version > version and p.data_ptr() == SLICES[how](base.data).data_ptr()
    outside = torch.ones(2400, dtype=torch.bool)
    outside[inside] = False
    assert_same_bits(base.data.flatten()[outside], whole.flatten()[outside])
    if stage in ("everything", "statistics"):
        assert a.statistics() == b.statistics()
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    run(a, [p], 1, 5), run(b, [q], 1, 5)
    assert_same_state(a, b)


def test_slices_and_whole_tensors_in_one_group(backend):
    """Half of a tensor, the other half, and a tensor of its own end as three tensors do; the norm is of all."""
    x, y = parameters([(30, 8), (9, 9)])
    parts = [torch.nn.Parameter(x.data[:, ::2]), y, torch.nn.Parameter(x.data[:, 1::2])]
    apart = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in parts]
    for params in (parts, apart):
        run(fuseopt.AdamW(params, max_grad_norm=0.1, ema=EMA(0.9), backend=backend), params)
    for p, q in zip(parts, apart, strict=True):
        assert_same_bits(p, q)


def test_a_gradient_at_the_wrong_stride_by_hand(backend):
    """torch's fused CPU step reads it in memory order and is silently wrong."""
    p = torch.nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.arange(12.0).reshape(4, 3).t()
    fuseopt.SGD([p], lr=1.0, backend=backend).step()
    assert torch.equal(p.detach(), -torch.arange(12.0).reshape(4, 3).t())


# ---- things that move between steps -----------------------------------------------------------------


@pytest.mark.parametrize("rule", ONE_EACH, ids=ident)
def test_storage_may_move_at_every_step(rule, backend):
    """SAM, EMA swaps and FSDP put p.data elsewhere; the old memory must not be touched."""
    p, q = parameters([(33, 31)])[0], parameters([(33, 31)])[0]
    a, b = (STAGE["everything"].build(rule, [x], F32, backend=backend) for x in (p, q))
    for t in range(1, 5):
        old = p.data
        p.data = p.data.clone()
        copy = old.clone()
        for key, value in a.state.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                a.state[p][key] = value.clone()
        run(a, [p], 1, t), run(b, [q], 1, t)
        assert_same_bits(old, copy)
    assert_same_state(a, b)


def test_state_is_live(backend):
    """Entries that are edited, replaced or removed count from the next step on."""
    p, q = parameters([(40,)])[0], parameters([(40,)])[0]
    a, b = (run(BY_NAME["adam"].ours([x], backend=backend), [x], 2) for x in (p, q))
    a.state[p]["exp_avg"] = torch.zeros(40)
    b.state[q]["exp_avg"].zero_()
    run(a, [p], 1, 3), run(b, [q], 1, 3)
    assert_same_bits(p, q)
    del a.state[p]
    fresh = like([p])
    c = BY_NAME["adam"].ours(fresh, backend=backend)
    run(a, [p], 1, 4), run(c, fresh, 1, 4)
    assert_same_bits(p, fresh[0])
    a.state[p]["step"] = torch.tensor(7.0, dtype=F64)
    run(a, [p], 1, 5)
    assert a.state[p]["step"] == 8


def test_parameters_may_be_exchanged_in_their_group(backend):
    p, q = parameters([(5,), (6,)])
    opt = run(BY_NAME["sgd-nesterov"].ours([p], backend=backend), [p], 1)
    before = p.detach().clone()
    opt.param_groups[0]["params"][0] = q
    run(opt, [q], 1)
    assert_same_bits(p, before)
    assert "momentum_buffer" in opt.state[q]


def test_options_may_change_between_steps(backend):
    """Momentum, amsgrad, EMA, L1 and clipping switched on later; betas from a list, as checkpoints give them."""
    p, q = parameters([(40,)])[0], parameters([(40,)])[0]
    a, b = fuseopt.SGD([p], lr=0.1, backend=backend), fuseopt.SGD([q], lr=0.1, momentum=0.9, backend=backend)
    a.param_groups[0]["momentum"] = 0.9
    run(a, [p]), run(b, [q])
    assert_same_bits(p, q)
    opt = fuseopt.AdamW([p], backend=backend)
    run(opt, [p], 1)
    opt.param_groups[0].update(amsgrad=True, betas=[0.5, 0.9], l1=0.1, max_grad_norm=0.5)
    opt.param_groups[0]["ema"] = [{"decay": 0.5, "warmup": None}]
    run(opt, [p], 1, 2)
    assert_same_bits(opt.state[p]["ema_0"], p.detach())
    assert opt.state[p]["max_exp_avg_sq"].any()


def test_groups_may_come_late(backend):
    """The new group shares schedule and norm, and has options of its own."""
    p, q = parameters([(10, 10), (10, 10)])
    opt = fuseopt.AdamW([p], lr=0.1, ema=EMA(0.5), prune=Prune(0.5, begin=4), backend=backend)
    run(opt, [p], 2)
    opt.add_param_group({"params": [q], "lr": 0.5, "prune": Prune(0.2, begin=4), "ema": None})
    assert opt.param_groups[1]["steps"] == 2 and opt.param_groups[1]["ema"] == []
    run(opt, [p, q], 2, 3)
    assert opt.state[p]["step"] == 4 and opt.state[q]["step"] == 2
    assert int((p == 0).sum()) == 50 and int((q == 0).sum()) == 20
    assert "ema_0" not in opt.state[q]


def test_new_and_old_state_in_one_group(backend):
    p, q = parameters([(5,), (6,)])
    opt = run(BY_NAME["sgd-momentum"].ours([p, q], backend=backend), [p], 2)
    alone = like([q])
    single = BY_NAME["sgd-momentum"].ours(alone, backend=backend)
    for k, x in ((1, q), (1, alone[0])):
        x.grad = gradient(x, k, 3)
    opt.step(), single.step()
    assert_same_bits(q, alone[0])


def test_none_gradients_and_nothing_to_do(backend):
    p = parameters([(5,)])[0]
    opt = fuseopt.AdamW([p], max_grad_norm=1.0, statistics=True, ema=EMA(0.5), backend=backend)
    before = p.detach().clone()
    opt.step()
    assert_same_bits(p, before)
    assert not opt.state
    opt.add_param_group({"params": []})
    run(opt, [p], 1)


def test_mixed_dtypes_in_one_group(backend):
    params = [parameters([(33, 5)], dtype)[0] for dtype in (F32, BF16, F64, torch.float16)]
    alone = like(params)
    rule = BY_NAME["adamw"]
    run(rule.ours(params, backend=backend), params)
    for k, p in enumerate(alone):
        opt = rule.ours([p], backend=backend)
        for t in range(1, 4):
            p.grad = gradient(p, k, t)
            opt.step()
        assert_same_bits(p, params[k])


def test_schedulers_drive_it(backend):
    p, q = parameters([(20,)])[0], parameters([(20,)])[0]
    ours = fuseopt.SGD([p], lr=0.1, momentum=0.9, backend=backend)
    torchs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=12) for o in (ours, torchs)]
    for t in range(1, 11):
        run(ours, [p], 1, t), run(torchs, [q], 1, t)
        for s in schedules:
            s.step()
    assert_close(p, q, (2e-6, 2e-6))


class Named(torch.nn.Parameter):
    """A subclass with plain storage."""


class Wrapped(torch.Tensor):
    """A subclass that has no storage of its own, as DTensor has none."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        return f(*plain[0], **plain[1])


def test_subclasses_with_plain_storage_are_stepped(backend):
    p, q = Named(torch.ones(9)), torch.nn.Parameter(torch.ones(9))
    run(BY_NAME["adam"].ours([p], backend=backend), [p]), run(BY_NAME["adam"].ours([q], backend=backend), [q])
    assert_same_bits(p.data, q.data)


def test_subclasses_without_storage_are_refused(native):
    good = parameters([(3, 3)])[0]
    p = Wrapped(torch.ones(3, 3))
    p.grad = Wrapped(torch.ones(3, 3))
    good.grad = torch.ones(3, 3)
    opt = fuseopt.AdamW([good, p], backend="cpu")
    before = good.detach().clone()
    with pytest.raises((TypeError, ValueError), match="(?s)parameter 1 .*Wrapped"):
        opt.step()
    assert_same_bits(good, before)
    assert not opt.state


# ---- memory that changes under the masks, and objects that are not what they seem -----------------


@pytest.mark.parametrize("start", [torch.contiguous_format, torch.channels_last])
def test_masks_follow_a_change_of_memory_format(start, backend):
    conv = torch.nn.Conv2d(3, 4, 3, bias=False).to(memory_format=start)
    opt = fuseopt.SGD(conv.parameters(), lr=1.0, momentum=0.9, prune=Prune(0.3), backend=backend)
    keep = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    keep[0] = keep[:, 0] = keep[2, :, 1] = True
    opt.mask(conv.weight, keep)
    before, pruned = conv.weight.detach().clone(), None
    for form in (start, torch.channels_last, torch.contiguous_format, torch.channels_last):
        conv.to(memory_format=form)
        conv.weight.grad = torch.ones_like(conv.weight)
        opt.step()
        pruned = opt.prune_mask(conv.weight) if pruned is None else pruned
        assert torch.equal(conv.weight[~keep], before[~keep])
        assert torch.equal(opt.prune_mask(conv.weight), pruned)
        assert int(pruned.sum()) == round(0.3 * 108) and not (pruned & ~keep).any()
        assert (conv.weight[pruned] == 0).all() and (conv.weight[keep & ~pruned] != before[keep & ~pruned]).all()
        saved = opt.state_dict()
        assert "mask_order" not in saved["state"][0], "a checkpoint is row-major"
        other = torch.nn.Conv2d(3, 4, 3, bias=False)
        again = fuseopt.SGD(other.parameters(), lr=1.0, momentum=0.9, prune=Prune(0.3), backend=backend)
        again.load_state_dict(saved)
        assert torch.equal(again.prune_mask(other.weight), pruned)


def test_a_gradient_that_is_made_on_request_is_held_for_the_step():
    class Fleeting(torch.nn.Parameter):
        grad = property(lambda self: torch.full_like(self.data, 3.0))

    p = Fleeting(torch.zeros(100_000))
    fuseopt.SGD([p], lr=1.0).step()
    assert (p == -3).all()


def test_params_may_be_replaced_by_a_tuple_and_must_be_tensors(backend):
    p = torch.nn.Parameter(torch.ones(3))
    opt = fuseopt.SGD([p], lr=1.0, backend=backend)
    p.grad = torch.ones(3)
    opt.param_groups[0]["params"] = (p,)
    opt.step()
    assert (p == 0).all()
    opt.param_groups[0]["params"] = [p, None]
    with pytest.raises(TypeError, match="None in a group's 'params' is not a tensor"):
        opt.step()
    assert (p == 0).all()
