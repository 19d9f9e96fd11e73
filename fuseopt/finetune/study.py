"""The optuna study of a search, kept in a journal in its output folder."""

import json

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from fuseopt.finetune.folder import clear, refuse_used

JOURNAL = "search.journal"
OUTPUTS = (JOURNAL, "trial-[0-9]*", "trials.*", "best.yaml")


def open_study(folder, direction, same, again, overwrite):
    """The study in `folder`: continued if `again`, else new, in place of an old one if `overwrite`.

    same: plain data that a continued search must have in common with the one that it continues. Raises ValueError.
    """
    journal, same = folder / JOURNAL, json.loads(json.dumps(same))
    refuse_used(folder, again or overwrite, "--continue to go on")
    if again and not journal.is_file():
        raise ValueError(f"--continue: there is no search in {folder}, no {JOURNAL}")
    if again:
        _drop_torn_line(journal)
    else:
        clear(folder, OUTPUTS)
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="search",
            direction=direction,
            load_if_exists=again,
        )
    except Exception as error:  # whatever optuna makes of a damaged file
        raise ValueError(f"--continue: {journal} is damaged: start anew with --overwrite ({error})") from error
    for name, value in same.items():
        before = study.user_attrs.get(name, value)
        if before != value:
            raise ValueError(f"--continue: the search was started with {name} {before}, now it is {value}")
        study.set_user_attr(name, value)
    return study


def _drop_torn_line(journal):
    """A process that was killed while it wrote leaves half a line, which optuna would refuse."""
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        journal.write_bytes(whole)
