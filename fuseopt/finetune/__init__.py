"""`fuseopt finetune`: transformers' Trainer around a fused optimizer, with the verification beside it.

options.py   every option, from the files that use them; --config
prepare.py   every check that can be made before anything is written
cli.py       one run, or several: folds.py, search.py (with space.py, study.py)
data/        images or text in, training and test rows out
models/      the small models, transformers' own, checkpoints, heads, LoRA
optim.py     the optimizer, its groups and stages; schedule.py, loss.py, teacher.py, communication.py
train.py     what the Trainer does not do by itself; callbacks.py
quantize.py  8-bit weights
report.py    evaluation, summary table and files; measure.py, plot.py, table.py
timing.py    the same step as a torch recipe of separate passes, timed beside ours
folder.py    the output folder; resume.py
compare.py   `fuseopt compare`: a table and a plot of several runs
"""

import importlib.util
import logging
import os
import sys

# {module: the package that has it}
EXTRAS = {
    "transformers": "transformers",
    "accelerate": "accelerate",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
}


def missing_extras(prog, more=None):
    """Say on standard error which packages `prog` lacks, of EXTRAS and {module: package}; returns whether any is."""
    names = [package for module, package in (EXTRAS | (more or {})).items() if importlib.util.find_spec(module) is None]
    if names:
        these = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not installed"
        print(f"{prog}: {these}: run pip install 'fuseopt[finetune]'", file=sys.stderr)
    return bool(names)


def quiet_imports():
    """Where torchao is installed, transformers imports it, and it says at length which CUDA files it cannot load."""
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
