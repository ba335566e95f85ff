"""Unpacking signs by a table of the 256 bytes: one copy of eight numbers a byte instead of arithmetic on every bit."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bimamba_lit.kernels.signs import naive


def byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (256, 8): the eight signs, +1 or -1, that each byte holds."""
    return naive.unpack_signs(torch.arange(256, dtype=torch.uint8, device=device)[:, None], 8, dtype)


def unpack_signs(signs: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute what `naive.unpack_signs` computes."""
    return look_up_signs(signs, in_features, byte_table(dtype, signs.device))


def look_up_signs(signs: Tensor, in_features: int, table: Tensor) -> Tensor:
    """Compute what `naive.unpack_signs` computes by a `byte_table` that was made before."""
    return F.embedding(signs.int(), table).flatten(-2)[..., :in_features].contiguous()
