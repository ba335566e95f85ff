"""Uniform grids of b-bit codes, one for each row and group of inputs, and bits packed to bytes."""

import torch
from torch import Tensor

from bimamba_lit import ops

SMALLEST = 2.0**-24  # the least positive fp16: an all-zero group keeps a scale to divide by


def fit_grid(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point ``(O,)`` of the b-bit grid over values ``(G, O)``: fp32, exact in fp16 and uint8.

    The range includes 0: scale = (max - min) / (2^b - 1), zero = round(-min / scale).
    """
    low, high = values.amin(0).clamp(max=0), values.amax(0).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=SMALLEST)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def codes_on(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the codes nearest to ``values``, 0 to 2^b - 1, in fp32."""
    return ((values / scale).round() + zero).clamp(0, 2**bits - 1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``(O, I)`` as bit planes, ``(bits, O, ceil(I / 8))`` uint8, the least significant first."""
    codes = codes.to(torch.uint8)
    return torch.stack([pack_bits(codes >> bit & 1) for bit in range(bits)])


def unpack_codes(planes: Tensor, in_features: int) -> Tensor:
    """Return the codes ``(O, I)`` in fp32 that :func:`pack_codes` packed."""
    codes = unpack_bits(planes[0], in_features).float()
    for bit, plane in enumerate(planes[1:], 1):
        codes.add_(unpack_bits(plane, in_features), alpha=1 << bit)
    return codes


def pack_bits(bits: Tensor) -> Tensor:
    """Pack zeros and ones ``(O, I)`` to ``(O, ceil(I / 8))`` uint8, as :func:`bimamba_lit.ops.pack_signs` does."""
    return ops.pack_signs(bits.float()) if bits.numel() else bits.new_zeros(len(bits), 0, dtype=torch.uint8)


def unpack_bits(packed: Tensor, in_features: int) -> Tensor:
    """Return the bits ``(O, in_features)`` as booleans."""
    return ops.unpack_signs(packed, in_features) > 0 if in_features else packed.new_zeros(len(packed), 0).bool()
