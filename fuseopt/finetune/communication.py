"""Gradient compression between the processes of a distributed run: torch's DDP communication hooks."""

from dataclasses import dataclass, field
from typing import Literal

from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

# torch's default sends the gradients of the first 1000 steps whole, which would be all of a short run. Error feedback
# and warm start, which are on, need 2 steps or more.
POWER_SGD = {"matrix_approximation_rank": 4, "start_powerSGD_iter": 10}


@dataclass
class CommunicationOptions:
    """What processes send to each other."""

    _argument_group_name = "several processes (torchrun)"

    compress: Literal["none", "fp16", "bf16", "powersgd"] = field(
        default="none",
        metadata={
            "help": "Gradients between processes: fp16 or bf16 halve what is sent; powersgd sends factors of rank 4 "
            "of the matrices from the 10th step on."
        },
    )


def check_communication(options, args):
    """Raise ValueError where there is nothing to compress, or the run could not be resumed to the same bits."""
    if options.compress == "none":
        return
    if args.world_size < 2:
        raise ValueError(
            f"--compress {options.compress}: this is one process, which sends nothing; leave it out, or start "
            "several with torchrun --nproc-per-node 2 -m fuseopt finetune ..."
        )
    if options.compress == "powersgd" and args.resume_from_checkpoint:
        raise ValueError(
            "--compress powersgd with --resume_from_checkpoint: its error memory is in no checkpoint, so the run would "
            "not go on as it was; use --compress fp16 or bf16"
        )


def set_hook(options, accelerator):
    """Have `accelerator` register the hook on the model that it wraps; call it before the training starts.

    It goes into the DistributedDataParallelKwargs that the Trainer has given it.
    """
    if options.compress == "fp16":
        accelerator.ddp_handler.comm_hook = DDPCommunicationHookType.FP16
    elif options.compress != "none":
        kind = {"bf16": _Bf16, "powersgd": _PowerSGD}[options.compress]
        accelerator.ddp_handler = kind(**vars(accelerator.ddp_handler))


@dataclass
class _Bf16(DistributedDataParallelKwargs):
    """Registers torch's bf16 hook by another name: by its own, DDP refuses it without CUDA, though gloo sums bf16."""

    def register_comm_hook(self, model):
        model.register_comm_hook(None, _bf16)


def _bf16(state, bucket):
    return default_hooks.bf16_compress_hook(state, bucket)


@dataclass
class _PowerSGD(DistributedDataParallelKwargs):
    """Registers torch's PowerSGD so that it ends before the next collective begins.

    It issues its second and third all-reduce from the callbacks of the one before. On gloo these run in threads, in
    an order of their own beside the other collectives of a backward pass: 4 of 6 runs of two processes died of
    "Received data size doesn't match expected size".
    """

    def register_comm_hook(self, model):
        model.register_comm_hook(powerSGD_hook.PowerSGDState(None, **POWER_SGD), _power_sgd)


def _power_sgd(state, bucket):
    future = powerSGD_hook.powerSGD_hook(state, bucket)
    future.wait()
    return future
