"""Gradients of scales made smaller on their way."""

from typing import Any

import torch
from torch import Tensor


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x``, whose gradient is multiplied by ``factor`` as it passes; any shape, any floating dtype."""
    return _ScaledGradient.apply(x, factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
