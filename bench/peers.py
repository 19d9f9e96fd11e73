"""Other packages' optimizers. Each function makes a Variant or raises Untimed with the reason why it does not run here.

None of them is needed: pip install torch-optimi torchao bitsandbytes deepspeed flashoptim. What a rule lacks in a
package has no row.
"""

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from case import Case, Data
from check import CHANGE
from torch import Tensor
from variants import Untimed, Variant

COMPILES = 2**12  # entries; torchao quantises the state of no smaller tensor
# What three steps change may be off by so much where moments have eight bits. Seen: 0.008, of bitsandbytes and torchao.
EIGHT_BITS = 0.03
LARGE = 2**25  # elements; larger models are left to fuseopt and torch


def load(name: str, package: str) -> ModuleType:
    """A module, without what it prints when imported."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        root = (error.name or "").split(".")[0]
        missing = "" if root == name.split(".")[0] else f", or needs {root}, which is not"
        raise Untimed(f"{package} is not installed{missing}") from None
    except Exception as error:  # a package may fail in any way on a machine that it does not know
        raise Untimed(f"{package} does not import: {one_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def variant(
    name: str, case: Case, data: Data, make: Callable[[list[Tensor]], torch.optim.Optimizer], **more
) -> Variant:
    """A peer's optimizer over fresh parameters; its bytes are not counted unless `more` says how."""
    params = data.parameters()
    opt = make(params)
    given = {"bytes": lambda: None, "passes": "not counted"} | more
    return Variant(name, "peer", params, opt, opt.step, given.pop("bytes"), given.pop("passes"), **given)


def optimi(case: Case, data: Data) -> Variant:
    """torch-optimi: foreach operations, in bf16 with Kahan summation; Adam's moments are kept with the bias removed."""
    module = load("optimi", "torch-optimi")
    kind = getattr(module, case.cls.__name__)
    more = {"betas": (0.9, 0.999)} if case.rule in ("adam", "adamw") else {}
    more |= {"eps": 1e-8} if more else {}
    change = CHANGE[case.dtype] if case.rule != "lion" else None  # the moments of others are no torch's, or so named
    return variant("torch-optimi", case, data, lambda p: kind(p, **case.options, **more), change=change)


def torchao(case: Case, data: Data) -> Variant:
    """torchao: Adam with states of eight bits, compiled by torch.compile anew for each shape of a tensor."""
    module = load("torchao.optim", "torchao")
    kind = getattr(module, f"{case.cls.__name__}8bit")
    if len(set(case.shapes)) > 1:
        raise Untimed(f"{kind.__name__} compiles for ten seconds or more for each shape: measured with one shape alone")
    if torch.Size(case.shapes[0]).numel() < COMPILES:
        raise Untimed(f"{kind.__name__} keeps 32 bits for tensors of fewer than {COMPILES} entries")
    if case.quick:
        raise Untimed(f"{kind.__name__} compiles for ten seconds or more: not in a quick run")
    warnings.filterwarnings("ignore", message=".*OptimState8bit.*")  # torch.compile, of its cache
    return variant(f"torchao {kind.__name__}", case, data, lambda p: kind(p, **case.options), change=EIGHT_BITS)


def bitsandbytes(case: Case, data: Data, bits: int = 32) -> Variant:
    """bitsandbytes: moments of 32 or 8 bits, on a CPU through torch operations; one call a tensor."""
    module = load("bitsandbytes.optim", "bitsandbytes")
    kind = getattr(module, f"{case.cls.__name__}{bits}bit")
    name, change = f"bitsandbytes {kind.__name__}", CHANGE[case.dtype] if bits == 32 else EIGHT_BITS
    if bits == 8 and max(torch.Size(s).numel() for s in case.shapes) < COMPILES:
        raise Untimed(f"{kind.__name__} keeps 32 bits for tensors of fewer than {COMPILES} entries")
    return variant(name, case, data, lambda p: kind(p, **case.options), change=change)


def deepspeed(case: Case, data: Data) -> Variant:
    """DeepSpeed's CPU Adam: compiled at the first use, which takes minutes; moments in fp32."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    module = load("deepspeed.ops.adam", "deepspeed")
    size = case.dtype.itemsize
    bytes_ = case.elements * (3 * size + 16)

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return module.DeepSpeedCPUAdam(params, **case.options, adamw_mode=case.rule == "adamw")
        except Exception as error:
            raise Untimed(f"DeepSpeedCPUAdam does not build: {one_line(error)}") from None

    count = f"bytes: p {2 * size}, g {size}, m 8, v 8"
    return variant("DeepSpeedCPUAdam", case, data, make, bytes=lambda: bytes_, passes=count)


def apex(case: Case, data: Data) -> Variant:
    """NVIDIA apex: CUDA alone, built from its repository (the package index's apex is another project)."""
    module = load("apex.optimizers", "apex") if torch.cuda.is_available() else None
    if module is None or case.device == "cpu":
        raise Untimed("apex steps parameters on a GPU only")
    return variant("apex FusedAdam", case, data, lambda p: module.FusedAdam(p, **case.options))


def flashoptim(case: Case, data: Data) -> Variant:
    """FlashOptim: Triton kernels and quantised states, which it makes on a GPU only."""
    if case.device == "cpu":
        raise Untimed("FlashOptim quantises its states on a GPU only")
    module = load("flashoptim", "flashoptim")
    kind = getattr(module, f"Flash{case.cls.__name__}")
    return variant(f"FlashOptim {kind.__name__}", case, data, lambda p: kind(p, **case.options), change=EIGHT_BITS)


ADAMS = ("adamw", "adam")
PEERS: dict[str, tuple[Callable[..., Variant], tuple[str, ...]]] = {  # name: (function, rules that it has)
    "torch-optimi": (optimi, (*ADAMS, "sgd", "sgd-plain", "lion")),
    "torchao": (torchao, ADAMS),
    "bitsandbytes": (bitsandbytes, (*ADAMS, "sgd", "lion")),
    "bitsandbytes-8bit": (lambda case, data: bitsandbytes(case, data, 8), (*ADAMS, "lion")),
    "deepspeed": (deepspeed, ADAMS),
    "apex": (apex, ADAMS),
    "flashoptim": (flashoptim, (*ADAMS, "sgd", "lion")),
}


def makers(case: Case, data: Data, names: list[str]) -> list[tuple[str, Callable[[], Variant]]]:
    """(name, function that makes the variant) of the peers that have the case's rule."""
    chosen = [(name, *PEERS[name]) for name in names if case.stages == "plain"]
    return [(name, limited(name, case, data, make)) for name, make, rules in chosen if case.rule in rules]


def limited(name: str, case: Case, data: Data, make: Callable[..., Variant]) -> Callable[[], Variant]:
    def made() -> Variant:
        if case.elements > LARGE:
            raise Untimed(f"{name} is measured up to {LARGE // 2**20}M parameters, to save time and memory")
        return make(case, data)

    return made
