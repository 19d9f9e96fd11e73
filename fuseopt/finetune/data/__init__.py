"""Data for the harness: rows in, training and test sets and their batches out.

load.py     the options, and `load`: which source, which classes, which part is the test
source.py   what every reader returns, and how broken rows are reported
images.py   readers of images: digits, .npz, CIFAR-10 files, folders by class
texts.py    readers of texts: the embedded sentences, CSV, JSON lines; cleaning; a tokenizer for small models
hub.py      reader of Hugging Face data sets in a local folder
parts.py    Data, stratified split, folds and shares
pixels.py   size and normalisation of images, kept beside a model
augment.py  changes of training images, a pure function of (seed, epoch, row)
batches.py  torch data sets and their collate function
"""

from fuseopt.finetune.data.batches import SetEpoch, datasets, new_processor
from fuseopt.finetune.data.load import DataOptions, load
from fuseopt.finetune.data.parts import Data, folds, shares, split
from fuseopt.finetune.data.pixels import Pixels

__all__ = ["Data", "DataOptions", "Pixels", "SetEpoch", "datasets", "folds", "load", "new_processor", "shares", "split"]
