"""The CUDA backend: the compiled module, and the memory that it keeps on the GPU beside the optimizer's state.

Scalars are formed on the GPU, so that a step waits for nothing: only there is known whether a GradScaler found
infinities. After such a step, and after one that a graph captured, Python does not know how many steps counted;
`settle` asks the GPU. What must be decided in Python by the step's number, a schedule of pruning that is not over,
masks to recompute, averages of buffers, has found_inf and grad_scale read on the host instead, as on the CPU.
"""

from collections.abc import Iterable
from importlib import import_module
from itertools import repeat
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, distributed, plan, torch_abi, torch_layout
from .checks import check, in_layout_of, name_of
from .cuda_memory import Sums, params_of, rows_of
from .stages import ema, statistics

DEVICE = "cuda"


def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or None and why it is missing."""
    try:
        _CUDA = import_module("fuseopt._CUDA")
    except ImportError as error:
        return None, f"the module fuseopt._CUDA is missing ({error}); install CUDA's nvcc, then fuseopt again"
    cpu.connect(_CUDA, *torch_abi.find(), torch_layout.find())
    return _CUDA, None


native, why_not = _load()


def unavailable() -> str | None:
    """Why no GPU can be used here; None if one can."""
    if native is None:
        return why_not
    if torch.version.hip:
        return "it is for NVIDIA GPUs, and this torch is for AMD's; use backend='triton'"
    if not torch.version.cuda:
        return "this torch was built without CUDA; install one with it (pytorch.org)"
    if not torch.cuda.is_available():
        return f"there is no NVIDIA driver that works: {native.driver() or 'torch cannot use it'}"
    if said := native.driver():  # torch brings a CUDA of its own, which may ask less of the driver
        return f"the NVIDIA driver does not run fuseopt._CUDA: {said}; update it, or compile with an older nvcc"
    return None


def unfit(device: torch.device) -> str | None:
    """Why this GPU cannot run the module; None if it can."""
    known = _unfit.get(device)
    if device not in _unfit:
        known = unavailable() or _without_code(torch.cuda.get_device_capability(device))
        if known is None and (said := native.problem(device.index)):
            known = f"the NVIDIA driver does not load the kernels of fuseopt._CUDA: {said}; update it"
        _unfit[device] = known
    return known


_unfit: dict[torch.device, str | None] = {}


def _without_code(capability: tuple[int, int]) -> str | None:
    major, minor = capability
    for number in native.architectures():
        code = divmod(abs(number), 10)
        if code <= (major, minor) and (number < 0 or code[0] == major):
            return None
    have = ", ".join(f"sm_{n}" for n in native.architectures() if n > 0)
    return (
        f"fuseopt._CUDA holds machine code for {have}, not for this GPU's sm_{major}{minor}; install fuseopt again "
        f"with FUSEOPT_CUDA_ARCHS={major}{minor}, or use backend='triton'"
    )


def capturing() -> bool:
    """Whether the current stream is being captured into a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def number(device: torch.device) -> int:
    """The number of a GPU; -1 for the CPU, which stands in for one in tests."""
    return device.index if device.type == "cuda" else -1


def stream(device: torch.device) -> int:
    """The address of torch's current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index)


# ---- the start of a step ----------------------------------------------------------------------------


def check_device(opt) -> None:
    """Raise ValueError or RuntimeError, with nothing changed, if the parameters are where no kernel can step them."""
    p = next(p for group in opt.param_groups for p in group["params"])
    if p.device.type != DEVICE:
        check(opt, (), (), (), p, None)
        raise ValueError(
            f"{name_of(opt, p)} is on {p.device} and backend='cuda' was asked for; move it, or leave backend out"
        )
    reason = unfit(p.device)
    if reason:
        raise RuntimeError(f"backend 'cuda' cannot step {name_of(opt, p)} on {p.device}: {reason}")


def has_new_moments(opt, step: plan.Step) -> bool:
    """Whether a parameter has moments without a value of which the kernels do not know yet."""
    empty = {p for key, members in opt._placeholders.items() if key not in ema.NAMES for p in members}
    return bool(empty) and any(p in empty and p not in opt._memory.noted for _, p in plan.stepped(step))


def must_know(opt) -> bool:
    """Whether Python must know the number of a step and whether it counts."""
    least = opt._memory.least
    schedules = [group["prune"] for group in opt.param_groups if group["prune"] and group["prune"]["threshold"] is None]
    return bool(opt._dynamic or opt._tracked) or any((one["end"] or one["begin"]) > least for one in schedules)


def amp(opt) -> tuple[Tensor | None, Tensor | None]:
    """(found_inf, grad_scale) of a GradScaler where the kernels are to read them; None for what there is not."""
    device = opt._memory.device
    found = [getattr(opt, name, None) for name in ("found_inf", "grad_scale")]
    return tuple(None if x is None else torch.as_tensor(x).to(device, torch.float32, non_blocking=True) for x in found)


def check_capture(opt) -> None:
    """Raise RuntimeError, with nothing changed, if a graph cannot capture this step."""
    if not all(group.get("capturable", True) for group in opt.param_groups):
        raise RuntimeError("step() is being captured into a CUDA graph, but capturable is False; pass capturable=True")
    for group in opt.param_groups:
        if isinstance(group["lr"], Tensor) and plan.device_lr(group) is None:
            lr = group["lr"]
            raise RuntimeError(
                f"step() is being captured into a CUDA graph, but lr is a tensor of {lr.dtype} on {lr.device}, which "
                "Python must read; make it fp32 or fp64 and lie where the parameters do"
            )
        if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            raise RuntimeError("step() is being captured into a CUDA graph, but betas are tensors; give numbers")
    if not opt._memory.addresses:
        raise RuntimeError(WARM_UP)
    thresholds = [group["prune"]["begin"] for group in opt.param_groups if group["prune"]]
    if must_know(opt) or max(thresholds, default=0) > opt._steps() + 1:
        raise RuntimeError(
            "step() is being captured into a CUDA graph, but a schedule of pruning is not over or has not begun, masks "
            "are to be recomputed, or buffers are averaged, which Python does; capture later, or leave them out"
        )
    shared = opt.defaults["sharded"] or any(map(distributed.is_dtensor, params_of(opt)))
    if shared and (opt.defaults["statistics"] or any(group["max_grad_norm"] for group in opt.param_groups)):
        raise RuntimeError(
            "step() is being captured into a CUDA graph, but processes find the norm or statistics together, for which "
            "they wait; leave out max_grad_norm and statistics, or do not capture"
        )


WARM_UP = (
    "step() is being captured into a CUDA graph, but it has to allocate memory first; take a step on the same "
    "parameters and gradients before the capture"
)


# ---- the face that backends.py sees; see cpu.py ----------------------------------------------------------


def spec(gs: plan.GroupStep, params: list[Tensor], slots: tuple, counters: tuple, emas: tuple) -> tuple:
    """A group as csrc/tensor_table.cpp reads it."""
    group = gs.group
    schedules = tuple(
        (one["decay"] or 0.0, float(ema.WARMUPS.index(one["warmup"])), float(one["start"]), float(one["every"]),
         ema.gamma(one["sigma_rel"]) if one["sigma_rel"] else 0.0)
        for one in group["ema"]
    )  # fmt: skip
    prune_from = float(group["prune"]["begin"]) if group["prune"] else 0.0
    decoupled = bool(group.get("decoupled_weight_decay"))
    more = (gs.lr, float(group["weight_decay"]), float(group["l1"]), decoupled, prune_from, schedules)
    return (*cpu.spec(gs, params, slots, counters, emas), more)


def gather(opt, step: plan.Step, replaced: dict) -> tuple:
    """(table, problems): the optimizer's table filled from its live tensors; see cpu.gather."""
    memory = opt._memory
    table = opt.__dict__.pop("_table", None)
    if not isinstance(table, native.TensorTable):
        table = native.TensorTable()
    specs = [spec(gs, gs.group["params"], gs.slots, gs.counters, gs.averages()) for gs in step.groups]
    return table, table.gather(specs, opt.state, replaced, step.inv_grad_scale, number(memory.device))


def norm(opt, table, step: plan.Step) -> Tensor | None:
    """The sum of squares of the gradient on all processes, where they share the parameters and clip."""
    shared = table.sharded or opt.defaults["sharded"]
    if not shared or not any(group["max_grad_norm"] for group in opt.param_groups):
        return None
    memory = opt._memory
    memory.make_room(opt, table)
    table.squares(memory.addresses, _address(step.amp[1]), stream(memory.device))
    lengths = torch.tensor(table.blocks(), device=memory.device)
    squares = memory.squares[: table.block_count].unsqueeze(1)  # of one dimension, torch would add in another order
    rows = torch.segment_reduce(squares, "sum", lengths=lengths, unsafe=True)  # its checks wait for the GPU
    memory.total = distributed.total(opt, table.params(), rows, 1)  # held until the kernel has read it
    return memory.total


def arguments(opt, table, step: plan.Step, squares: Tensor | None, advance: bool = True) -> tuple:
    """Those of table.run. advance: these are the first parameters of the step, which count it."""
    memory = opt._memory
    memory.make_room(opt, table)
    if advance:
        memory.count_from(step.t - 1)
    return (memory.addresses, *map(_address, (*step.amp, squares)), advance, stream(memory.device))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def before(opt, table, prepared: dict[Tensor, plan.Prepared]) -> None:
    """Tell the kernels which moments are new; for rules that do not count steps."""
    memory = opt._memory
    memory.make_room(opt, table)
    told = {p for p in memory.noted if any(p in of for key, of in opt._placeholders.items() if key not in ema.NAMES)}
    new = [(k, p) for k, p in enumerate(params_of(opt)) if p in prepared and prepared[p].fresh and p not in told]
    if new:  # one that is listed twice starts twice, as in torch
        memory.fresh[[k for k, _ in new]] = 1.0
        memory.noted.update(p for _, p in new)


def notes(opt, step: plan.Step, returned: list | None = None) -> list[Iterable]:
    """See cpu.notes. Whether a step counts is known if no found_inf could stop it, and no graph holds it."""
    memory = opt._memory
    known = not (memory.captured or step.captured) and step.amp[0] is None and memory.steps is not None
    now = {"captured": memory.captured or step.captured, "steps": step.t if known else None}
    now["least"] = step.t if known else memory.least
    return [map(setattr, repeat(memory), now.keys(), now.values())]


def finish(opt, table, step: plan.Step, rows: list[Tensor] | None) -> None:
    """What is left to do after table.run."""
    if rows:
        opt._statistics = statistics.result(cpu.total_of(opt, table.params(), rows, statistics.WIDTH, table.sharded))
    elif opt.defaults["statistics"]:
        sums = opt._statistics
        if not isinstance(sums, Sums) or not sums.fits(table):
            sums = Sums(opt, table, sums)
        together = table.sharded or opt.defaults["sharded"]  # then at once: one process alone may ask for the result
        opt._statistics = sums(opt).read() if together and sums.counts() else sums
    cpu.put_back(opt, table)


put_back = cpu.put_back


def give_first_values(opt, step: plan.Step, prepared: dict[Tensor, plan.Prepared]) -> None:
    """What the step gave its first value is no placeholder any more. With a found_inf nobody knows: `settle` looks."""
    if step.amp[0] is not None:
        return
    for p, made in prepared.items():
        for key in made.filled:
            if key not in ema.NAMES or opt._memory.steps is not None:  # which averages are due, the count decides
                opt._placeholders[key].discard(p)
    opt._memory.noted -= prepared.keys()


def run_in_turn(opt, step: plan.Step, prepared: dict[Tensor, plan.Prepared], squares: Tensor | None, whole) -> list:
    """See cpu.run_in_turn; where a group clips, or for statistics, it waits for the GPU."""
    memory = opt._memory
    places = [k for k, p in enumerate(params_of(opt)) if getattr(p, "grad", None) is not None]
    if squares is None and any(group["max_grad_norm"] for group in opt.param_groups):
        whole.squares(memory.addresses, _address(step.amp[1]), stream(memory.device))
        total = sum(row[0] for row in rows_of(memory.squares.reshape(-1, 1), whole.blocks()))
        squares = torch.tensor(total, dtype=torch.float64, device=memory.device)
    rows, table = [], native.TensorTable()
    for k, (gs, p) in enumerate(plan.stepped(step)):
        here = distributed.local(p)
        made, copy = prepared.get(p), in_layout_of(here, here)
        replaced = {} if made is None else {p: (made.grad, made.fresh, copy)}
        one = spec(gs, [p], gs.slots, gs.counters, gs.averages())
        if table.gather([one], opt.state, replaced, step.inv_grad_scale, number(memory.device), places[k]):
            raise RuntimeError("fuseopt cannot read a parameter that its checks accept; please report this")
        table.run(*arguments(opt, table, step, squares, k == 0))
        table.mark_written(cpu.increment_version)
        if copy is not here:
            here.copy_(copy)
        if opt.defaults["statistics"]:
            rows += rows_of(memory.sums.reshape(-1, statistics.WIDTH), table.blocks())
    table.release()
    return rows
