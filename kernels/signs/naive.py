"""Packing signs to bits and back: the definition.

Legend: O out features, I in features. Bit i % 8 of byte i // 8 holds the sign of input i.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_signs(w: Tensor) -> Tensor:
    """Pack (..., I) to (..., ceil(I / 8)) uint8: a bit is 1 where w > 0; padding bits are 0."""
    bits = F.pad((w > 0).to(torch.uint8), (0, -w.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = torch.zeros_like(bits[..., 0])
    for bit in range(8):
        packed |= bits[..., bit] << bit
    return packed


def unpack_signs(signs: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack (..., ceil(I / 8)) uint8 to (..., I) of +1 and -1 in `dtype`."""
    places = torch.arange(8, dtype=torch.uint8, device=signs.device)  # made there: a CUDA graph can record it
    bits = (signs[..., None] >> places & 1).flatten(-2)[..., :in_features]
    return bits.to(dtype) * 2 - 1
