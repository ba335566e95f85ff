"""Second signs: words of 32 inputs that a packed layer has once more behind the others, chosen by a bitmap.

Legend: I inputs, k of them with a second sign.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bimamba_lit.kernels.signs.naive import unpack_signs


def with_doubled(x: Tensor, doubled: Tensor) -> Tensor:
    """Put the doubled inputs behind ``x`` ``(..., I)``: ``(..., I + k)``."""
    return torch.cat([x, x.index_select(-1, doubled)], -1)


def chosen_inputs(bitmap: Tensor, inputs: int, k: int) -> Tensor:
    """Return the ``k`` inputs, rising, whose words' bits are 1 in the bitmap of a layer of ``inputs``: int64."""
    words = unpack_signs(bitmap, inputs // 32, torch.int8).sort(stable=True, descending=True).indices[: k // 32]
    return (32 * words[:, None] + torch.arange(32, device=bitmap.device)).flatten()


def whole_shift(in_shift: Tensor, inputs: int) -> Tensor:
    """Return the shift ``(I + k,)`` of all inputs, 0 behind the first ones if it is theirs; one for all stays so."""
    missing = inputs - in_shift.shape[0]
    return in_shift if missing == 0 or in_shift.shape[0] == 1 else F.pad(in_shift, [0, missing])
