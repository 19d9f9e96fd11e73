"""One optimizer step as a user writes it: a torch.optim class, and a separate pass for everything else.

All of it in float64, and none of it from the rest of fuseopt: a wrong formula there must not verify itself.
"""

import functools
import inspect

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Lion as its paper's algorithm 2 prints it (Chen et al. 2023); torch has no such class."""

    def __init__(self, params, lr, betas, weight_decay, maximize):
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        )

    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                g = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                direction = torch.sign(beta1 * m + (1 - beta1) * g)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * direction)
                m.mul_(beta2).add_(g, alpha=1 - beta2)


MOMENTS = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.NAdam: ("exp_avg", "exp_avg_sq"),
    torch.optim.Adagrad: ("sum",),
    Lion: ("exp_avg",),
}
COUNTERS = ("step", "mu_product")
# How the copy runs is its own affair; it always runs torch's plain loop.
NOT_COPIED = ("foreach", "fused", "capturable", "differentiable")


def options_of(opt, group: dict) -> dict:
    """The options of a parameter group as plain numbers: an lr that is a tensor may change under our feet."""
    plain = {}
    for name, value in group.items():
        if name == "betas":
            value = tuple(float(beta) for beta in value)
        plain[name] = float(value) if isinstance(value, Tensor) else value
    if "initial_accumulator_value" in plain:  # torch starts every group from the constructor's
        plain["initial_accumulator_value"] = opt.defaults["initial_accumulator_value"]
    return plain


def is_decoupled(kind: type, options: dict) -> bool:
    """Whether weight decay, and L1 with it, acts on the weights and not on the gradient."""
    return kind in (torch.optim.AdamW, Lion) or bool(options.get("decoupled_weight_decay"))


@functools.cache
def parameters_of(kind: type) -> list[str]:
    """The names of the options that the copy passes on to its class."""
    return [name for name in inspect.signature(kind).parameters if name not in (*NOT_COPIED, "params")]


def rule(
    kind: type, options: dict, p: Tensor, g: Tensor, moments: dict, counters: dict
) -> tuple[Tensor, dict, dict]:
    """(p, moments, counters) after a step of torch.optim's `kind`, with both forms of L1 and of decay.

    Moments and counters are empty before a parameter's first step: torch makes them.
    """
    own = {name: options[name] for name in parameters_of(kind) if name in options}
    lr, l1, decoupled = options["lr"], options.get("l1", 0.0), is_decoupled(kind, options)

    p = p.clone()
    if l1 and not decoupled:
        penalty = l1 * torch.sign(p)
        g = g - penalty if options["maximize"] else g + penalty
    if decoupled and kind in (torch.optim.SGD, torch.optim.Adagrad):  # torch has only the coupled form
        p.mul_(1 - lr * options["weight_decay"])
        own["weight_decay"] = 0.0

    optimizer = kind([p], **own)
    p.grad = g
    if moments:
        state = {name: value.clone() for name, value in (moments | counters).items()}
        if options.get("amsgrad"):
            state.setdefault("max_exp_avg_sq", torch.zeros_like(p))
        optimizer.state[p] = state
    optimizer.step()

    state = optimizer.state[p]
    if l1 and decoupled:
        p = torch.nn.functional.softshrink(p, lr * l1)
    made = {name: state[name] for name in MOMENTS[kind] if state.get(name) is not None}
    return p, made, {name: state[name] for name in COUNTERS if name in state}


def unscale_and_mask(grad: Tensor, grad_scale: float, keep: Tensor | None) -> Tensor:
    """What torch.amp.GradScaler.unscale_ and p.grad[~keep] = 0 leave."""
    g = grad.double() / grad_scale
    if keep is not None:
        g[~keep] = 0
    return g


def total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of float64 gradients together. torch's own adds up in another order, at 18 units of roundoff."""
    squares = [g.square().sum() for g in grads]
    return torch.stack(squares).sum().sqrt() if squares else torch.tensor(0.0, dtype=torch.float64)


def clip_coefficient(max_grad_norm: float | None, total_norm: Tensor) -> float:
    """What torch.nn.utils.clip_grad_norm_ multiplies by."""
    if not max_grad_norm:
        return 1.0
    return float(torch.clamp(max_grad_norm / (total_norm + 1e-6), max=1.0))


def ema_update(options: dict, t: int) -> int | None:
    """The number (from 1) of the update of an average that step t (from 1) makes; None where it makes none."""
    number, rest = divmod(t - options["start"], options["every"])
    return number if rest == 0 and number >= 1 else None


def ema_decay(options: dict, number: int) -> float:
    """The decay of an average at its update of this number, as the classes and papers print it."""
    warmup, decay = options["warmup"], options["decay"]
    if warmup is None:
        return decay
    if warmup == "swa":  # torch.optim.swa_utils.get_swa_avg_fn: e + (p - e) / (num_averaged + 1)
        return 1 - 1 / number
    if warmup == "edm2":  # phema.power_function_beta in NVlabs/edm2
        return (1 - 1 / number) ** (edm2_exponent(options["sigma_rel"]) + 1)
    step = max(0, number - 1)  # timm.utils.ModelEmaV3.get_decay, diffusers.training_utils.EMAModel.get_decay
    if step <= 0:
        return 0.0
    grown = 1 - (1 + step) ** -(2 / 3) if warmup == "timm" else (1 + step) / (10 + step)
    return max(min(grown, decay), 0.0)


def edm2_exponent(sigma_rel: float) -> float:
    """The gamma whose power function has this relative width, by bisection."""
    low, high = 0.0, 1.0
    width = lambda gamma: (gamma + 1) ** 0.5 * (gamma + 2) ** -1 * (gamma + 3) ** -0.5  # noqa: E731
    while width(high) > sigma_rel:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma_rel else (low, middle)
    return low


def sparsity_at(options: dict | None, t: int) -> float | None:
    """The sparsity to prune to after step t; None at steps that do not select."""
    if options is None or options["threshold"] is not None:
        return None
    begin, end, final = options["begin"], options["end"], options["sparsity"]
    if n_of_m(options):  # at every step that acts
        acts = t == begin if end is None else begin <= t <= end and (t - begin) % options["every"] == 0
        return 1 - n_of_m(options)[0] / n_of_m(options)[1] if acts else None
    if options["schedule"] == "once" or end is None or end == begin:
        return final if t == begin else None
    if t < begin or t > end or (t - begin) % options["every"] != 0:
        return None
    progress = (t - begin) / (end - begin)
    if options["schedule"] == "linear":
        return final * progress
    return final + (0.0 - final) * (1 - progress) ** 3


def n_of_m(options: dict) -> tuple[int, int] | None:
    """(2, 4) of the pattern "2:4"; None of others."""
    n, colon, m = options["pattern"].partition(":")
    return (int(n), int(m)) if colon else None


def lets_go(options: dict | None, t: int) -> bool:
    """Whether step t frees what is pruned before it updates."""
    return options is not None and options["regrow"] and sparsity_at(options, t) is not None


def threshold_at(options: dict | None, t: int) -> float:
    """The magnitude below which step t prunes; 0 where there is none."""
    holds = options is not None and options["threshold"] is not None and t >= options["begin"]
    return options["threshold"] if holds else 0.0


def is_prunable(p: Tensor) -> bool:
    return p.requires_grad and p.dim() >= 2
