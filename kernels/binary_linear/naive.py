"""The packed linear layer by unpacking its signs and multiplying: the definition.

Legend: O out features, I in features, G groups of I / G contiguous inputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bimamba_lit.kernels.signs.naive import unpack_signs


def accumulator(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of inputs such as `x` are formed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def binary_linear(
    x: Tensor,
    signs: Tensor,
    in_features: int,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
    bias: Tensor | None = None,
    activation_bits: int | None = None,
) -> Tensor:
    """Map x (..., I) to (..., O) with sums in float32 (float64 for float64), rounded once to x's dtype."""
    wide = accumulator(x)
    x_wide = x.to(wide)
    weight = unpack_signs(signs, in_features, wide)
    if group_scale is not None:
        weight = (weight.unflatten(1, (group_scale.shape[1], -1)) * group_scale.to(wide)[:, :, None]).flatten(1)
    y = F.linear(scaled_inputs(x_wide, in_scale, activation_bits), weight)
    return add_terms(y, x_wide, out_scale, in_shift, out_shift, bias).to(x.dtype)


def scaled_inputs(x: Tensor, in_scale: Tensor | None, activation_bits: int | None) -> Tensor:
    """Return what the signs are multiplied by (..., I): x scaled by input, rounded to 8 bits a token if so asked."""
    scaled = x if in_scale is None else x * in_scale.to(x.dtype)
    return scaled if activation_bits is None else _RoundTo8Bits.apply(scaled)


class _RoundTo8Bits(torch.autograd.Function):
    """Rounding to multiples of a token's largest magnitude / 127, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        numbers, step = eight_bits(x)
        return numbers * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers -127 to 127 (..., I), in x's dtype, and a token's step (..., 1): x is about their product."""
    largest = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 1e-30, 127 / largest, 0.0)
    return torch.floor(x * inverse + 0.5), largest / 127


def add_terms(
    y: Tensor,
    x: Tensor,
    out_scale: Tensor | None,
    in_shift: Tensor | None,
    out_shift: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return y (..., O) scaled by output, with the shifts' products of x (..., I) and the bias added."""
    if out_scale is not None:
        y = y * out_scale.to(x.dtype)
    if out_shift is not None:
        y = y + out_shift.to(x.dtype) * x.sum(-1, keepdim=True)
    if in_shift is not None:
        y = y + (x * in_shift.to(x.dtype)).sum(-1, keepdim=True)
    if bias is not None:
        y = y + bias.to(x.dtype)
    return y
