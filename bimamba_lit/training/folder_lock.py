"""Keeping a run folder to one process: two that start at the same moment would both find it free."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bimamba_lit.errors import UserError
from bimamba_lit.training.run_folder import refuse_begun

_PATIENCE = 10.0  # seconds; a killed run's data workers, which hold its lock too, notice within five


@contextmanager
def locked(folder: Path, config: dict[str, Any]) -> Iterator[None]:
    """Keep other processes from training in a run folder while the block runs.

    The lock is on the folder itself, so that no file is left, and ends with the process however it ends. Where the
    system or the disk has no such locks, there is none.

    Args:
        folder: The run folder, which is made.
        config: The configuration of the run that was chosen for it.

    Raises:
        UserError: If another process trains there, or a run that this one must not touch has begun or come to its end
            there since the folder was chosen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _wait(handle, folder)
        refuse_begun(folder, config)
        yield
    finally:
        os.close(handle)


if sys.platform != "win32":
    import fcntl

    def _wait(handle: int, folder: Path) -> None:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"another process trains in {folder}: wait for its end, or choose another "
                        "--trainer.default_root_dir"
                    ) from None
            except OSError:  # a file system without locks on folders
                return None
            time.sleep(0.1)
