"""Uniform grids of b-bit codes, one for each row and group of inputs, and codes packed to bits."""

import torch
from torch import Tensor

from bimamba_lit import ops

_SMALLEST = 2.0**-24  # the least positive fp16: an all-zero group keeps a scale to divide by


def fit_grid(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point ``(O,)`` of the b-bit grid over values ``(G, O)``: fp32, exact in fp16 and uint8.

    The range includes 0: scale = (max - min) / (2^b - 1), zero = round(-min / scale).
    """
    low, high = values.amin(0).clamp(max=0), values.amax(0).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=_SMALLEST)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def encode(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the codes nearest to ``values``, 0 to 2^b - 1, in fp32."""
    return ((values / scale).round() + zero).clamp(0, 2**bits - 1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``(O, I)`` as bit planes, ``(bits, O, ceil(I / 8))`` uint8, the least significant first."""
    codes = codes.to(torch.uint8)
    return torch.stack([ops.pack_signs((codes >> bit & 1).float()) for bit in range(bits)])


def unpack_codes(planes: Tensor, in_features: int) -> Tensor:
    """Return the codes ``(O, I)`` in fp32 that :func:`pack_codes` packed."""
    bits = torch.stack([ops.unpack_signs(plane, in_features) > 0 for plane in planes])
    weights = 2.0 ** torch.arange(len(planes), device=planes.device)
    return (bits * weights[:, None, None]).sum(0)
