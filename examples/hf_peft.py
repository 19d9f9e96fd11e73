"""LoRA with peft: the optimizer gets the adapters alone and keeps their average, which is what is saved.

Run it: python examples/hf_peft.py
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import fuseopt

STEPS = 20


def base_model():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(step):
    """Sequences that count modulo the size of the vocabulary."""
    starts = torch.randint(64, (8, 1), generator=torch.Generator().manual_seed(step))
    ids = (starts + torch.arange(16)) % 64
    return {"input_ids": ids, "labels": ids}


def train(optimizer_class=fuseopt.AdamW, **options):
    """(model, optimizer, the loss of every step)."""
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(base_model(), lora)
    adapters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = optimizer_class(adapters, lr=2e-2, weight_decay=0.1, **options)
    losses = []
    for step in range(STEPS):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, optimizer, losses


@torch.no_grad()
def evaluate(model):
    return model.eval()(**batch(STEPS)).loss.item()


if __name__ == "__main__":
    model, optimizer, losses = train(ema=fuseopt.EMA(0.8))
    with tempfile.TemporaryDirectory() as folder, optimizer.swap_ema():
        averaged = evaluate(model)
        model.save_pretrained(folder)  # the adapters' average, a few kilobytes
        loaded = evaluate(PeftModel.from_pretrained(base_model(), folder))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, of the average {averaged:.3f}, loaded again {loaded:.3f}")
