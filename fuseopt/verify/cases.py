"""What `fuseopt verify` sweeps: rules, stages, dtypes; the tensors, masks and gradients that it feeds them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

import fuseopt
from fuseopt import EMA, Prune

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 3
HALF = 2  # the step after which all is saved and loaded
LARGE = 0.19  # see gradient()
SCALE = 1024.0  # of the loss, in the stages that unscale
SKIPPED = 2  # the step that found_inf skips in those stages

# Loops take 16 entries at once, mask bits come in words of 32, threads take blocks of 16384: each has a tail here.
# The second lies in memory as channels_last.
SHAPES = ((131, 127), (6, 5, 7, 5), (1031,), ())


# ---- rules ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """groups: options of the parameter groups, which differ in more than numbers; all are non-zero somewhere.

    forms: of weight decay, the rule's own first. fused: torch has a fused CPU kernel of it, whose bits are promised.
    """

    cls: type
    groups: tuple[dict, ...]
    common: dict = field(default_factory=dict)
    forms: tuple[str, ...] = ("coupled", "decoupled")
    fused: bool = True

    @property
    def name(self) -> str:
        return self.cls.__name__.lower()


_adam = (
    {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-3, "weight_decay": 0.01},
    {"lr": 0.05, "betas": (0.3, 0.9), "eps": 1e-4, "weight_decay": 0.02, "amsgrad": True, "maximize": True},
)
RULES = (
    Rule(fuseopt.AdamW, _adam, forms=("decoupled",)),
    Rule(fuseopt.Adam, _adam),
    Rule(
        fuseopt.SGD,
        (
            {"lr": 0.2, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01, "maximize": True},
            {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
            {"lr": 0.25, "weight_decay": 0.015},
        ),
    ),
    Rule(
        fuseopt.NAdam,
        (
            {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-3, "momentum_decay": 0.01, "weight_decay": 0.01},
            {
                "lr": 0.05,
                "betas": (0.6, 0.9),
                "eps": 1e-4,
                "momentum_decay": 0.05,
                "weight_decay": 0.02,
                "maximize": True,
            },
        ),
        fused=False,
    ),
    Rule(
        fuseopt.Adagrad,
        (
            {"lr": 0.1, "lr_decay": 0.05, "eps": 1e-3, "weight_decay": 0.01},
            {"lr": 0.2, "lr_decay": 0.1, "eps": 1e-4, "weight_decay": 0.02, "maximize": True},
        ),
        {"initial_accumulator_value": 0.1},
    ),
    Rule(
        fuseopt.Lion,
        (
            {"lr": 0.02, "betas": (0.9, 0.98), "weight_decay": 0.01},
            {"lr": 0.05, "betas": (0.6, 0.9), "weight_decay": 0.02, "maximize": True},
        ),
        forms=("decoupled",),
        fused=False,
    ),
)


# ---- stages -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """what: for people. decay: the form of weight decay; None: none; "own": the rule's; "each": a group of each form.

    options: constructor's. clips: max_grad_norm, of half the gradient's norm. mask: its mode. scaler: the gradients
    are scaled, and found_inf skips a step.
    """

    name: str
    what: str
    options: dict = field(default_factory=dict)
    decay: str | None = "own"
    clips: bool = False
    mask: str | None = None
    scaler: bool = False


_mean = EMA(warmup="swa", start=1)
_timm = EMA(0.999, warmup="timm")
_several = [
    EMA(0.9),
    EMA(0.99, warmup="diffusers", start=-1, every=2),
    EMA(warmup="edm2", sigma_rel=0.1, dtype="parameter"),
]
_global = Prune(0.4, begin=1, end=STEPS)
STAGES = (
    Stage("plain", "the rule alone, without weight decay", decay=None),
    Stage("decay-coupled", "weight decay that joins the gradient", decay="coupled"),
    Stage("decay-decoupled", "weight decay that acts on the weights", decay="decoupled"),
    Stage("l1", "L1 penalty, coupled and decoupled where the rule has both", {"l1": 0.01}, decay="each"),
    Stage("clip", "gradients clipped by their norm over all groups", clips=True),
    Stage("mask-freeze", "entries frozen by masks", mask="freeze"),
    Stage("mask-grad", "gradients zeroed by masks", mask="grad"),
    Stage("prune-global", "the smallest of all weights pruned by a cubic schedule", {"prune": _global}),
    Stage(
        "prune-tensor",
        "the smallest of each tensor pruned by a linear schedule; moments kept",
        {"prune": Prune(0.4, scope="tensor", schedule="linear", begin=1, end=STEPS, moments="keep")},
    ),
    Stage(
        "prune-2:4",
        "2 of every 4 weights pruned, and again anew",
        {"prune": Prune(pattern="2:4", begin=1, end=STEPS, every=2, regrow=True)},
    ),
    Stage(
        "prune-rows",
        "the rows of least norm pruned",
        {"prune": Prune(0.5, pattern="rows", schedule="linear", begin=1, end=STEPS)},
    ),
    Stage(
        "prune-threshold",
        "weights below a threshold pruned, and their average with them",
        {"prune": Prune(threshold=0.2, begin=2), "ema": _timm},
    ),
    Stage("ema-timm", "an average of the weights with timm's warm-up", {"ema": _timm}),
    Stage("ema-mean", "the plain mean of the weights", {"ema": _mean}),
    Stage("ema-several", "three averages at once: constant, diffusers' and EDM2's", {"ema": _several}),
    Stage("statistics", "norms, zeros and non-finite entries summed up on the way", {"statistics": True}),
    Stage("scaler", "scaled gradients, one step skipped by found_inf", scaler=True),
    Stage(
        "all",
        "clip, l1, freeze, prune, averages, statistics and scaler together",
        {"l1": 0.01, "prune": _global, "ema": [_timm, _mean], "statistics": True},
        clips=True,
        mask="freeze",
        scaler=True,
    ),
)
# Not a stage: weights and state against torch's fused kernel instead of the float64 copy.
TORCH_FUSED = Stage("torch-fused", "bit for bit equal to torch.optim with fused=True, with and without decay")
TORCH_SHAPES = ((96, 176), (64,), (24, 32))  # whole vectors, as torch's fused kernel rounds its tails otherwise


def why_not(rule: Rule, stage: Stage, dtype: str, backend: str, asked: bool = False) -> str | None:
    """Why there is no such case; None if there is. asked: the backend was asked for by name."""
    if stage.decay in ("coupled", "decoupled") and stage.decay not in rule.forms:
        return f"{rule.cls.__name__} has {rule.forms[0]} decay only"
    if stage is TORCH_FUSED:
        if not rule.fused:
            return f"torch has no fused {rule.cls.__name__}"
        if backend != "cpu" or dtype != "fp32":
            return "torch's bits are promised of fp32 on the cpu backend"
    if backend == "triton" and not asked and stage.name not in ("plain", "all"):
        return "triton compiles a kernel for each, about a second: --backends triton runs them"
    return None


# ---- what a case is made of ---------------------------------------------------------------------------


def _generator(*numbers: int) -> torch.Generator:
    """A generator of its own for these numbers, each below a million."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed % 2**63)


@functools.lru_cache(maxsize=512)  # the same in every cell; as float32, like the gradients
def _weight(shape: tuple[int, ...], seed: int, k: int) -> Tensor:
    values = (torch.randn(shape, generator=_generator(seed, 0, k)) * 0.5).clamp(-1.5, 1.5)
    values.view(-1)[3::14] = 0.0
    values.view(-1)[10::14] = -0.0
    return values


@functools.lru_cache(maxsize=512)
def _gradient(shape: tuple[int, ...], seed: int, k: int, t: int) -> Tensor:
    generator = _generator(seed, t, k)
    size, small, tiny = (torch.rand(shape, generator=generator) for _ in range(3))
    size = 10 ** (size * 1.4 - 0.7) * torch.where(small < 0.25, 10 ** (-6 * tiny), 1.0)
    return size * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)


def parameters(shapes: Sequence[tuple], dtypes: Sequence[torch.dtype], seed: int, device: str) -> list[Parameter]:
    """Gaussian weights up to 1.5, some of them zeros of either sign; four dimensions lie as channels_last."""
    made = []
    for k, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        values = _weight(shape, seed, k).to(device, dtype, copy=True)
        made.append(Parameter(values.contiguous(memory_format=layout)))
    return made


def copies(params: Sequence[Parameter]) -> list[Parameter]:
    """The same values in the same layout."""
    return [Parameter(p.detach().clone()) for p in params]


def gradient(p: Tensor, k: int, seed: int, t: int) -> Tensor:
    """That of parameter k at step t: of either sign, from 0.2 to 5, a quarter of them up to a million times smaller.

    From LARGE on, a first step moves any weight here, clipped and in 16 bits, whatever decay does meanwhile.
    """
    return _gradient(tuple(p.shape), seed, k, t).to(p.device, p.dtype, copy=True)


def set_gradients(opt, params: Sequence[Parameter], stage: Stage, seed: int, t: int) -> None:
    """The gradients of step t, and what a GradScaler sets."""
    scale = SCALE if stage.scaler else 1.0
    for k, p in enumerate(params):
        p.grad = gradient(p, k, seed, t) * scale
    if stage.scaler:
        if t == SKIPPED:
            params[0].grad.view(-1)[-1:] = torch.inf
        opt.grad_scale = torch.tensor(scale, device=params[0].device)
        opt.found_inf = torch.tensor(float(t == SKIPPED), device=params[0].device)


def keep(p: Tensor, k: int, seed: int) -> Tensor:
    """The mask of parameter k, which keeps about 7 of 10: of rows or of entries, in turn."""
    shape = (p.shape[0],) + (1,) * (p.dim() - 1) if k % 2 and p.dim() >= 2 else p.shape
    return (torch.rand(shape, generator=_generator(seed, 999, k)) < 0.7).to(p.device)


def grouped(rule: Rule, stage: Stage, params: Sequence[Parameter]) -> list[dict]:
    """The parameter groups: dealt out in turn, from another group on for each stage, so that each gets the largest."""
    shift = [one.name for one in (*STAGES, TORCH_FUSED)].index(stage.name)
    groups = []
    for j, options in enumerate(rule.groups):
        named = [(f"w{k}", p) for k, p in enumerate(params) if (k + shift) % len(rule.groups) == j]
        if named:
            form = {None: rule.forms[0], "own": rule.forms[0], "each": rule.forms[j % len(rule.forms)]}
            chosen = form.get(stage.decay, stage.decay)
            more = {"decoupled_weight_decay": chosen == "decoupled"} if len(rule.forms) > 1 else {}
            if stage.decay is None:
                more["weight_decay"] = 0.0
            groups.append({"params": named, **options, **more})
    return groups


def build(rule: Rule, stage: Stage, params: Sequence[Parameter], backend: str, seed: int):
    """The optimizer of a case, its masks set."""
    options = {**rule.common, **stage.options}
    if stage.clips:  # the root mean square of the gradients is 1.7
        options["max_grad_norm"] = 0.8 * sum(p.numel() for p in params) ** 0.5
    opt = rule.cls(grouped(rule, stage, params), lr=0.1, backend=backend, **options)
    for k, p in enumerate(params if stage.mask else ()):
        opt.mask(p, keep(p, k, seed), mode=stage.mask)
    return opt
