"""Sharded checkpoints that are whole at any moment.

A folder cannot take the place of another one in one step, but a link to it can: ``last.ckpt`` is a link to one of two
folders beside it, and a checkpoint is written to the other. A run that is killed while it writes keeps the one before.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

_SLOTS = (".0.shards", ".1.shards")


class LinkedCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that writes sharded checkpoints, which are folders, aside."""

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if not getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            super()._save_checkpoint(trainer, filepath)
            return
        with linked_folder(Path(filepath), trainer.is_global_zero) as folder:
            super()._save_checkpoint(trainer, str(folder))
        self._last_checkpoint_saved = filepath


@contextmanager
def linked_folder(link: Path, writes_link: bool = True) -> Iterator[Path]:
    """Yield the folder to write a checkpoint to; when the block ends without an error, ``link`` leads to it.

    Args:
        link: The checkpoint's path.
        writes_link: Whether this is the process that clears the folder and moves the link; one of a run.
    """
    slots = [link.with_suffix(suffix) for suffix in _SLOTS]
    free = slots[1] if link.is_symlink() and link.readlink().name == slots[0].name else slots[0]
    if writes_link:
        shutil.rmtree(free, ignore_errors=True)
    yield free
    if not writes_link:
        return
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)  # written without a link, by Lightning itself
    moved = link.with_suffix(".link")
    moved.unlink(missing_ok=True)
    moved.symlink_to(free.name)
    os.replace(moved, link)
    for slot in slots:
        if slot != free:
            shutil.rmtree(slot, ignore_errors=True)
