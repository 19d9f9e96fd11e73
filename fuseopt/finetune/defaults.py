"""Defaults of the options of TrainingArguments: ours, and transformers' own."""

import tempfile

import torch
from transformers import TrainingArguments

BATCH_SIZE = 32  # over all processes, unless --per_device_train_batch_size says otherwise

TRAINER_DEFAULTS = dict(
    output_dir="runs/finetune",
    num_train_epochs=10,
    per_device_eval_batch_size=64,
    max_grad_norm=1.0,
    logging_steps=10,
    eval_strategy="epoch",
    save_strategy="epoch",
    save_total_limit=2,
    seed=0,
    use_cpu=not torch.cuda.is_available(),
    report_to="none",
)


def trainer_defaults():
    """The defaults of TrainingArguments once it has made up its mind, as plain data."""
    with tempfile.TemporaryDirectory() as scratch:
        return TrainingArguments(scratch, use_cpu=True).to_dict()
