"""Two options at once: the runs behind the table of pairs, and what must hold of each option after every step."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from cases import BF16, F32, F64, Snapshot, like, parameters, synchronise
from torch import Tensor
from torch.nn import Parameter

import fuseopt
from fuseopt import EMA, Prune
from fuseopt.stages import mask as masks

STEPS = 5
SHAPES = ((64, 64), (33, 31), (37,), (129, 129))  # whole vectors; tails; a parameter that is not pruned; two blocks
SCALE = 8.0  # a power of two: unscaling is exact
CLIP = 80.0  # the gradients' norm is about 210
THRESHOLD = {F32: 0.5, BF16: 0.5 + 2**-9}  # between two bf16 numbers, so that rounding cannot decide
LIMITS = {"begin": 2, "end": 4, "every": 1}  # of a schedule: at step 2 its sparsity is still 0
# A large eps: where decay nearly cancels a gradient, Adam would divide a rounding error by a small one.
ADAM = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 0.05, "weight_decay": 0.1}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}
RULES = {
    "adamw": (fuseopt.AdamW, ADAM),
    "sgd": (fuseopt.SGD, SGD),
    "adam": (fuseopt.Adam, ADAM),
    "sgd-decoupled": (fuseopt.SGD, {**SGD, "decoupled_weight_decay": True}),
}


@dataclass
class Setup:
    """What the options of a pair ask for."""

    dtype: torch.dtype = F32
    options: dict = field(default_factory=dict)
    prunes: list[Prune] = field(default_factory=list)  # two: one for every second parameter each
    averages: list[EMA] = field(default_factory=list)
    masks: dict[str, Callable] = field(default_factory=dict)  # by option; two: each for every second parameter
    spread: float = 1.0  # of the weights at the start
    jump: int | None = None  # the step from which on the learning rate is 20 times as large
    scale: float = 1.0
    skip: int | None = None  # the step before which one is skipped
    save: int | None = None  # the step after which the run is saved and loaded

    def build(self, cls: type, params: list, options: dict, **more):
        """The optimizer on these parameters, masks set."""
        prunes = self.prunes or [None]
        groups = [{"params": params[k :: len(prunes)], "prune": prune} for k, prune in enumerate(prunes)]
        opt = cls(groups, **{**options, **self.options, "ema": list(self.averages)}, **more)
        for name, set_mask in self.masks.items():
            for k in self.masked_by(name):
                set_mask(opt, k, params[k])
        return opt

    def masked_by(self, name: str) -> range:
        """The places of the parameters that an option masks."""
        return range(list(self.masks).index(name), len(SHAPES), len(self.masks))


def gradient(p: Tensor, k: int, t: int) -> Tensor:
    """A gradient of magnitude 1 to 2: the momenta stay below 8, as the tolerances ask."""
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * t + k)).clamp(-4, 4)
    return (g / 4 + torch.sign(g)).to(p.dtype)


class Run:
    """A run of an optimizer with a pair's options, beside its float64 oracle.

    before: (parameters, optimizer) as they were before step t, masks included. grads: of step t, unscaled.
    """

    def __init__(self, setup: Setup, rule: str = "adamw", backend: str | None = None):
        self.setup, (self.cls, self.options), self.backend = setup, RULES[rule], backend
        self.params = [Parameter(p.detach() * setup.spread) for p in parameters(SHAPES, setup.dtype)]
        self.opt = self.build(self.params, backend=backend)
        copies = like(self.params, F64)
        self.oracle = self.build(copies, backend="torch")
        self.t = 0
        self.resumed = None

    def build(self, params: list, **more):
        return self.setup.build(self.cls, params, self.options, **more)

    def step(self) -> None:
        self.t += 1
        self.grads = [gradient(p, k, self.t) for k, p in enumerate(self.params)]
        if self.setup.skip == self.t:
            self.skipped()
        for opt in filter(None, (self.opt, self.oracle, self.resumed)):
            for group in opt.param_groups:
                group["lr"] *= 20 if self.setup.jump == self.t else 1
        synchronise(self.oracle, self.opt)
        self.before = copied(self.params, self.opt)
        for opt in filter(None, (self.opt, self.oracle, self.resumed)):
            self.give(opt, self.grads, self.setup.scale)
            held = Snapshot(opt)
            opt.step()
            held.assert_gradients_unchanged()
        if self.setup.save == self.t:
            self.resumed = self.load(self.save())

    def give(self, opt, grads: list[Tensor], scale: float = 1.0) -> None:
        """Set the gradients of an optimizer whose groups hold the parameters as this run's do."""
        for group, own in zip(opt.param_groups, self.opt.param_groups, strict=True):
            for p, q in zip(group["params"], own["params"], strict=True):
                p.grad = grads[index(self.params, q)].to(p.dtype) * scale
        if scale != 1:
            opt.grad_scale = torch.tensor(scale)

    def skipped(self) -> None:
        """A step that found infinite gradients, which must change nothing."""
        self.give(self.opt, [g * float("inf") for g in self.grads], self.setup.scale)
        before = Snapshot(self.opt)
        self.opt.found_inf = torch.tensor(1.0)
        self.opt.step()
        del self.opt.found_inf
        before.assert_unchanged()

    def save(self) -> dict:
        """The checkpoint, by way of a file that holds plain data only."""
        file = io.BytesIO()
        torch.save({"opt": self.opt.state_dict(), "params": self.params}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, saved: dict):
        opt = self.build(like(saved["params"]), backend=self.backend)
        opt.load_state_dict(saved["opt"])
        return opt

    # ---- the same step otherwise ----------------------------------------------------------------

    def twin(self, grads: list | None = None, scale: float | None = None, prepare: Callable | None = None, **change):
        """The optimizer after the same step with other gradients or group options; `prepare` changes it before.

        A dynamic mask is the one that this run's step has made.
        """
        params, opt = copied(*self.before)
        for p, q in zip(params, self.params, strict=True):
            state = opt.state[p]
            for key in [key for key in state if key.startswith("mask_")]:
                del state[key]
            state.update({k: copy.deepcopy(v) for k, v in self.opt.state[q].items() if k.startswith("mask_")})
            if not state:
                del opt.state[p]
        for group in opt.param_groups:
            group.update(change)
        if prepare:
            prepare(opt, params)
        self.give(opt, self.grads if grads is None else grads, self.setup.scale if scale is None else scale)
        opt.step()
        return opt

    def dense(self):
        """The optimizer after the same step without what that step pruned: what selection has to choose from."""

        def postpone(opt, params):
            for group in opt.param_groups:
                prune = group["prune"]
                if prune and selects(prune, self.t) and prune.get("regrow"):
                    for p in filter(lambda p: "prune_mask" in opt.state.get(p, {}), group["params"]):
                        still = masks.pruned(opt.state[p], p) & frozen(opt.state[p], p)
                        masks.set_pruned(opt.state[p], p, still)
                if prune:
                    group["prune"] = {**prune, "begin": 10**6, "end": None, "every": 1}

        return self.twin(prepare=postpone)

    # ---- readings -------------------------------------------------------------------------------

    def each(self, opt=None):
        """(place, state before, parameter before, state after, parameter after) of every parameter."""
        old, before = self.before
        after = opt or self.opt
        for k, (p, q) in enumerate(zip(old, in_order(after), strict=True)):
            yield k, before.state.get(p, {}), p, after.state.get(q, {}), q

    def prune_of(self, k: int) -> dict | None:
        """The Prune that a parameter is under, as its group holds it."""
        return self.opt.param_groups[k % len(self.opt.param_groups)]["prune"]

    def slots(self) -> tuple[str, ...]:
        return self.opt.slots(self.opt.param_groups[0])


def copied(params: list, opt) -> tuple:
    """Copies of an optimizer and its parameters, which also know what in the state holds no value yet."""
    twins, twin = copy.deepcopy((params, opt))
    twin._placeholders = {key: {twins[index(params, p)] for p in of} for key, of in opt._placeholders.items()}
    return twins, twin


def index(params: list, p: Tensor) -> int:
    return next(k for k, q in enumerate(params) if q is p)


def in_order(opt) -> list:
    """The parameters of an optimizer in the order of SHAPES."""
    count = len(opt.param_groups)
    out = [None] * sum(len(group["params"]) for group in opt.param_groups)
    for k, group in enumerate(opt.param_groups):
        out[k::count] = group["params"]
    return out


def selects(prune: dict, t: int) -> bool:
    """Whether a Prune selects at step t (a threshold does not select: it holds at each)."""
    if prune["threshold"] is not None:
        return False
    end = prune["begin"] if prune["end"] is None else prune["end"]
    return prune["begin"] <= t <= end and (t - prune["begin"]) % prune["every"] == 0


def has_value(state: dict, key: str) -> bool:
    """Whether an average is there and was updated: one that was only made is NaN."""
    return key in state and not bool(state[key].isnan().all())


def kept(state: dict, p: Tensor) -> Tensor:
    """Where the user's mask lets the gradient through."""
    keep = masks.unfold(state, p)
    return torch.ones(p.shape, dtype=torch.bool) if keep is None else keep


def frozen(state: dict, p: Tensor) -> Tensor:
    return ~kept(state, p) if state.get("mask_freeze") else torch.zeros(p.shape, dtype=torch.bool)


def pruned(state: dict, p: Tensor) -> Tensor:
    found = masks.pruned(state, p)
    return torch.zeros(p.shape, dtype=torch.bool) if found is None else found
