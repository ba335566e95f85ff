"""Sharded checkpoints that are whole at any moment.

A folder cannot take the place of another one in one step, but a link to it can: ``last.ckpt`` is a link to one of two
folders beside it, and a checkpoint is written to the other. A run that is killed while it writes keeps the one before,
and so does one whose disk is full or lost, for any of its processes: it goes on and tries again.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.api import CheckpointException

from bimamba_lit.training.checkpoint_check import check_paths

_SLOTS = (".0.shards", ".1.shards")


class LinkedCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that writes sharded checkpoints, which are folders, aside.

    Attributes:
        failure: Why the last sharded checkpoint could not be written, a sentence; None where it could.
    """

    failure: str | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was remembered of earlier checkpoints."""
        check_paths(state_dict)
        super().load_state_dict(state_dict)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if not getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            super()._save_checkpoint(trainer, filepath)
            return
        try:
            with linked_folder(Path(filepath), trainer.is_global_zero) as folder:
                self._write(trainer, folder)
        except (OSError, CheckpointException) as error:
            self.failure = f"cannot write {filepath}: {_reason(error)}"
            if trainer.is_global_zero:
                print(f"bimamba: {self.failure}; the last checkpoint stays and training goes on", file=sys.stderr)
        else:
            self.failure, self._last_checkpoint_saved = None, filepath

    def _write(self, trainer: pl.Trainer, folder: Path) -> None:
        try:
            super()._save_checkpoint(trainer, str(folder))
        except (OSError, RuntimeError) as error:  # of the first process alone, which writes what is not sharded
            trainer.strategy.barrier()  # at which the others wait for it
            raise OSError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """Return why something could not be written; of what processes tell each other, what the first one met."""
    if isinstance(error, CheckpointException):
        met = [found for found, _ in error.failures.values()]
        if not all(isinstance(found, Exception) for found in met):
            raise error
        return _reason(met[0])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
        return "the disk is full, or takes no more for another reason"  # torch.save hides what the file said
    return (str(error).strip() or repr(error)).splitlines()[0]


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
    try:
        yield free
    except BaseException:
        if writes_link:
            shutil.rmtree(free, ignore_errors=True)  # which leaves room for what else is to be written
        raise
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
