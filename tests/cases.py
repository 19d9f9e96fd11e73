"""What the tests are expanded from: rules, stages, dtypes, sizes, tolerances; and the helpers they share."""

import copy
from dataclasses import dataclass, field

import emulated
import torch
from torch import Tensor
from torch.nn import Parameter

import fuseopt
from fuseopt import EMA, Prune, cpu, cuda_memory

STEPS = 3
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
BACKENDS = tuple(name for name, why_not in (("cpu", cpu.native_error()), ("cuda", emulated.why_not), ("torch", None)) if why_not is None)

# ---- rules: every hyper-parameter is non-zero somewhere ---------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One line of RULES. torch_has: torch.optim has this class with these options."""

    name: str
    cls: type
    options: dict
    torch_has: bool = True
    fused: bool = True  # torch has a fused CPU kernel of it

    def ours(self, params, **more):
        return self.cls(params, **{**self.options, **more})

    def torchs(self, params, **more):
        options = {**self.options, **more}
        if self.fused:
            options.setdefault("fused", True)
        return getattr(torch.optim, self.cls.__name__)(params, **options)


_adam = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
_nadam = {**_adam, "momentum_decay": 0.01}
_adagrad = {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-6}
_sgd = {"lr": 0.1, "weight_decay": 0.1}

RULES = (
    Rule("adamw", fuseopt.AdamW, _adam),
    Rule("adamw-amsgrad-maximize", fuseopt.AdamW, {**_adam, "amsgrad": True, "maximize": True}),
    Rule("adamw-small-beta1", fuseopt.AdamW, {**_adam, "betas": (0.3, 0.9)}),
    Rule("adam", fuseopt.Adam, _adam),
    Rule("adam-amsgrad", fuseopt.Adam, {**_adam, "amsgrad": True}),
    Rule("adam-decoupled-maximize", fuseopt.Adam, {**_adam, "decoupled_weight_decay": True, "maximize": True}),
    Rule("sgd", fuseopt.SGD, _sgd),
    Rule("sgd-momentum", fuseopt.SGD, {**_sgd, "momentum": 0.9, "dampening": 0.2, "maximize": True}),
    Rule("sgd-nesterov", fuseopt.SGD, {**_sgd, "momentum": 0.9, "nesterov": True}),
    Rule(
        "sgd-decoupled", fuseopt.SGD, {**_sgd, "momentum": 0.8, "decoupled_weight_decay": True}, torch_has=False
    ),
    Rule("nadam", fuseopt.NAdam, _nadam, fused=False),
    Rule(
        "nadam-decoupled-maximize",
        fuseopt.NAdam,
        {**_nadam, "decoupled_weight_decay": True, "maximize": True},
        fused=False,
    ),
    Rule("adagrad", fuseopt.Adagrad, _adagrad),
    Rule("adagrad-maximize", fuseopt.Adagrad, {**_adagrad, "maximize": True}),
    Rule("adagrad-decoupled", fuseopt.Adagrad, {**_adagrad, "decoupled_weight_decay": True}, torch_has=False),
    # Lion's betas are dyadic: the sign of what cancels is then the same in any precision.
    Rule("lion", fuseopt.Lion, {"lr": 0.01, "betas": (0.875, 0.9375), "weight_decay": 0.1}, torch_has=False),
    Rule(
        "lion-maximize",
        fuseopt.Lion,
        {"lr": 0.01, "betas": (0.75, 0.9375), "weight_decay": 0.1, "maximize": True},
        torch_has=False,
    ),
)
FUSED_RULES = tuple(rule for rule in RULES if rule.torch_has and rule.fused)
BY_NAME = {rule.name: rule for rule in RULES}
ONE_EACH = tuple(
    BY_NAME[name] for name in ("adamw-amsgrad-maximize", "adam", "sgd", "sgd-nesterov", "nadam", "adagrad", "lion")
)

# ---- stages -----------------------------------------------------------------------------------------

# |p| is stored rounded, so the float64 oracle agrees on |p| < t only where t lies just above a boundary of rounding,
# whose own values go to the even side, below.
THRESHOLD = {F32: 0.5, F64: 0.5, BF16: 0.5 + 2**-9 + 2**-22, F16: 0.5 + 2**-12 + 2**-24}


@dataclass(frozen=True)
class Stage:
    """One line of STAGES: options, masks, loss scale. prune_threshold takes its value from THRESHOLD."""

    name: str
    options: dict = field(default_factory=dict)
    mask: str | None = None
    grad_scale: float | None = None
    prune_threshold: bool = False

    def build(self, rule: Rule, params: list, dtype: torch.dtype, **more):
        """The optimizer of a rule with this stage, its masks set."""
        options = copy.deepcopy(self.options)
        if self.prune_threshold:
            options["prune"] = Prune(threshold=THRESHOLD[dtype], moments=options.pop("moments", "zero"))
        opt = rule.ours(params, **options, **more)
        if self.mask:
            for k, p in enumerate(params):
                opt.mask(p, element_mask(p, k), self.mask)
        if self.grad_scale:
            opt.grad_scale = torch.tensor(self.grad_scale)
        return opt


_two_averages = [EMA(0.5), EMA(0.999, warmup="timm")]
STAGES = (
    Stage("unscale", grad_scale=8.0),
    Stage("mask-freeze", mask="freeze"),
    Stage("mask-grad", mask="grad"),
    Stage("clip", {"max_grad_norm": 0.5}),
    Stage("l1", {"l1": 0.3}),
    Stage("threshold", prune_threshold=True),
    Stage("threshold-keep", {"moments": "keep"}, prune_threshold=True),
    Stage("sparsity", {"prune": Prune(0.6, begin=1, end=3, schedule="linear")}),
    Stage("sparsity-tensor", {"prune": Prune(0.6, begin=2, scope="tensor", moments="keep")}),
    Stage("sparsity-n-m", {"prune": Prune(pattern="2:4", begin=2), "ema": _two_averages}),
    Stage("sparsity-rows", {"prune": Prune(0.5, pattern="rows", begin=1, end=3, moments="keep")}),
    Stage("ema", {"ema": _two_averages}),
    Stage("statistics", {"statistics": True}),
    Stage(
        "everything",
        {"max_grad_norm": 0.7, "l1": 0.2, "ema": _two_averages, "statistics": True},
        mask="freeze",
        grad_scale=4.0,
        prune_threshold=True,
    ),
    Stage(
        "everything-sparsity",
        {"max_grad_norm": 0.7, "l1": 0.2, "ema": _two_averages, "prune": Prune(0.4, begin=1, end=3)},
        mask="grad",
        grad_scale=4.0,
    ),
)
STAGE = {stage.name: stage for stage in STAGES}

# ---- sizes ------------------------------------------------------------------------------------------

# The vector has up to 16 elements, a word of mask bits 32, a tile 1024, a block 16384.
VECTOR_SIZES = ((64,), (16, 32), (1024,), (128, 128), (2, 16384))
TAIL_SIZES = ((), (1,), (7,), (31, 1), (11, 3), (5, 13), (33, 31), (1025,))
BLOCK_SIZES = ((5, 8, 41), (16385,), (200, 200))
ALL_SIZES = TAIL_SIZES + ((0,), (0, 3), (1023,), (16383,)) + BLOCK_SIZES
SIZES = {"tails": TAIL_SIZES, "blocks": BLOCK_SIZES}

# ---- tolerances -------------------------------------------------------------------------------------

# (rtol, atol) of ONE step from equal state against the float64 oracle. Weights and gradients reach 4, so a
# rounding of an intermediate is up to 4 units. fp32: a few of those; fp64: as many in the oracle again.
# 16-bit: the stored result is rounded once, by half a unit in the last place.
ONE_STEP = {F32: (4 * 2**-24, 8 * 2**-24), F64: (8 * 2**-53, 16 * 2**-53), BF16: (2**-7.99, 1e-6), F16: (2**-10.99, 1e-6)}
EMA_ONE_STEP = {**ONE_STEP, BF16: (2**-8, 4 * 2**-8), F16: (2**-11, 4 * 2**-11)}
# (rtol, atol) of STEPS steps in fp32 or fp64, each on its own trajectory.
TRAJECTORY = {F32: (1e-6, 5e-7), F64: (2e-15, 1e-15)}
# Sums are formed in double from gradients and weights that are off by a rounding.
SUMS = {F32: 1e-6, F64: 1e-14, BF16: 2**-8, F16: 2**-11}


# ---- helpers ----------------------------------------------------------------------------------------


def ident(x) -> str:
    """The name of a case in the test's id."""
    return getattr(x, "name", None) or str(x).removeprefix("torch.").replace(" ", "")


def parameters(shapes, dtype=F32, seed=0) -> list[Parameter]:
    """Gaussian parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def like(params, dtype=None) -> list[Parameter]:
    """Copies, in another dtype perhaps, with the same strides."""
    return [Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in params]


def gradient(p: Tensor, k: int, t: int) -> Tensor:
    """The gradient of parameter k at step t: the same values whatever the strides of p."""
    generator = torch.Generator().manual_seed(1000 * t + k)
    return torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def set_gradients(params, t: int, scale: float = 1.0) -> None:
    for k, p in enumerate(params):
        p.grad = gradient(p, k, t) * scale


def run(opt, params, steps=STEPS, first=1, scale: float = 1.0):
    """Steps first, first+1, ... on the gradients of `gradient`; returns the optimizer."""
    for t in range(first, first + steps):
        set_gradients(params, t, scale)
        opt.step()
    return opt


def element_mask(p: Tensor, k: int = 0) -> Tensor:
    """Keeps about two thirds of the entries, at random."""
    return (torch.rand(p.shape, generator=torch.Generator().manual_seed(77 + k)) > 0.35).to(p.device)


def bits(x: Tensor) -> Tensor:
    """The bits of x as integers, in row-major order, on the CPU."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().cpu().contiguous().view(kind)


def assert_same_bits(a: Tensor, b: Tensor, what: str = "") -> None:
    assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: {a.dtype}{a.shape} against {b.dtype}{b.shape}"
    differ = bits(a) != bits(b)
    if differ.any():
        at = differ.nonzero()[0].tolist()
        found = [x.detach().contiguous()[tuple(at)].item() for x in (a, b)]
        raise AssertionError(f"{what}: {int(differ.sum())} of {a.numel()} entries differ, first {at}: {found}")


def assert_close(a: Tensor, b: Tensor, bound: tuple[float, float], what: str = "") -> None:
    rtol, atol = bound
    torch.testing.assert_close(
        a.detach().double(), b.detach().double(), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}"
    )


def assert_same_state(a, b, keys=None) -> None:
    """Parameters and state of two optimizers agree bit for bit (only `keys` of the state, if given)."""
    for i, (p, q) in enumerate(zip(all_params(a), all_params(b), strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
        mine, other = a.state.get(p, {}), b.state.get(q, {})
        for key in keys or mine.keys() | other.keys():
            if key == "prune_mask" and not all(x.get(key, torch.zeros(1)).any() for x in (mine, other)):
                assert not any(x.get(key, torch.zeros(1)).any() for x in (mine, other)), f"parameter {i} {key}"
                continue  # no mask and an empty one are the same
            assert (key in mine) == (key in other), f"parameter {i}: only one has {key}"
            if isinstance(mine.get(key), Tensor):
                assert_same_bits(mine[key], other[key], f"parameter {i} {key}")
            else:
                assert mine.get(key) == other.get(key), f"parameter {i} {key}"


def all_params(opt) -> list[Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


class Snapshot:
    """Everything a step may change: bits, versions, state, gradients, groups."""

    def __init__(self, opt):
        self.opt = opt
        self.params = [(p, p.detach().clone(), p._version, p.data_ptr()) for p in all_params(opt)]
        self.grads = [
            (p, p.grad, p.grad.detach().clone(), p.grad._version) for p in all_params(opt)
            if p.grad is not None and p.grad.layout == torch.strided
        ]
        self.state = {p: _copied(s) for p, s in opt.state.items()}
        self.groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in opt.param_groups]

    def assert_values_unchanged(self) -> None:
        """What holds after a step that the GPU skipped: Python launched it, made state and counted versions up."""
        cuda_memory.settle(self.opt)
        for i, (p, value, _, _) in enumerate(self.params):
            assert_same_bits(p, value, f"parameter {i}")
        self.assert_gradients_unchanged()
        for p, saved in self.state.items():
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    assert_same_bits(self.opt.state[p][key], value, key)
        for group, saved in zip(self.opt.param_groups, self.groups, strict=True):
            assert {k: v for k, v in group.items() if k != "params"} == saved

    def assert_unchanged(self) -> None:
        for i, (p, value, version, address) in enumerate(self.params):
            if p.device.type == "cpu":
                assert_same_bits(p, value, f"parameter {i}")
            assert (p._version, p.data_ptr()) == (version, address), f"parameter {i} was written or moved"
        self.assert_gradients_unchanged()
        assert self.opt.state.keys() == self.state.keys(), "state was created or removed"
        for p, saved in self.state.items():
            now = self.opt.state[p]
            assert now.keys() == saved.keys()
            for key, value in saved.items():
                if not isinstance(value, Tensor):
                    assert now[key] == value, key
                elif value.device.type == "cpu":
                    assert_same_bits(now[key], value, key)
        for group, saved in zip(self.opt.param_groups, self.groups, strict=True):
            assert {k: v for k, v in group.items() if k != "params"} == saved

    def assert_gradients_unchanged(self) -> None:
        for p, grad, value, version in self.grads:
            assert p.grad is grad and grad._version == version, "a gradient was replaced or written"
            assert_same_bits(grad, value, "gradient")


def _copied(state: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in state.items()}


def synchronise(oracle, opt) -> None:
    """Give the oracle, whose parameters are float64 copies, the parameters and state of `opt`."""
    for p, q in zip(all_params(opt), all_params(oracle), strict=True):
        with torch.no_grad():
            q.copy_(p)
        for key, value in opt.state.get(p, {}).items():
            moment = isinstance(value, Tensor) and value.is_floating_point() and key not in COUNTERS
            oracle.state[q][key] = value.to(F64, copy=True) if moment else copy.deepcopy(value)


COUNTERS = ("step", "mu_product")
