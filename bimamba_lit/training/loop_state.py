"""Where in its loops a checkpoint says that training stood.

Lightning resumes exactly from a checkpoint written after a batch, but for two cases. Where a validation is due after
the batch, a resumed run leaves it out; here it is written as begun and not ended, and is run again from its start.
After the last batch of an epoch the resumed run counts the epoch twice; here the progress is moved on to the start of
the next, from which it resumes exactly.
"""

from typing import Any

import lightning.pytorch as pl

_COUNTS = ("ready", "started", "processed", "completed")


def accumulating(trainer: pl.Trainer) -> bool:
    """Say, at the end of a batch, whether there are gradients of an optimizer step still to be taken."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Say, at the end of a batch, whether a validation follows."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def count_last_step(trainer: pl.Trainer) -> None:
    """Count the step and the epoch that a run with nothing left to train had ended with, as its end would have done."""
    loop: Any = trainer.fit_loop.epoch_loop
    epochs: Any = trainer.fit_loop.epoch_progress.current
    validation = loop.val_loop.batch_progress.total
    if validation.ready == validation.completed:  # else they were to be counted after the validation
        loop._batches_that_stepped = trainer.global_step
        epochs.processed = epochs.completed = epochs.started


def mend_loops(checkpoint: dict[str, Any], validation_due: bool, epoch_through: bool) -> None:
    """Have a checkpoint written after a batch say where training goes on.

    Args:
        checkpoint: The checkpoint, changed in place.
        validation_due: Whether a validation is due after the batch.
        epoch_through: Whether the batch is the last of its epoch.
    """
    fit = checkpoint["loops"]["fit_loop"]
    batches, validation = fit["epoch_loop.batch_progress"], fit["epoch_loop.val_loop.batch_progress"]
    for span in ("total", "current"):
        validation[span].update(dict.fromkeys(_COUNTS, 0))
    validation["is_last_batch"] = False
    if epoch_through:
        fit["state_dict"]["combined_loader"] = []  # the loader has nothing left: the next epoch takes a new one
    if validation_due:
        validation["total"].update(ready=1, started=1)
    if validation_due or epoch_through:
        for span in ("total", "current"):
            batches[span]["completed"] = batches[span]["processed"]
    batches["total"]["started"] = batches["total"]["ready"]
    for span in ("total", "current"):
        fit["epoch_progress"][span]["ready"] = fit["epoch_progress"][span]["started"]
    if epoch_through and not validation_due:
        batches["total"]["started"] -= 1  # else Lightning takes it for the end of a run and does not count the step
        batches["is_last_batch"] = False
        batches["current"].update(dict.fromkeys(_COUNTS, 0))
        for span in ("total", "current"):
            epochs = fit["epoch_progress"][span]
            epochs["processed"] = epochs["completed"] = epochs["started"]
            epochs["ready"] = epochs["started"] + 1
