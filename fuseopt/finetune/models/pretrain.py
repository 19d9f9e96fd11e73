"""Makes the embedded network: the cnn of default size, trained on scikit-learn's digits 0 to 4.

python -m fuseopt.finetune.models.pretrain [--out FOLDER] [--seed 0] [--epochs 30]
"""

import argparse
import tempfile
from types import SimpleNamespace

from sklearn.metrics import accuracy_score
from transformers import Trainer, TrainingArguments, set_seed

from fuseopt.finetune.data import DataOptions, datasets, load, new_processor
from fuseopt.finetune.models import ModelOptions, save, start
from fuseopt.finetune.models.source import EMBEDDED


def pretrain(seed, epochs):
    """Train with the Trainer's own AdamW; return the model, its processor and its test accuracy."""
    set_seed(seed)
    options = SimpleNamespace(**vars(DataOptions(classes=list("01234"))), **vars(ModelOptions(pretrained="none")))
    data = load(options, seed)
    begun = start(options, data, lambda: new_processor(data, options))
    train, test, collate = datasets(data, begun.processor, options, seed)
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            scratch,
            seed=seed,
            use_cpu=True,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            weight_decay=0.01,
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
        )
        trainer = Trainer(begun.model, args, collate, train, test)
        trainer.train()
        found = trainer.predict(test)
    return begun.model, begun.processor, accuracy_score(found.label_ids, found.predictions.argmax(-1))


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m fuseopt.finetune.models.pretrain", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", default=EMBEDDED, help="the folder to write (default: the embedded one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=30)
    options = parser.parse_args(argv)
    model, processor, accuracy = pretrain(options.seed, options.epochs)
    save(model, processor, options.out)
    print(f"{options.out}: accuracy on the test part of digits 0 to 4: {accuracy:.4f}")


if __name__ == "__main__":
    main()
