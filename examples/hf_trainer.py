"""Hugging Face Trainer with fuseopt, both ways it takes an optimizer, and evaluation on the moving average.

Run it: python examples/hf_trainer.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import fuseopt
from fuseopt.integrations.transformers import EvaluateAverage

STEPS = 12


def small_model():
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, attention_dropout=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip


def sequences(number, seed):
    """Counting modulo the size of the vocabulary, from random starts, as the Trainer takes a data set."""
    starts = torch.randint(64, (number, 1), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in (starts + torch.arange(16)) % 64]


def arguments(folder, **more):
    options = dict(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=3e-3, weight_decay=0.1,
        warmup_steps=3, lr_scheduler_type="cosine", max_grad_norm=1.0, logging_steps=1, eval_strategy="steps",
        eval_steps=4, save_steps=6, report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    return TrainingArguments(**(options | more))


def by_class(folder, optimizer_class=fuseopt.AdamW, more=None, **options):
    """optimizer_cls_and_kwargs: the Trainer makes its own groups, matrices decayed and the rest not."""
    args = arguments(folder, **(more or {}))
    return Trainer(
        small_model(), args, train_dataset=sequences(64, 1), eval_dataset=sequences(16, 2),
        optimizer_cls_and_kwargs=(optimizer_class, {"lr": args.learning_rate, **options}),
    )  # fmt: skip


def by_instance(folder, optimizer_class=fuseopt.AdamW, more=None, **options):
    """optimizers=(opt, None): any groups you like; the Trainer adds its scheduler."""
    args, model = arguments(folder, **(more or {})), small_model()
    optimizer = optimizer_class(model.named_parameters(), lr=args.learning_rate, weight_decay=0.1, **options)
    return Trainer(
        model, args, train_dataset=sequences(64, 1), eval_dataset=sequences(16, 2), optimizers=(optimizer, None)
    )  # fmt: skip


def train(trainer, resume_from_checkpoint=None):
    """Train; returns the loss of every step, those before the checkpoint included."""
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = by_class(folder, ema=fuseopt.EMA(0.9))
        trainer.add_callback(EvaluateAverage(trainer))  # every evaluation runs on the average
        losses = train(trainer)
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, of the average {trainer.evaluate()['eval_loss']:.3f}")
