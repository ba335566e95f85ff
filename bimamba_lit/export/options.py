"""What the options of ``bimamba export`` mean, the same in every format."""

from pathlib import Path

import torch

from bimamba_lit.errors import UserError, nearest

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def stored_dtype(name: str) -> torch.dtype:
    """Return the dtype that ``--dtype`` names.

    Raises:
        UserError: If it names none.
    """
    if name not in _DTYPES:
        raise UserError(f"dtype must be {', '.join(_DTYPES)}, not '{name}'{nearest(name, _DTYPES)}")
    return _DTYPES[name]


def check_is_file(out: Path, format: str) -> None:
    """Check before the work that a file can be written to ``out``.

    Raises:
        UserError: If a folder is there.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder, and {format} is one file: give its name too")
