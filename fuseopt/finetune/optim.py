"""The optimizer of a run, made from its options: which rule, which parameters, which stages."""

import inspect
from dataclasses import dataclass, field
from typing import Literal

import torch

import fuseopt
from fuseopt.finetune import checks
from fuseopt.finetune.checks import in_range, without_effect
from fuseopt.finetune.layers import factors
from fuseopt.finetune.stages import prunes, stages_of
from fuseopt.optimizer import FusedOptimizer

CLASSES = {rule.__name__.lower(): rule for rule in fuseopt.rules.ALL}
TORCH_CLASSES = {
    f"torch-{kind.__name__.lower()}": kind
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.NAdam, torch.optim.Adagrad)
}
FIXED_DECAY = {  # the optimizers that leave no choice
    "adamw": "decoupled",
    "lion": "decoupled",
    "torch-adamw": "decoupled",
    "torch-sgd": "coupled",
    "torch-adagrad": "coupled",
}
ADAMS = ("adamw", "adam", "nadam")


@dataclass
class OptimizerOptions:
    """The rule, its decay, and which parameters it moves how far."""

    _argument_group_name = "optimizer"

    optimizer: Literal[(*CLASSES, *TORCH_CLASSES)] = field(
        default="adamw",
        metadata={
            "help": "The fused optimizer, or torch's own for comparison (torch-...), which takes no stages: no L1, "
            "masks, averages or pruning. adam, adamw and nadam take --adam_beta1, --adam_beta2, --adam_epsilon."
        },
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of sgd, in [0, 1)."})
    decay: Literal["coupled", "decoupled"] | None = field(
        default=None,
        metadata={
            "help": "How --weight_decay and --l1 act: coupled, added to the gradient (L2), or decoupled, on the "
            "weights themselves. None: as the optimizer does by itself. adamw and lion are always decoupled."
        },
    )
    l1: float = field(default=0.0, metadata={"help": "L1 penalty of the matrices, 0 or more; biases have none."})
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Parameters that keep their bits: name patterns as of a shell, as 'bert.embeddings.*'; none: none."
        },
    )
    freeze_by: Literal["mask", "requires_grad"] = field(
        default="mask",
        metadata={
            "help": "mask: frozen parameters stay in the optimizer, which holds them; requires_grad: they are left "
            "out and their gradients are not computed, which is faster."
        },
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of a layer divided by that of the layer above it, in (0, 1]; the head has "
            "--learning_rate, embeddings the lowest. 1: the same for all."
        },
    )
    lr_scale: list[str] = field(
        default_factory=list,
        metadata={"help": "PATTERN=FACTOR: multiplies the learning rate of the parameters that match, as 'head.*=10'."},
    )
    backend: Literal["cpu", "cuda", "triton", "torch"] | None = field(
        default=None, metadata={"help": "What runs the fused step; None: the fastest for the device."}
    )


def check_optimizer(options, args):
    """Raise ValueError for a value that no optimizer takes, or that this one would not heed."""
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        in_range(name, getattr(args, name) or 0.0, 0)
    for name in ("adam_beta1", "adam_beta2"):
        in_range(name, getattr(args, name), 0, 1)
    in_range("adam_epsilon", args.adam_epsilon, 0)
    in_range("momentum", options.momentum, 0, 1)
    in_range("l1", options.l1, 0)
    if not 0 < options.layer_decay <= 1:
        raise ValueError(f"--layer_decay {options.layer_decay:g}: must be more than 0 and at most 1")
    rule, own = options.optimizer.removeprefix("torch-"), f"on --optimizer {options.optimizer}"
    if rule != "sgd":
        without_effect(options, ["momentum"], OptimizerOptions, own)
    if rule not in ADAMS:
        for name, default in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
            if getattr(args, name) != default:
                raise ValueError(f"--{name} {getattr(args, name):g} has no effect {own}")
    if options.freeze in ([], ["none"]):
        without_effect(options, ["freeze_by"], OptimizerOptions, "without --freeze")
    fixed = FIXED_DECAY.get(options.optimizer)
    if fixed and options.decay not in (None, fixed):
        other = {"adamw": "adam", "torch-adamw": "torch-adam", "lion": "adam"}.get(options.optimizer, rule)
        raise ValueError(
            f"--decay {options.decay}: the decay of {options.optimizer} is {fixed}; use --optimizer {other}"
        )
    if options.optimizer in TORCH_CLASSES:
        _check_torch(options)


def _check_torch(options):
    """Raise ValueError for a stage of ours that torch's optimizers do not have."""
    asked = {
        f"--l1 {options.l1:g}": options.l1,
        f"--average {options.average}": options.average != "none",
        f"--sparsity {options.sparsity:g}": options.sparsity,
        f"--prune_pattern {options.prune_pattern}": options.prune_pattern != "none",
        "--keep_zeros": options.keep_zeros,
        f"--backend {options.backend}": options.backend,
    }
    plain = options.optimizer.removeprefix("torch-")
    for option, is_on in asked.items():
        if is_on:
            raise ValueError(f"{option}: {options.optimizer} cannot; use --optimizer {plain}")
    if options.freeze not in ([], ["none"]) and options.freeze_by == "mask":
        raise ValueError(f"--freeze_by mask: {options.optimizer} has no masks; use --freeze_by requires_grad")


# ---- which parameters ------------------------------------------------------------------------------


def matching(model, patterns, option):
    """The parameters whose name, or one of whose names, fits a shell pattern; ValueError for one that none fits."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {named[name] for name in checks.matching(named, patterns, option)}


def frozen_names(model, patterns):
    """The names, as named_parameters gives them, of the parameters that match one of `patterns`.

    A tied parameter is frozen under any of its names. Raises ValueError for a pattern without a match, and
    where nothing is left to train.
    """
    if patterns == ["none"]:  # what a command line says against a list of the --config file
        return set()
    frozen = matching(model, patterns, "--freeze")
    if not any(p.requires_grad and p not in frozen for p in model.parameters()) and frozen:
        raise ValueError(f"--freeze {' '.join(patterns)} leaves no parameter to train")
    return {name for name, p in model.named_parameters() if p in frozen}


def learning_rates(model, options, learning_rate):
    """{parameter: learning_rate * layer_decay^(layers above it) * the factors of the patterns it matches}."""
    rates = {p: learning_rate * factor for p, factor in factors(model, options.layer_decay).items()}
    for one in options.lr_scale:
        pattern, _, factor = one.rpartition("=")
        try:
            number = float(factor)
        except ValueError:
            number = 0.0
        if not pattern or not 0 < number < float("inf"):
            raise ValueError(f"--lr_scale {one}: give PATTERN=FACTOR with a positive factor, as 'head.*=10'")
        for p in matching(model, [pattern], "--lr_scale"):
            rates[p] *= number
    return rates


def _groups(model, options, learning_rate, frozen):
    """Parameter groups of named parameters: matrices, vectors and frozen ones, by learning rate, the highest first.

    Biases and the parameters of norms (vectors) have no decay, frozen ones no share in the sparsity.
    """
    rates, members = learning_rates(model, options, learning_rate), {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "frozen" if name in frozen else "matrices" if p.ndim > 1 else "vectors"
            rate = learning_rate if kind == "frozen" else rates[p]
            members.setdefault((kind == "frozen", -rate, kind), []).append((name, p))
    return [{"params": members[key], "lr": -key[1], "kind": key[2]} for key in sorted(members)]


# ---- the optimizer ---------------------------------------------------------------------------------


def build_optimizer(model, options, args, steps):
    """The optimizer of `options` over the trainable parameters of `model`, for a run of `steps` steps.

    --freeze_by requires_grad turns off requires_grad of the frozen parameters. A fused optimizer clips to
    args.max_grad_norm in its own pass (see clips). Raises ValueError for a bad value, before it changes the model.
    """
    check_optimizer(options, args)
    stages = stages_of(model, options, steps)
    frozen = frozen_names(model, options.freeze)
    groups = _groups(model, options, args.learning_rate, frozen)
    if options.freeze_by == "requires_grad":
        groups = [group for group in groups if group["kind"] != "frozen"]
    rule = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **_rule_options(options, args)}
    if options.optimizer in TORCH_CLASSES:
        optimizer = _torch_optimizer(options, groups, rule)
    else:
        optimizer = _fused_optimizer(options, args, groups, rule, stages)
    if options.freeze_by == "requires_grad":
        for name, p in model.named_parameters():
            if name in frozen:
                p.requires_grad_(False)
    return optimizer


def clips(optimizer):
    """Whether the optimizer clips the gradient itself; the Trainer's max_grad_norm must be 0 then."""
    return isinstance(optimizer, FusedOptimizer)


def _fused_optimizer(options, args, groups, rule, stages):
    """Vectors without decay, frozen groups without pruning and masked, the zeros of the others masked if asked."""
    extras = {"matrices": {}, "vectors": {"weight_decay": 0.0, "l1": 0.0}, "frozen": {"prune": None}}
    optimizer = CLASSES[options.optimizer](
        [group | extras[group["kind"]] for group in groups],
        max_grad_norm=args.max_grad_norm or None,
        l1=options.l1,
        backend=options.backend,
        **rule,
        **stages,
    )
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["kind"] == "frozen":
                optimizer.mask(p, torch.zeros([1] * p.ndim, dtype=torch.bool, device=p.device))
            elif options.keep_zeros and prunes(p):
                optimizer.mask(p, fuseopt.masks.nonzero)
        group["keep_zeros"] = options.keep_zeros and group["kind"] != "frozen"
    return optimizer


def _torch_optimizer(options, groups, rule):
    """torch's own class, fused where it has that on the device: its fastest."""
    kind = TORCH_CLASSES[options.optimizer]
    devices = {p.device.type for group in groups for _, p in group["params"]}
    fused = kind.__name__ != "Adagrad" or devices == {"cpu"}  # torch's fused Adagrad is for the CPU alone
    if fused and "fused" in inspect.signature(kind).parameters:
        rule = rule | {"fused": True}
    extras = {"matrices": {}, "vectors": {"weight_decay": 0.0}}
    return kind([group | extras[group["kind"]] for group in groups], **rule)


def _rule_options(options, args):
    """What beside learning rate and decay the rule takes."""
    rule, chosen = options.optimizer.removeprefix("torch-"), {}
    if rule in ADAMS:
        chosen = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    elif rule == "sgd":
        chosen = {"momentum": options.momentum}
    if options.decay and options.optimizer not in FIXED_DECAY:
        chosen["decoupled_weight_decay"] = options.decay == "decoupled"
    return chosen
