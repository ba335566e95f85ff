"""The checkpoint a run is resumed from.

Lightning resumes exactly from a checkpoint written after a training batch, unless that batch is the last of an epoch:
then, and from one written at the end of an epoch, it counts the epoch twice, and the resumed run sees other data than
one never stopped. From the start of an epoch it resumes exactly. So here, unless a figure is monitored, checkpoints are
written after a batch only, and after the last of an epoch the progress in it is moved on to the start of the next.
"""

from typing import Any

import lightning.pytorch as pl

from bimamba_lit.training.linked_checkpoint import LinkedCheckpoint


class LastCheckpoint(LinkedCheckpoint):
    """Saves as often as ``ModelCheckpoint`` would, at the last step and on SIGTERM; it takes its arguments.

    With ``monitor`` it is ``ModelCheckpoint`` itself; better leave that to a second one among ``trainer.callbacks``.
    """

    _epoch_is_through = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a checkpoint is due, an epoch is through or the run ends."""
        self._epoch_is_through = trainer.is_last_batch
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        epochs = self._every_n_epochs
        epoch_is_due = epochs > 0 and trainer.is_last_batch and (trainer.current_epoch + 1) % epochs == 0
        due = epoch_is_due or trainer.global_step == trainer.max_steps or trainer.received_sigterm
        if self.monitor is None and due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, {})
            self._save_last_checkpoint(trainer, {})
        self._epoch_is_through = False

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if a figure is monitored."""
        if self.monitor is not None:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if a figure is monitored."""
        if self.monitor is not None:
            super().on_validation_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Move the progress on to the start of the next epoch where this one is through."""
        if not self._epoch_is_through:
            return
        fit = checkpoint["loops"]["fit_loop"]
        fit["state_dict"]["combined_loader"] = []  # the loader has nothing left: the next epoch takes a new one
        fit["epoch_loop.batch_progress"]["is_last_batch"] = False
        for span in ("total", "current"):
            batches, epochs = fit["epoch_loop.batch_progress"][span], fit["epoch_progress"][span]
            batches["completed"] = batches["processed"]
            if span == "current":
                batches.update(dict.fromkeys(batches, 0))
            epochs["processed"] = epochs["completed"] = epochs["started"]
            epochs["ready"] = epochs["started"] + 1
