"""Names for messages, and the checks that come before the first write."""

import torch
from torch import Tensor

from . import schema
from .distributed import is_dtensor, local, placed_alike
from .stages import mask


def name_of(opt, p: Tensor) -> str:
    """How messages call a parameter: its own name, or its place."""
    for k, group in enumerate(opt.param_groups):
        for i, q in enumerate(group["params"]):
            if q is p:
                names = group.get("param_names")
                return repr(names[i]) if names else f"parameter {i} of group {k}"
    return "a parameter"


def find(opt, param: Tensor | str) -> tuple[dict, Tensor, str]:
    """(group, parameter, name) of a parameter given itself or by name. Raises ValueError if it has none."""
    for group in opt.param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for p, name in zip(group["params"], names, strict=True):
            if p is param or (isinstance(param, str) and name == param):
                return group, p, name_of(opt, p)
    if isinstance(param, str):
        raise ValueError(unknown_name(opt, param))
    raise ValueError("this tensor is not a parameter of the optimizer; add it with add_param_group first")


def unknown_name(opt, name: str, more: str = "") -> str:
    """The message for a name that no parameter has."""
    names = [n for group in opt.param_groups for n in group.get("param_names") or ()]
    if not names:
        return (
            f"no parameter is named {name!r}, as the optimizer was given no names; build it from "
            "model.named_parameters(), or give the parameter itself"
        )
    return f"no parameter is named {name!r}{more}; names are {', '.join(map(repr, names[:3]))}, ..."


def check_devices(opt) -> None:
    """Raise TypeError unless all parameters are tensors, ValueError unless they lie on one device."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"{p!r} in a group's 'params' is not a tensor; remove it")
        if opt.defaults["sharded"] and is_dtensor(p):
            raise ValueError(f"{name_of(opt, p)} is a DTensor, which knows its parts itself; leave out sharded=True")
        if p.device != params[0].device:
            raise ValueError(
                f"{name_of(opt, p)} is on {p.device}, {name_of(opt, params[0])} on {params[0].device}; "
                "give each device an optimizer of its own"
            )


class Name:
    """The name of a parameter for a message, looked up only if the message is needed."""

    def __init__(self, opt, p: Tensor):
        self.opt, self.p = opt, p

    def __str__(self) -> str:
        return name_of(self.opt, self.p)


def check(opt, slots: tuple, counters: tuple, emas: tuple, p: Tensor, g: Tensor | None) -> None:
    """Raise TypeError or ValueError if p cannot be stepped with gradient g (None: only with its state)."""
    name, whole = Name(opt, p), p
    if is_dtensor(p) and any(x.is_partial() for x in p.placements):
        raise ValueError(f"{name} has placements {p.placements}; redistribute it to Shard or Replicate first")
    p, state = local(p), opt.state.get(p, {})
    if p.dtype not in schema.DTYPES:
        kinds = ", ".join(str(d).removeprefix("torch.") for d in schema.DTYPES)
        raise TypeError(f"{name} has dtype {p.dtype}; fuseopt steps {kinds}: convert it or use torch.optim for it")
    if g is not None and is_dtensor(g) != is_dtensor(whole):
        kinds = [type(x).__name__ for x in (g, whole)]
        raise TypeError(
            f"the gradient of {name} is a {kinds[0]}, the parameter a {kinds[1]}; make both DTensors or none"
        )
    for x in (p, None if g is None else local(g)):
        if x is not None and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            kind = type(x).__name__
            raise TypeError(f"{name} is {kind}, which has no storage of its own; step the tensors it is made of")
    if p.layout != torch.strided:
        raise ValueError(f"{name} has layout {p.layout}; fuseopt steps dense tensors: convert it with to_dense()")
    if p.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values; move it to a real one with to_empty()")
    if not apart(p):
        raise ValueError(
            f"{name} of shape {tuple(p.shape)} with strides {tuple(p.stride())} has several entries at one place in "
            "memory, as an expanded view has; pass the tensor that it is a view of, or a clone()"
        )
    if opt.defaults["backend"] == "cpu" and p.device.type != "cpu":
        raise ValueError(f"{name} is on {p.device} and backend='cpu' was asked for; move it, or leave backend out")
    check_memory(name, "", p)
    if g is not None:
        check_gradient(name, whole, g)
    for key in slots + emas + counters:
        check_state(name, whole, key, state.get(key), key in counters, key in emas)
    check_state(name, whole, "mask_score", state.get("mask_score"), False, True)
    mask.check_state(name, p, state)


def check_memory(name: Name, what: str, x: Tensor) -> None:
    """Raise ValueError if the storage of x, which is `what` of a parameter, was freed under it."""
    if x.numel() and x.layout == torch.strided and not x.untyped_storage().nbytes():
        raise ValueError(f"{what}{name} has no memory: its storage was freed; resize and fill it before step()")


def check_gradient(name: Name, p: Tensor, g: Tensor) -> None:
    """Raise ValueError or TypeError unless g is a dense gradient of p's shape, dtype and device."""
    if g.layout != torch.strided:
        raise ValueError(f"the gradient of {name} is {g.layout}; fuseopt takes dense ones (sparse=False in the layer)")
    if g.shape != p.shape:
        raise ValueError(f"the gradient of {name} has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}")
    if g.dtype != p.dtype:
        raise TypeError(f"the gradient of {name} has dtype {g.dtype}, the parameter {p.dtype}; convert one of them")
    if g.device != p.device:
        raise ValueError(f"the gradient of {name} is on {g.device}, the parameter on {p.device}; move one of them")
    check_memory(name, "the gradient of ", g)


def check_state(name: Name, p: Tensor, key: str, value, is_counter: bool, is_ema: bool) -> None:
    """Raise ValueError or TypeError unless a state entry, where there is one, fits the parameter."""
    if value is None:
        return
    remedy = "delete it from the optimizer's state to start it afresh"
    if not isinstance(value, Tensor):
        raise TypeError(f"state {key!r} of {name} is {type(value).__name__}, not a tensor; {remedy}")
    if is_counter:
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"state {key!r} of {name} must be one fp32 or fp64 number; {remedy}")
        return
    if value.shape != p.shape:
        raise ValueError(f"state {key!r} of {name} has shape {tuple(value.shape)}, not {tuple(p.shape)}; {remedy}")
    if not placed_alike(p, value):
        raise ValueError(f"state {key!r} of {name} is not spread over the processes as the parameter is; {remedy}")
    expected = schema.compute_dtype(p.dtype) if is_ema else p.dtype
    if value.dtype != expected:
        raise TypeError(f"state {key!r} of {name} has dtype {value.dtype}, not {expected}; convert it, or {remedy}")
    if value.device != p.device:
        raise ValueError(f"state {key!r} of {name} is on {value.device}, not {p.device}; move it, or {remedy}")
    check_memory(name, f"state {key!r} of ", value)


def apart(p: Tensor) -> bool:
    """Whether no two entries of p share memory, so far as its strides tell: each skips what lies within it."""
    reach = 0
    for stride, size in sorted((p.stride(d), p.shape[d]) for d in range(p.dim()) if p.shape[d] > 1):
        if stride <= reach and p.numel():
            return False
        reach += stride * (size - 1)
    return True


def share_memory(tensors: list[Tensor]) -> bool:
    """Whether the memory that one of them spans, gaps and all, overlaps another's."""
    spans = []
    for x in tensors:
        if x.numel():
            reach = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
            spans.append((x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()))
    spans.sort()
    return any(begin < end for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))


def in_layout(p: Tensor, x: Tensor) -> bool:
    """Whether x fills its memory, without gaps, in the order of p's dimensions."""
    a, b = local(x), local(p)
    if a.is_contiguous() and b.is_contiguous():  # as mostly
        return True
    form = torch.empty_like(b, device="meta")
    return all(i == j or n <= 1 for i, j, n in zip(a.stride(), form.stride(), a.shape, strict=True)) or a.numel() == 0


def in_layout_of(p: Tensor, x: Tensor) -> Tensor:
    """x itself if it lies so, as state does, otherwise a copy that does."""
    if in_layout(p, x):
        return x
    with torch.no_grad():
        return torch.empty_like(p, dtype=x.dtype).copy_(x)
