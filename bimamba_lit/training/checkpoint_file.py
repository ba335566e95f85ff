"""Checkpoint files: written whole or not at all, and the newest whole one found again."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from bimamba_lit.errors import UserError
from bimamba_lit.files import replacing
from bimamba_lit.models.plain_pickle import load_plain
from bimamba_lit.models.sharded_folder import check_sharded, load_meta

EXACT = "resumes_exactly"
"""The key of a checkpoint that training goes on from as if it had never stopped."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside, syncs and renames it; where that fails, training goes on and older ones stay.

    Attributes:
        failure: Why the last checkpoint could not be written, a sentence; None where it could.
    """

    failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, or say in one line why it could not be."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                _save(checkpoint, file)
        except UserError as error:
            self.failure = str(error)
            print(f"bimamba: {error}; the last checkpoint stays and training goes on", file=sys.stderr)
        else:
            self.failure = None

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove an older checkpoint, unless the one to replace it could not be written."""
        if self.failure is None:
            super().remove_checkpoint(path)


def _save(checkpoint: dict[str, Any], file: Any) -> None:
    """Write a checkpoint; torch's own error hides the one of the file."""
    watched: Any = _Watched(file)
    try:
        torch.save(checkpoint, watched)
    except Exception:
        if watched.error is not None:
            raise watched.error from None
        raise


class _Watched:
    """A file that remembers why it could not be written."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def newest_whole(folder: Path, last: str) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a folder that training resumes exactly from, and what is wrong with newer.

    Args:
        folder: The folder of checkpoints.
        last: The name of the checkpoint that is always one to resume from; others must say so themselves.
    """
    broken = []
    for path in _newest_first(folder, last):
        reason, content = _read(path)
        if reason is not None:
            broken.append(f"{path} is broken ({reason})")
        elif path.name == last or content.get(EXACT):
            return path, broken
    return None, broken


def _newest_first(folder: Path, last: str) -> Iterator[Path]:
    there = (path for path in folder.glob("*.ckpt") if path.exists())  # a link may lead nowhere
    found = sorted(there, key=lambda path: (path.stat().st_mtime_ns, path.name == last))
    yield from reversed(found)


def _read_sharded(path: Path) -> tuple[str | None, dict[str, Any]]:
    try:
        check_sharded(path)
        return None, load_meta(path)
    except UserError as error:
        return str(error).partition("; ")[0], {}


def _read(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Return why a checkpoint is not whole, or None, and what it holds."""
    if path.is_dir():
        return _read_sharded(path)
    if not path.stat().st_size:
        return "it is empty", {}
    try:
        path.open("rb").close()
        content = load_plain(path, "another")
    except OSError as error:
        return error.strerror or str(error), {}
    except UserError as error:
        return f"it {str(error).removeprefix(f'{path} ').partition('; ')[0]}", {}
    return (None, content) if isinstance(content, dict) else ("it is no checkpoint", {})
