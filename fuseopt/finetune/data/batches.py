"""Torch data sets with the inputs that transformers' models take, and their collate function."""

import torch
from transformers import DataCollatorWithPadding, TrainerCallback, default_data_collator

from fuseopt.finetune.data.augment import augment
from fuseopt.finetune.data.pixels import Pixels
from fuseopt.finetune.data.texts import new_tokenizer


def new_processor(data, options):
    """What turns the rows into inputs of a model from scratch, fitted to the training part alone."""
    if data.kind == "text":
        return new_tokenizer([row["text"] for row in data.train], options)
    return Pixels.fit([row["image"] for row in data.train])


class ImageRows(torch.utils.data.Dataset):
    """{"pixel_values": float32 (C, H, W), "labels": int} by row; `names` are the augmentations."""

    def __init__(self, rows, pixels, names=(), seed=0):
        self.rows, self.pixels, self.names, self.seed = rows, pixels, tuple(names), seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on

    def set_epoch(self, epoch):
        """Choose the augmentations of this epoch."""
        self._epoch.fill_(epoch)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        image = row["image"]
        if self.names:
            image = augment(image, self.names, self.seed, int(self._epoch), int(index))
        return {"pixel_values": self.pixels(image), "labels": row["labels"]}


class SetEpoch(TrainerCallback):
    """Tells the training rows their epoch. A Trainer needs it for runs that resume to repeat their augmentations.

    accelerate tells a data set too, but not in an epoch that is resumed half-way, and not under torchrun: where
    the batch sampler is wrapped, its DataLoaderShard.set_epoch reaches the sampler only.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class TextRows(torch.utils.data.Dataset):
    """{"input_ids", "attention_mask": lists of int, "labels": int} by row, not yet padded."""

    def __init__(self, rows, tokenizer, max_length):
        length = min(max_length, tokenizer.model_max_length)
        # An empty batch is not tokenised: tokenizers differ in what they return for it.
        texts = [row["text"] for row in rows]
        self.columns = dict(tokenizer(texts, truncation=True, max_length=length)) if texts else {}
        self.columns["labels"] = [row["labels"] for row in rows]

    def set_epoch(self, epoch):
        """Nothing depends on the epoch."""

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


def datasets(data, processor, options, seed):
    """(train, test, collate) for a Trainer; only train augments, and its set_epoch chooses how.

    Batches: pixel_values float32 (N, C, H, W), or input_ids and attention_mask int64 (N, longest of the batch);
    labels int64 (N,). Raises ValueError if the processor does not fit the data.
    """
    if data.kind == "text":
        if processor.pad_token is None:
            raise ValueError("--model: its tokenizer has no padding token; set pad_token in its files")
        rows = (TextRows(part, processor, options.max_length) for part in (data.train, data.test))
        return *rows, DataCollatorWithPadding(processor)
    try:
        processor.check(data.shape)
    except ValueError as error:
        raise ValueError(f"--data {options.data}: {error}") from error
    train = ImageRows(data.train, processor, options.augment, seed)
    return train, ImageRows(data.test, processor), default_data_collator
