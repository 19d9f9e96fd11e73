"""The tokenizer or the normalisation that belongs to a model: the checkpoint's own where it brings one."""

from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import cached_file

from fuseopt.finetune.checks import first_sentence
from fuseopt.finetune.data import Pixels

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")


def find(found, data, new_processor):
    """The processor of the Source `found`, or a new one; ValueError for weights of text without their tokenizer."""
    names = TOKENIZER_FILES if data.kind == "text" else ("preprocessor_config.json",)
    for place in found.processors:
        file = next(filter(None, (_file(place, name) for name in names)), None)
        if file is not None and data.kind == "text":
            return _tokenizer(place, found)
        if file is not None:
            return _pixels(Path(file).parent, found, data)
    if data.kind == "text" and found.has_weights:
        raise ValueError(f"{found}: there is no tokenizer with these weights: give the folder that has both")
    return new_processor()


def _file(place, name):
    """The path of a file of this folder, or of this model of the hub; None where it has none."""
    return cached_file(place, name, local_files_only=Path(place).is_dir(), _raise_exceptions_for_missing_entries=False)


def _tokenizer(place, found):
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=Path(place).is_dir(), trust_remote_code=False)
    except Exception as error:  # whatever the libraries make of damaged files
        raise ValueError(f"{found}: its tokenizer cannot be read: {first_sentence(error)}") from error


def _pixels(folder, found, data):
    try:
        pixels = Pixels.from_pretrained(folder)
        pixels.check(data.shape)
    except ValueError as error:
        raise ValueError(f"{found}: {error}") from error
    return pixels


def fit(tokenizer, found):
    """Settle the padding of a tokenizer without any (GPT's), the longest text, and that the words fit the model."""
    config = found.config.get_text_config()
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{found}: the tokenizer has neither a padding nor an end token: set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    found.config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{found}: the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: they do not belong "
            "together"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest and tokenizer.model_max_length > longest:
        tokenizer.model_max_length = longest


def image_shape(pixels):
    """(C, H, W) of the images as the model gets them."""
    return (len(pixels.mean), *pixels.size)
