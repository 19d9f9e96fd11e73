"""Supervised fine-tuning with TRL: a random model and a tokenizer made on the spot, nothing is downloaded.

Run it: python examples/hf_trl.py
"""

import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import fuseopt
from fuseopt.integrations.transformers import EvaluateAverage

TEXTS = [f"{a} plus {b} is {a + b} ." for a in range(10) for b in range(8)]


def word_tokenizer():
    words = ["<unk>", "<s>", "</s>", "<pad>", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_trainer(folder, optimizer_class=fuseopt.AdamW, **options):
    set_seed(0)
    tokenizer = word_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        )
    )  # fmt: skip
    args = SFTConfig(
        output_dir=folder, max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, weight_decay=0.1,
        warmup_steps=2, max_length=16, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    return SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"text": TEXTS[::2]}),
        eval_dataset=Dataset.from_dict({"text": TEXTS[1::2]}),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(optimizer_class, {"lr": args.learning_rate, **options}),
    )


def train(trainer):
    """Train; returns the loss of every step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, ema=fuseopt.EMA(0.8))
        trainer.add_callback(EvaluateAverage(trainer))
        losses = train(trainer)
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, of the average {trainer.evaluate()['eval_loss']:.3f}")
