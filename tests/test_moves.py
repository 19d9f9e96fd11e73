"""What a step knows of the step before must never outlive it: every way in which a tensor can move, by each reader.

The same moves are made to torch's fused AdamW, and parameters and state must stay equal bit for bit.
"""

import copy
import gc
import pickle
import threading

import pytest
import torch
from cases import assert_same_bits, assert_same_state, gradient, parameters
from test_readers import READERS
from torch.nn import Parameter

import fuseopt
from fuseopt import Prune, cpu

SHAPES = [(4, 4), (4, 8), (16,), (2, 4, 2)]  # the second one moves; whole vectors, as torch rounds the rest another way

# ---- ways to move: functions of (optimizer, parameters); `params` stays in step with the groups ----------


def moments(opt, p, change) -> None:
    """Replace p's moments by change(them)."""
    for key in ("exp_avg", "exp_avg_sq"):
        opt.state[p][key] = change(opt.state[p][key])


def new_data(opt, params):
    params[1].data = params[1].data.clone()


def new_data_in_another_order(opt, params):
    params[1].data = params[1].data.t().contiguous().t()
    moments(opt, params[1], lambda m: m.t().contiguous().t())


def data_in_a_bucket(opt, params):
    bucket = torch.full((80,), 7.0)
    params[1].data = bucket[3:35].view(4, 8).copy_(params[1].data)
    opt.state[params[1]]["exp_avg"] = bucket[37:69].view(4, 8).copy_(opt.state[params[1]]["exp_avg"])


def data_of_numpy(opt, params):
    params[1].data = torch.from_numpy(params[1].detach().numpy().copy())


def set_in_place(opt, params):
    with torch.no_grad():
        params[1].set_(params[1].detach().clone())


def storage_freed_and_back(opt, params):
    values, storage = params[1].detach().clone(), params[1].untyped_storage()
    storage.resize_(0)
    blocker = torch.empty(32)  # what was freed goes to someone else
    storage.resize_(4 * 32)
    params[1].data.copy_(values)
    del blocker


def shrunk_at_its_address(opt, params):
    address = params[1].data_ptr()
    params[1].data = params[1].data[:2]
    moments(opt, params[1], lambda m: m[:2])
    assert params[1].data_ptr() == address


def transposed_in_place(opt, params):
    params[1].data = params[1].data.t_()
    for key in ("exp_avg", "exp_avg_sq"):
        opt.state[params[1]][key].t_()


def more_dimensions(opt, params):
    params[1].data = params[1].data.view(2, 2, 1, 2, 1, 4)
    moments(opt, params[1], lambda m: m.view(2, 2, 1, 2, 1, 4))


def to_double(opt, params):
    params[1].data = params[1].data.double()
    moments(opt, params[1], torch.Tensor.double)


def swapped_with_another(opt, params):
    torch.utils.swap_tensors(params[1], Parameter(params[1].detach().clone()))


def lazily_cloned(opt, params):
    opt.kept = torch._lazy_clone(params[1].detach())  # shares memory until one of them is written
    opt.kept_values = torch.full((), 1.0) * params[1].detach()


def state_replaced(opt, params):
    moments(opt, params[1], lambda m: (m * 0.5).clone())
    opt.state[params[1]]["step"] = torch.tensor(9.0)


def state_in_another_order(opt, params):
    state = opt.state[params[1]]
    state["step"] = state.pop("step")
    opt.state[params[0]] = opt.state.pop(params[0])


def state_moments_moved(opt, params):
    for key in ("exp_avg", "exp_avg_sq"):
        state = opt.state[params[1]][key]
        state.set_(state.clone())
        state.data = state.data.clone()


def state_deleted(opt, params):
    del opt.state[params[1]]


def state_entries_of_others(opt, params):
    opt.state[params[1]]["old_p"] = torch.zeros(3)


def groups_reversed(opt, params):
    opt.param_groups[0]["params"].reverse()
    params.reverse()


def one_left_out(opt, params):
    del opt.param_groups[0]["params"][1], params[1]


def one_put_in(opt, params):
    params.insert(1, *parameters([(8, 2)], seed=7))
    opt.param_groups[0]["params"].insert(1, params[1])


def a_group_added(opt, params):
    params += parameters([(32,), (4, 4)], seed=8)
    opt.add_param_group({"params": params[-2:], "lr": 0.3})


def split_into_two_groups(opt, params):
    group = opt.param_groups[0]
    opt.param_groups.append({**group, "params": group["params"][2:], "lr": 0.03})
    del group["params"][2:]


def another_object_at_the_same_id(opt, params):
    """The old parameter, its state and gradient are freed, and a new one of another shape takes its place."""
    del opt.state[params[1]]
    opt.param_groups[0]["params"][1] = params[1] = None
    gc.collect()
    (fresh,) = parameters([(8, 4)], seed=9)
    opt.param_groups[0]["params"][1] = params[1] = fresh


def options_edited(opt, params):
    opt.param_groups[0].update(lr=0.5, betas=[0.5, 0.7], weight_decay=0.2, eps=1e-3, maximize=True)


MOVES = [
    new_data,
    new_data_in_another_order,
    data_in_a_bucket,
    data_of_numpy,
    set_in_place,
    storage_freed_and_back,
    shrunk_at_its_address,
    transposed_in_place,
    more_dimensions,
    to_double,
    swapped_with_another,
    lazily_cloned,
    state_replaced,
    state_in_another_order,
    state_moments_moved,
    state_deleted,
    state_entries_of_others,
    groups_reversed,
    one_left_out,
    one_put_in,
    a_group_added,
    split_into_two_groups,
    another_object_at_the_same_id,
    options_edited,
]


# ---- the test ---------------------------------------------------------------------------------------


def give(params, t, how):
    for k, p in enumerate(params):
        g = torch.empty_like(p).copy_(gradient(p, k, t))
        alike = p.grad is not None and (p.grad.shape, p.grad.stride(), p.grad.dtype) == (p.shape, p.stride(), p.dtype)
        if how == "kept" and alike:  # torch's fused step reads other strides wrongly
            p.grad.copy_(g)
        elif how == "backward":  # no Python object of the gradient exists
            p.grad = None
            (p * g).sum().backward()
        else:
            p.grad = g


ONCE = (more_dimensions, one_left_out, shrunk_at_its_address, new_data_in_another_order)  # the others twice
NOT_LEFT = (one_put_in, groups_reversed, one_left_out, lazily_cloned)  # asking a lazy clone's address would copy it


def move_both(move, pairs) -> list:
    """Make the move; the memory that the second parameter has left, with a copy."""
    left = []
    for opt, params in pairs:
        old = params[1].data
        move(opt, params)
        if move not in NOT_LEFT and old.data_ptr() != params[1].data_ptr():
            left.append((old, old.clone()))
    return left


@pytest.mark.parametrize("how", ("kept", "new", "backward"))
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("move", MOVES, ids=lambda m: m.__name__)
def test_every_way_to_move(move, reader, how, native):
    cpu.connect(native, *READERS[reader]())
    ours, torchs = parameters(SHAPES), parameters(SHAPES)
    a = fuseopt.AdamW(ours, lr=0.1, weight_decay=0.1, backend="cpu")
    b = torch.optim.AdamW(torchs, lr=0.1, weight_decay=0.1, fused=True)
    left = []
    for t in range(1, 8):
        if t == 3 or (t == 6 and move not in ONCE):
            left += move_both(move, [(a, ours), (b, torchs)])
        give(ours, t, how), give(torchs, t, how)
        versions = [p._version for p in ours]
        a.step(), b.step()
        assert_same_state(a, b)
        assert all(p._version > before for p, before in zip(ours, versions, strict=True))
    for memory, copy_of_it in left:
        assert_same_bits(memory, copy_of_it, "memory that the parameter has left")
    if move is lazily_cloned:
        assert_same_bits(a.kept, a.kept_values)


# ---- what comes and goes beside the parameters -------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
def test_masks_and_pruned_bits_appear_between_steps(reader, native):
    cpu.connect(native, *READERS[reader]())
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(params, lr=0.1, prune=Prune(0.5, begin=5), backend="cpu")
    keep = torch.zeros(4, 8, dtype=torch.bool)
    keep[1] = True
    for t in range(1, 8):
        if t in (3, 6):
            opt.mask(params[1], keep if t == 3 else ~keep)
        frozen = {3: ~keep, 4: ~keep, 5: ~keep, 6: keep, 7: keep}.get(t)
        before = params[1].detach().clone()
        give(params, t, "backward")
        opt.step()
        if frozen is None:
            assert (params[1] != before).all()
            continue
        assert_same_bits(params[1][frozen], before[frozen])
        free = ~frozen & (params[1] != 0)
        assert free.any() and (params[1][free] != before[free]).all()
        if t >= 5:
            pruned = [opt.prune_mask(p) for p in (params[0], params[1], params[3])]
            assert sum(int(m.sum()) for m in pruned) == 32
            assert all((p[m] == 0).all() for p, m in zip((params[0], params[1], params[3]), pruned, strict=True))
    del opt.state[params[0]]["prune_mask"]
    give(params, 8, "new")
    opt.step()
    assert (params[0] != 0).all()


@pytest.mark.parametrize("way", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))), ids=("deepcopy", "pickle"))
def test_a_copy_of_an_optimizer_steps_its_own_tensors(way, native):
    params = parameters(SHAPES)
    opt = fuseopt.AdamW(params, lr=0.1, backend="cpu")
    give(params, 1, "new"), opt.step()
    other = way(opt)
    copies = other.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    give(copies, 2, "new"), other.step()
    for p, b in zip(params, before, strict=True):
        assert_same_bits(p, b)
    give(params, 2, "new"), opt.step()
    assert_same_state(opt, other)


def test_threads_step_an_optimizer_each(native):
    def train(seed, results):
        params = parameters(SHAPES * 5, seed=seed)
        opt = fuseopt.AdamW(params, lr=0.1, max_grad_norm=1.0, backend="cpu")
        for t in range(1, 30):
            give(params, t, ("kept", "new", "backward")[t % 3])
            opt.step()
        results[seed] = opt

    alone, together = {}, {}
    for seed in range(3):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        assert_same_state(alone[seed], together[seed])
