"""fuseopt's optimizers in timm's registry. Importing this module registers them:

    import fuseopt.integrations.timm
    timm.optim.create_optimizer_v2(model, opt="fuseopt-adamw", lr=1e-3, weight_decay=0.05, ema=fuseopt.EMA(0.999))

The names are fuseopt-adamw, fuseopt-adam, fuseopt-nadam, fuseopt-sgd, fuseopt-momentum, fuseopt-adagrad and
fuseopt-lion. There is a hyphen in them because timm reads only what follows the last underscore: it would
take "fuseopt_adamw" for its own "adamw". As timm's own, fuseopt-sgd has Nesterov momentum and fuseopt-momentum
the plain one.
"""

from typing import Any

from .. import rules
from . import missing

try:
    from timm.optim._optim_factory import OptimInfo, default_registry
except ImportError as error:
    raise missing("timm", "timm", error) from error

PREFIX = "fuseopt-"
BETAS: dict[str, Any] = {"has_betas": True}
MOMENTUM: dict[str, Any] = {"has_eps": False, "has_momentum": True}

ENTRIES = (
    OptimInfo(f"{PREFIX}adamw", rules.AdamW, "fuseopt AdamW", **BETAS),
    OptimInfo(f"{PREFIX}adam", rules.Adam, "fuseopt Adam", **BETAS),
    OptimInfo(f"{PREFIX}nadam", rules.NAdam, "fuseopt NAdam", **BETAS),
    OptimInfo(f"{PREFIX}sgd", rules.SGD, "fuseopt SGD, Nesterov momentum", **MOMENTUM, defaults={"nesterov": True}),
    OptimInfo(f"{PREFIX}momentum", rules.SGD, "fuseopt SGD, momentum", **MOMENTUM, defaults={"nesterov": False}),
    OptimInfo(f"{PREFIX}adagrad", rules.Adagrad, "fuseopt Adagrad", defaults={"eps": 1e-8}),
    OptimInfo(f"{PREFIX}lion", rules.Lion, "fuseopt Lion", has_eps=False, **BETAS),
)

for entry in ENTRIES:
    default_registry.register(entry)
