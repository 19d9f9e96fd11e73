"""What is counted after a run: zeros, frozen bits, times, bytes."""

import sys

import torch

from fuseopt.finetune.stages import prunable, pruning


def sparsity(run):
    """Counts of what can be pruned: asked for, marked as pruned, and of those +0.0 in each set of weights.

    Entries, or whole rows where the pattern is "rows". Without pruning: the zeros that there are in matrices.
    """
    groups = run.optimizer.param_groups
    options = pruning(run.optimizer)
    matrices = [p for g in groups for p in g["params"] if p.ndim > 1]
    parameters = prunable(run.optimizer) if options else matrices
    by_rows = options is not None and options["pattern"] == "rows"

    def count(masks):
        return sum(int((m.flatten(1).all(1) if by_rows else m).sum()) for m in masks)

    masks = [_pruned(run.optimizer, p) for p in parameters] if options else [_plus_zero(p) for p in parameters]
    counts = {
        "unit": "rows" if by_rows else "entries",
        "prunable": sum(p.shape[0] if by_rows else p.numel() for p in parameters),
        "asked": _asked(options, parameters) if options else 0,
        "pruned": count(masks) if options else 0,
        "raw_zeros": count(_plus_zero(p) & m for p, m in zip(parameters, masks)),
    }
    if run.averaged is not None:
        averaged = dict(zip(run.model.parameters(), run.averaged.parameters()))
        counts["average_zeros"] = count(_plus_zero(averaged[p]) & m for p, m in zip(parameters, masks))
    return counts


def _pruned(optimizer, p):
    mask = optimizer.prune_mask(p)
    return torch.zeros_like(p, dtype=torch.bool) if mask is None else mask


def _plus_zero(tensor):
    return (tensor == 0) & ~torch.signbit(tensor)


def _asked(options, parameters):
    """How many entries (or rows) the options of fuseopt.Prune ask to be pruned in the end."""
    if options["pattern"] not in ("unstructured", "rows"):
        n, m = map(int, options["pattern"].split(":"))
        # Of each group of m entries along dimension 1, m - n; of a shorter last one what it has beyond n.
        return sum(
            p.numel() // p.shape[1] * (p.shape[1] // m * (m - n) + max(0, p.shape[1] % m - n)) for p in parameters
        )
    parts = [p.shape[0] if options["pattern"] == "rows" else p.numel() for p in parameters]
    parts = parts if options["scope"] == "tensor" else [sum(parts)]
    return sum(round(options["sparsity"] * part) for part in parts)


def frozen(run):
    """Entries of frozen parameters, and those of them that are no longer what they were, to the bit."""
    pairs = [(p, start.to(p.device)) for p, start in run.frozen.items()]
    return {
        "entries": sum(p.numel() for p, _ in pairs),
        "changed": sum(int(((p != start) | (p.signbit() != start.signbit())).sum()) for p, start in pairs),
    }


def memory(run):
    """Peak bytes (of the GPU where there is one, else of the process) and bytes of the optimizer's state."""
    state = [v for entry in run.optimizer.state.values() for v in entry.values() if torch.is_tensor(v)]
    return {
        "peak_bytes": _peak(run.args.device),
        "optimizer_state_bytes": sum(v.numel() * v.element_size() for v in state),
    }


def _peak(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
