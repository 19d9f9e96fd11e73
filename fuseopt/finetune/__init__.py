"""`fuseopt finetune`: transformers' Trainer around a fused optimizer, with the verification beside it.

cli.py       the options, and every check that can be made before anything is written
data.py      images and labels in, training and test sets out
model.py     the small convolutional network and its safetensors files
train.py     the optimizer from the options; what the Trainer does not do by itself
compare.py   the same step as a torch recipe of separate passes, timed beside ours
report.py    summary table, plot, and files that are written whole or not at all
pretrain.py  makes the embedded checkpoint: python -m fuseopt.finetune.pretrain
"""

import importlib
import importlib.util
import sys

EXTRAS = ("transformers", "accelerate", "sklearn", "matplotlib", "safetensors")
COMMANDS = {  # the module of a command, and what else has to be installed
    "finetune": ("cli", ()),
    "compare": ("compare", ()),
    "search": ("search", ("optuna", "yaml")),
}


def main(argv=None, command="finetune"):
    """Run `fuseopt COMMAND` with these arguments and return its exit status (see fuseopt.__main__.main)."""
    module, more = COMMANDS[command]
    missing = [name for name in (*EXTRAS, *more) if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        print(f"fuseopt {command}: {names} not installed: run pip install 'fuseopt[finetune]'", file=sys.stderr)
        return 2
    return importlib.import_module(f"fuseopt.finetune.{module}").main(argv)
