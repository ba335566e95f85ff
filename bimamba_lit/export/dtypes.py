"""The types of numbers a file can hold, by name."""

import torch

from bimamba_lit.errors import UserError, nearest

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def dtype_named(name: str) -> torch.dtype:
    """Return the type of a name.

    Raises:
        UserError: If there is none.
    """
    if name not in DTYPES:
        raise UserError(f"dtype is '{name}', and a file holds {', '.join(DTYPES)}{nearest(name, DTYPES)}")
    return DTYPES[name]
