"""The dense weight of signs and the terms of the formula, and the straight-through gradient: the definition.

Legend: O out features, I in features, G groups of I / G contiguous inputs.
"""

from typing import Any

import torch
from torch import Tensor


def binary_weight(
    latent: Tensor,
    straight_through: str = "identity",
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    reach: Tensor | None = None,
) -> Tensor:
    """Return the weight (O, I) of the signs of `latent` (O, I), in `dtype` or else in that of the formula."""
    signs = straight_through_sign(latent, straight_through, None if reach is None else reach.unsqueeze(1))
    weight = compose(signs, in_scale, out_scale, group_scale, in_shift, out_shift)
    return weight if dtype is None else weight.to(dtype)


def compose(
    signs: Tensor,
    in_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    out_shift: Tensor | None = None,
) -> Tensor:
    """Return the dense weight (O, I) that signs (O, I) and the terms of the formula stand for."""
    weight = signs
    if group_scale is not None:
        weight = (weight.unflatten(1, (group_scale.shape[1], -1)) * group_scale.unsqueeze(2)).flatten(1)
    if in_scale is not None:
        weight = weight * in_scale
    if out_scale is not None:
        weight = weight * out_scale.unsqueeze(1)
    if in_shift is not None:
        weight = weight + in_shift
    if out_shift is not None:
        weight = weight + out_shift.unsqueeze(1)
    return weight


class _Sign(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func's transforms

    @staticmethod
    def forward(x: Tensor, straight_through: str, reach: Tensor | None) -> Tensor:
        # Not of another tensor by ``to`` or in place: torch 2.11 compiles a function that ends so without its gradient.
        one = torch.ones((), dtype=x.dtype, device=x.device)
        return torch.where(x > 0, one, -one)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, Tensor | None], output: Tensor) -> None:
        x, ctx.straight_through, reach = inputs
        ctx.save_for_backward(None if ctx.straight_through == "identity" else x, reach)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, reach = ctx.saved_tensors
        width = 1.0 if reach is None else reach
        if ctx.straight_through == "clipped":
            gradient = gradient * (x.abs() <= width).to(gradient.dtype)
        elif ctx.straight_through == "tanh":
            gradient = gradient * (1 - (x / width).tanh().square())
        elif ctx.straight_through == "bireal":
            gradient = gradient * (2 - 2 * x.abs() / width).clamp(min=0)
        return gradient if reach is None else gradient / reach, None, None


def straight_through_sign(x: Tensor, straight_through: str = "identity", reach: Tensor | None = None) -> Tensor:
    """Return +1 where x > 0 and -1 elsewhere, with the gradient of what `straight_through` names at x / reach."""
    return _Sign.apply(x, straight_through, reach)
