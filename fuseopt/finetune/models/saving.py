"""Save a model and its processor as a folder that from_pretrained reads."""

import copy
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from fuseopt.finetune.models import lora
from fuseopt.finetune.models.messages import quiet


def save(model, processor, folder):
    """Write the model (LoRA merged into it, and beside it in adapter/) and its processor, in place of `folder`.

    The folder is whole or not there. Raises OSError, on a full disk for example.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch, quiet():
        new = Path(scratch) / folder.name
        try:
            if lora.is_wrapped(model):
                model.save_pretrained(new / "adapter", save_embedding_layers=False)
                model = copy.deepcopy(model).merge_and_unload()
            model.save_pretrained(new)
            processor.save_pretrained(new)
        except SafetensorError as error:  # in place of the OSError behind it
            raise OSError(f"{folder}: {error}") from error
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
