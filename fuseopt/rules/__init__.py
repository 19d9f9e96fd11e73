"""The update rules, one file each: options, slots, torch reference and the public class."""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .lion import Lion
from .nadam import NAdam
from .sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "NAdam"]

ALL = (AdamW, Adam, SGD, NAdam, Adagrad, Lion)
