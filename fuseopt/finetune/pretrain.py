"""Makes the embedded checkpoint: DigitNet trained on scikit-learn's digits 0 to 4.

python -m fuseopt.finetune.pretrain [--out PATH] [--seed 0] [--epochs 30]
"""

import argparse
import tempfile
from pathlib import Path

from safetensors.torch import save
from sklearn.metrics import accuracy_score
from transformers import Trainer, TrainingArguments, set_seed

from fuseopt.finetune.data import embedded_digits
from fuseopt.finetune.folder import write_all
from fuseopt.finetune.model import EMBEDDED, DigitNet


def pretrain(seed, epochs):
    """Train on digits 0 to 4 with the Trainer's own AdamW; return the model and its test accuracy."""
    set_seed(seed)
    data = embedded_digits(0, 4, seed)
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
        )
        trainer = Trainer(DigitNet(len(data.names)), args, train_dataset=data.train, eval_dataset=data.test)
        trainer.train()
        found = trainer.predict(data.test)
    return trainer.model, accuracy_score(found.label_ids, found.predictions.argmax(-1))


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m fuseopt.finetune.pretrain", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--out", default=EMBEDDED, help="the safetensors file to write (default: the embedded one)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=30)
    options = parser.parse_args(argv)
    model, accuracy = pretrain(options.seed, options.epochs)
    out = Path(options.out)
    write_all(out.parent, {out.name: lambda path: path.write_bytes(save(model.state_dict()))})
    print(f"{options.out}: accuracy on the test part of digits 0 to 4: {accuracy:.4f}")


if __name__ == "__main__":
    main()
