"""How far each parameter is from the head of its model, for learning rates that differ by layer."""

import torch


def levels(model):
    """{parameter: its level}, from 0 at the inputs up to the head.

    Where the model has a ModuleList (the layers of a transformer, the stages of a ResNet), every entry of an
    outermost one is a level, in the order of registration; what comes before them is level 0, what comes behind the
    last (pooler, head) one level more. Else the blocks at the top of the model are the levels.
    """
    blocks = _listed(model) or _top(model)
    found, level, block = {}, 0, None
    for name, p in model.named_parameters():
        inside = next((b for b in blocks if name.startswith(b + ".")), None)
        if inside not in (None, block):
            level, block = level + 1, inside
        found[p] = (level, inside is None)
    top = level
    for p in reversed(found):
        if not found[p][1]:
            break
        found[p] = (top + 1, True)
    return {p: level for p, (level, _) in found.items()}


def _listed(model):
    """Names of the entries of the outermost ModuleLists."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    return [f"{name}.{key}" for name in outer for key, _ in model.get_submodule(name).named_children()]


def _top(model):
    """Names of the blocks at the top, below wrappers that hold one module alone."""
    prefix, children = "", dict(model.named_children())
    while len(children) == 1:
        ((name, model),) = children.items()
        prefix, children = f"{prefix}{name}.", dict(model.named_children())
    return [prefix + name for name in children]


def factors(model, decay):
    """{parameter: decay^(levels above it)}: 1 at the head."""
    found = levels(model)
    top = max(found.values(), default=0)
    return {p: decay ** (top - level) for p, level in found.items()}
