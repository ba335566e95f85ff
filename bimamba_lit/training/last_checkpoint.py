"""The checkpoint that a run is resumed from, and the stop that leaves one behind.

Unless a figure is monitored, checkpoints are written after a batch only, and only where no gradients wait for more
batches of their step: there Lightning can be made to resume exactly (:mod:`loop_state`).

A signal that asks the run to stop is heeded at the next such place: a checkpoint is written, every callback and logger
does what it has to do after the batch, and before the next one the run stops. Within a validation it stops between two
batches and leaves a checkpoint from which that validation is run again; a validation amid the batches of a step has to
be ended first. Ranks agree, so that all stop at one step.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io import TorchCheckpointIO

from bimamba_lit.data.stream import refuse_shuffle_buffer
from bimamba_lit.errors import UserError
from bimamba_lit.files import remove_partial
from bimamba_lit.interruption import Interrupted, interruption
from bimamba_lit.training.checkpoint_file import EXACT, WholeCheckpointIO
from bimamba_lit.training.linked_checkpoint import LinkedCheckpoint
from bimamba_lit.training.loop_state import accumulating, mend_loops, validation_is_due


class LastCheckpoint(LinkedCheckpoint):
    """Saves as often as ``ModelCheckpoint`` would, at the last step and when asked to stop; it takes its arguments.

    With ``monitor`` it is ``ModelCheckpoint`` itself; better leave that to a second one among ``trainer.callbacks``.

    Attributes:
        saved_step: The optimizer step of the newest checkpoint, written or resumed from; None before the first.
        stops: Whether all ranks have agreed to stop.
    """

    saved_step: int | None = None
    stops = False
    _writes = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have checkpoints written whole, and clear away what a kill left of one."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        if stage == "fit" and trainer.is_global_zero:
            for folder in {Path(str(self.dirpath)), Path(trainer.default_root_dir)}:
                remove_partial(folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for signals here from now on."""
        super().on_train_start(trainer, pl_module)
        self.stops, interruption.waits = False, True
        self._last_global_step_saved = trainer.global_step
        for loader in getattr(trainer.fit_loop._combined_loader, "flattened", []):
            refuse_shuffle_buffer(loader)
        if trainer.ckpt_path and Path(str(self.dirpath)) in Path(trainer.ckpt_path).parents:
            self.saved_step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop if the batch before left a checkpoint to stop with."""
        if self.stops:
            raise Interrupted

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a checkpoint is due, an epoch is through, the run ends or is asked to stop."""
        if accumulating(trainer):
            return
        self.stops = _asked(trainer)
        self._writes = self.monitor is None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        last = trainer.global_step == trainer.max_steps or last_epoch
        epochs = self._every_n_epochs
        epoch_is_due = epochs > 0 and trainer.is_last_batch and (trainer.current_epoch + 1) % epochs == 0
        if self.monitor is None and (epoch_is_due or last or self.stops):
            self._save(trainer)
        self._writes = False
        if last:
            self._refuse_unwritten(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if a figure is monitored."""
        if self.monitor is not None:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop a validation between two of its batches."""
        self.stops = not accumulating(trainer) and _asked(trainer)
        if self.stops:
            raise Interrupted

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if a figure is monitored."""
        if self.monitor is not None:
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the weights that training ended with, where something else than its length ended it."""
        super().on_train_end(trainer, pl_module)
        if self.monitor is None:
            self._save(trainer)
            self._refuse_unwritten(trainer)
        interruption.waits = False
        self.stops = self.stops or _asked(trainer)
        if self.stops:
            raise Interrupted

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save where the run was asked to stop within a validation."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, Interrupted) and self.monitor is None and self.stops and trainer.validating:
            self._writes = True
            self._save(trainer)
            self._writes = False
        interruption.waits = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have a checkpoint of this callback's say where training goes on."""
        if self._writes:
            mend_loops(checkpoint, validation_is_due(trainer), trainer.is_last_batch)
            checkpoint[EXACT] = True

    def _save(self, trainer: pl.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            named = self._monitor_candidates(trainer)  # what a file name may hold: step and epoch
            self._save_topk_checkpoint(trainer, named)
            self._save_last_checkpoint(trainer, named)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self._why_unwritten(trainer) is None:
            self.saved_step = trainer.global_step

    def _refuse_unwritten(self, trainer: pl.Trainer) -> None:
        """Raise if the weights that training ended with could not be written."""
        if (failure := trainer.strategy.broadcast(self._why_unwritten(trainer))) is not None:
            raise UserError(f"{failure}: training is through but not saved; with space, --ckpt_path last goes on")

    def _why_unwritten(self, trainer: pl.Trainer) -> str | None:
        io = trainer.strategy.checkpoint_io
        return self.failure or (io.failure if isinstance(io, WholeCheckpointIO) else None)


def _asked(trainer: pl.Trainer) -> bool:
    """Say, on all ranks alike, whether any of them was asked to stop."""
    asked = interruption.asked is not None
    return trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked
