"""`fuseopt finetune`: transformers' Trainer around a fused optimizer, with the verification beside it.

cli.py       the options, and every check that can be made before anything is written
data.py      images and labels in, training and test sets out
model.py     the small convolutional network and its safetensors files
train.py     the optimizer from the options; what the Trainer does not do by itself
compare.py   the same step as a torch recipe of separate passes, timed beside ours
report.py    summary table, plot, and files that are written whole or not at all
pretrain.py  makes the embedded checkpoint: python -m fuseopt.finetune.pretrain
"""

import importlib.util
import sys

EXTRAS = ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors")


def main(argv=None):
    """Run `fuseopt finetune` with these arguments and return its exit status (see fuseopt.__main__.main)."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        print(
            f"fuseopt finetune: {names} not installed: run pip install 'fuseopt[finetune]'", file=sys.stderr
        )
        return 2
    from fuseopt.finetune.cli import main as run

    return run(argv)
