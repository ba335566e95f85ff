"""Logs that a resumed run continues as if it had never stopped.

A checkpoint is written before Lightning logs the step it was written after, and a kill in between would lose the row.
So the checkpoint carries the newest row; a resumed run cuts ``metrics.csv`` back to that step and logs its row again.
What comes later for the same step, such as a validation that is run again, joins it.
"""

from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from bimamba_lit.errors import UserError
from bimamba_lit.training.csv_logger import CSVLogger, MetricsFile
from bimamba_lit.training.loop_state import count_last_step, validation_is_due
from bimamba_lit.training.tensorboard import purge


class ResumedLogs(pl.Callback):
    """Cuts logs back to the step that training starts at, and keeps the row of the last step in checkpoints."""

    def __init__(self) -> None:
        self._row: dict[str, float] = {}
        self._begun = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin once in every fit."""
        self._begun = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on after the step of the checkpoint."""
        self._begin(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do so where there was nothing left to train."""
        if not self._begun:
            count_last_step(trainer)
        self._begin(trainer)

    def on_rewind(self, trainer: pl.Trainer) -> None:
        """Cut logs back to the step that training was taken back to."""
        _cut(trainer, trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have what is logged outlast what the checkpoint does; see to it that its row is in the checkpoint."""
        for logger in trainer.loggers:
            logger.save()
        with suppress(UserError):  # said already; the checkpoint is worth trying
            for file in _files(trainer):
                file.sync()
        checkpoint["callbacks"][self.state_key] = {"row": self._last_row(trainer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the row of a checkpoint."""
        self._row = state_dict["row"]

    def _begin(self, trainer: pl.Trainer) -> None:
        if self._begun:
            return
        self._begun = True
        step = max(trainer.global_step - 1, 0)
        _cut(trainer, step)
        if self._row:
            for logger in trainer.loggers:
                logger.log_metrics(self._row, step)
        self._row = {}

    def _last_row(self, trainer: pl.Trainer) -> dict[str, float]:
        row: dict[str, float] = {}
        for file in _files(trainer):
            row |= file.row(trainer.global_step - 1)
        connector = trainer._logger_connector
        logged = connector.metrics["log"] if trainer.training and connector.should_update_logs else {}
        row |= {name: float(value) for name, value in logged.items()}
        if logged or validation_is_due(trainer):
            row.setdefault("epoch", trainer.current_epoch)  # as Lightning does
        return row


def _cut(trainer: pl.Trainer, step: int) -> None:
    """Have ``metrics.csv`` keep the rows of the steps that are taken, and TensorBoard those before ``step``."""
    for file in _files(trainer):
        file.begin(trainer.global_step)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            purge(logger, step)


def _files(trainer: pl.Trainer) -> list[MetricsFile]:
    loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []
