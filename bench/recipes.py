"""The same step as separate torch passes, as users write it: masks, clip, optimizer, prune, average."""

import torch
from case import EMA_DECAY, Case, Data
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from variants import STREAMS, Variant, torch_optimizer


class LerpAverage:
    """An EMA as it is written by hand, in fp32: the first update copies, then one torch._foreach_lerp_."""

    def __init__(self, params: list[Tensor]):
        self.params, self.tensors = params, []

    def update(self) -> None:
        values = [p.detach().float() for p in self.params]  # themselves where they are fp32
        if self.tensors:
            torch._foreach_lerp_(self.tensors, values, 1 - EMA_DECAY)
        else:
            self.tensors = [value.clone() for value in values]

    def averages(self) -> list[Tensor]:
        return self.tensors


class SwaAverage:
    """An EMA by torch.optim.swa_utils.AveragedModel."""

    def __init__(self, params: list[Tensor]):
        self.model = torch.nn.ParameterList(params)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))

    def update(self) -> None:
        self.averaged.update_parameters(self.model)

    def averages(self) -> list[Tensor]:
        return [p.detach() for p in self.averaged.parameters()]


class Restore:
    """Holds masked entries still: a copy before the step, put back after it. 24 bytes an element, 21 with booleans."""

    def __init__(self, params: list[Tensor], held: list[Tensor]):
        self.params, self.held = params, held
        self.saved = [torch.empty_like(p) for p in params]

    def save(self) -> None:
        torch._foreach_copy_(self.saved, self.params)

    def put_back(self) -> None:
        if self.held[0].is_floating_point():
            torch._foreach_lerp_(self.params, self.saved, self.held)  # exact at weights 0 and 1
            return
        for p, saved, held in zip(self.params, self.saved, self.held, strict=True):
            torch.where(held, saved, p, out=p)


class Masks:
    """Zeroes what is masked or pruned, by masks of floats or of booleans, an element each."""

    def __init__(self, case: Case, data: Data, kind: str):
        dtype = case.dtype if kind == "float" else torch.bool
        self.floats = kind == "float"
        chosen = (data.effective, ~data.pruned) if self.floats else (~data.effective, data.pruned)
        self.gradient, self.alive = ([t.to(dtype, copy=True) for t in data.split(flat)] for flat in chosen)
        self.held = [t.to(dtype) for t in data.split(~data.keep)]

    def apply(self, tensors: list[Tensor], masks: list[Tensor]) -> None:
        if self.floats:
            torch._foreach_mul_(tensors, masks)
        else:
            for t, drop in zip(tensors, masks, strict=True):
                t.masked_fill_(drop, 0)


def full(case: Case, data: Data, kind: str, flavour: str, swa: bool = False, freezes: bool = False) -> Variant:
    """A full case: mask the gradients, clip, step, restore if frozen, prune, average. kind: of the masks."""
    params, masks = data.parameters(), Masks(case, data, kind)
    opt = torch_optimizer(case, params, flavour)
    average = (SwaAverage if swa else LerpAverage)(params)
    restore = Restore(params, masks.held) if freezes else None

    @torch.no_grad()
    def step() -> None:
        masks.apply([p.grad for p in params], masks.gradient)
        clip_grad_norm_(params, data.max_grad_norm, foreach=True)
        if restore:
            restore.save()
        opt.step()
        if restore:
            restore.put_back()
        masks.apply(params, masks.alive)
        average.update()

    def held() -> list[Tensor]:
        return masks.gradient + masks.alive + (masks.held + restore.saved if restore else [])

    streams, _ = STREAMS[case.rule, flavour]
    mask = 12 if kind == "float" else 9  # bytes an element: a tensor read and written, its mask read
    back = (mask + 12) * freezes  # a copy, then p, its copy and the mask read and p written
    total = case.elements * (mask + 4 + 8 + 4 * streams + back + mask + 12)
    passes = f"bytes: mask {mask}, norm 4, scale 8, step {4 * streams}, restore {back}, prune {mask}, EMA 12"
    optimizer = "AdamW" if flavour == "default" else f"AdamW({flavour}=True)"
    name, family = f"{kind} masks, {optimizer}, {'AveragedModel' if swa else 'lerp EMA'}", f"{kind} masks"
    if freezes:
        name, family = f"{name}, restored", f"{family}, restored"
    return Variant(name, family, params, opt, step, lambda: total, passes, average.averages, held, freezes, True)


def averaged(case: Case, data: Data, flavour: str) -> Variant:
    """An EMA case: step, then an average in fp32 of a copy in fp32."""
    params = data.parameters()
    opt, average = torch_optimizer(case, params, flavour), LerpAverage(params)

    def step() -> None:
        opt.step()
        average.update()

    streams, _ = STREAMS[case.rule, flavour]
    total = case.elements * (2 * streams + 6 + 12)
    passes = f"bytes: step {2 * streams}, copy in fp32 6, EMA 12"
    name = f"AdamW{'' if flavour == 'default' else f'({flavour}=True)'}, fp32 lerp EMA"
    return Variant(name, "recipe", params, opt, step, lambda: total, passes, average.averages)
