"""Save a model and its processor as a folder that from_pretrained reads."""

import copy

from fuseopt.finetune.models import lora


def save(model, processor, folder):
    """Write the model (LoRA merged into it, and beside it in adapter/) and its processor into the Path `folder`."""
    if lora.is_wrapped(model):
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
