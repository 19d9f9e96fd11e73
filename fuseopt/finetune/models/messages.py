"""What transformers says, made short."""

import contextlib

from transformers.utils import logging


@contextlib.contextmanager
def quiet():
    """Without its progress bars and its table of what it loaded, which weights.py judges."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_sentence(error):
    """The start of a message, which may go on for lines."""
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
