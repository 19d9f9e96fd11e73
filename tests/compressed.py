"""What test_finetune_distributed.py starts with torchrun, once, because starting takes longer than all of it.

The same short training with each --compress, weights to a file; then commands of `fuseopt finetune`: a run, the same
run resumed, and one that is refused.
"""

import contextlib
import functools
import os
import sys
import tempfile

import torch
from safetensors.torch import save_file
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fuseopt.__main__ import main as fuseopt
from fuseopt.finetune.communication import CommunicationOptions, check_communication, set_hook
from fuseopt.finetune.loss import LossOptions, compute_loss

CALLS = {"none": 0}

# Without dropout, whose random numbers differ between processes; a number of rows that two processes share evenly
# in each batch but the last.
OPTIONS = (
    "finetune --classes 5 6 7 8 9 --dropout 0 --freeze stem.* --average ema --sparsity 0.5 --learning_rate 0.002 "
    "--max_steps 12 --save_strategy steps --save_steps 6 --eval_strategy steps --eval_steps 6 --verify 6 "
    "--logging_steps 6 --disable_tqdm true"
).split()
COMMANDS = {  # {folder: (options, exit status)}
    "run": ([], 0),
    "resumed": (["--resume_from_checkpoint", "run/checkpoint-6"], 0),
    "refused": (["--sparsity", "2"], 2),
}


def counted(module, name, key):
    """Count the calls of a hook of torch's, and what it sends: buckets of gradients."""
    hook = getattr(module, name)

    @functools.wraps(hook)  # DDP goes by the name
    def wrapper(state, bucket):
        CALLS[key] = CALLS.get(key, 0) + 1
        return hook(state, bucket)

    setattr(module, name, wrapper)


def rows(number):
    torch.manual_seed(1)
    ids = torch.randint(1, 20, (number, 6))
    return [
        {"input_ids": x, "attention_mask": torch.ones(6, dtype=torch.long), "labels": int(x.sum()) % 3} for x in ids
    ]


class OwnLoss(Trainer):
    """The harness's loss in the Trainer, as its FusedTrainer has it."""

    teacher, loss = None, LossOptions()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # have num_items_in_batch counted, and divide by nothing else

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = compute_loss(model, inputs, self.teacher, self.loss, self.args, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def trainer(number=32, compress="none", **options):
    """A Trainer of a small BERT in double, with plain SGD, on `number` rows."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForSequenceClassification(config).double()
    defaults = {
        "num_train_epochs": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
    }
    args = TrainingArguments(tempfile.mkdtemp(), **defaults | options)
    made = OwnLoss(
        model, args, train_dataset=rows(number), optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None)
    )
    chosen = CommunicationOptions(compress)
    check_communication(chosen, args)
    set_hook(chosen, made.accelerator)
    return made


def weights(made):
    made.train()
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def compress_all(path):
    counted(default_hooks, "fp16_compress_hook", "fp16")
    counted(default_hooks, "bf16_compress_hook", "bf16")
    counted(powerSGD_hook, "powerSGD_hook", "powersgd")
    found = {}
    for compress in ("none", "fp16", "bf16", "powersgd"):
        result = weights(trainer(compress=compress, per_device_train_batch_size=4))
        found |= {f"{compress} {name}": p for name, p in result.items()}
        found[f"{compress} calls"] = torch.tensor(CALLS[compress])
    if torch.distributed.get_rank() == 0:
        save_file(found, path)


def main(folder):
    torch.set_num_threads(1)
    os.chdir(folder)
    compress_all("compressed.safetensors")
    rank = torch.distributed.get_rank()
    for name, (options, status) in COMMANDS.items():
        with open(f"{name}-{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
            with contextlib.redirect_stderr(file):
                assert fuseopt([*OPTIONS, "--output_dir", name, *options]) == status
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
