"""Writing files so that a reader sees the old content or the new, never half of it."""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bimamba_lit.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to, and move it into place when the block ends well.

    Args:
        path: The file to create or replace; its folder is created, and taken back if it stays empty.

    Raises:
        UserError: If the folder or the file cannot be written (a full disk, a file in the way, missing rights).
            The file that was there is left as it was.
    """
    target = Path(path)
    temporary = None
    made: list[Path] = []
    try:
        made = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {_why(error, target)}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        with suppress(OSError):  # a folder with something in it stays
            for folder in made:
                folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write a value of plain types as JSON, which has no word for infinity or NaN: they are written as strings.

    Raises:
        UserError: As :func:`replacing`.
    """
    text = json.dumps(_without_nonfinite(value), indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nonfinite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def remove_partial(folder: Path, name: str = "*") -> None:
    """Remove what a process that was killed while it wrote, a file of that name or any, has left in a folder."""
    for path in folder.glob(f".{name}.*{_PARTIAL}"):
        with suppress(OSError):
            path.unlink()


@contextmanager
def replacing_all(folder: Path, names: Iterable[str]) -> Iterator[dict[str, Path]]:
    """Yield temporary paths to write a folder's files to, by name, and move all into place when the block ends well.

    All are written before the first is moved, so that a full disk leaves what was there whole.

    Raises:
        UserError: As :func:`replacing`; and if the folder is a file, or holds weights in files of other names, which
            would be read with the new files as if they belonged to them.
    """
    names = list(names)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot save the model to {folder}: it is a file, and a folder is needed")
    weights = {path.name for pattern in _WEIGHTS for path in folder.glob(pattern)}
    if others := sorted(weights - set(names)):
        raise UserError(f"{folder} holds {others[0]}, weights of another form; give a new folder, or remove them")
    with ExitStack() as stack:
        yield {name: stack.enter_context(replacing(folder / name)) for name in names}


_PARTIAL = ".partial"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")


def _why(error: OSError, target: Path) -> str:
    """Return why a file could not be written; of a file in the place of a folder the system says what but not where."""
    in_the_way = [folder for folder in target.parents if folder.exists() and not folder.is_dir()]
    return f"{in_the_way[0]} is a file, and a folder is needed" if in_the_way else error.strerror or str(error)


def _sync_folder(folder: Path) -> None:
    """Have the new name outlast a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
