"""The sign function and the gradients that stand in for its own, which is zero almost everywhere.

Each is one ``torch.autograd.Function`` and not ``(b - x).detach() + x``: that idiom returns 0.0 where ``x`` is large
enough to swallow ``b`` (``x = 1e8`` in fp32).
"""

from typing import Any, Literal

import torch
from torch import Tensor

StraightThrough = Literal["identity", "clipped", "tanh", "bireal"]


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, straight_through: StraightThrough) -> Tensor:
        ctx.straight_through = straight_through
        ctx.save_for_backward(*(() if straight_through == "identity" else (x,)))
        return torch.where(x > 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.straight_through == "identity":
            return gradient, None
        (x,) = ctx.saved_tensors
        if ctx.straight_through == "clipped":
            slope = (x.abs() <= 1).to(gradient.dtype)
        elif ctx.straight_through == "tanh":
            slope = 1 - x.tanh().square()
        else:
            slope = (2 - 2 * x.abs()).clamp(min=0)
        return gradient * slope, None


def straight_through_sign(x: Tensor, straight_through: StraightThrough = "identity") -> Tensor:
    """Return +1 where ``x > 0`` and -1 elsewhere, so zero counts as -1, as in Bi-Mamba (arXiv 2411.11843, section 3).

    Args:
        x: Any shape, any floating dtype.
        straight_through: What the backward pass multiplies the gradient by: ``identity`` 1 (Bengio et al.,
            arXiv 1308.3432); ``clipped`` 1 where ``abs(x) <= 1``, else 0 (Hubara et al., arXiv 1602.02830);
            ``tanh`` ``1 - tanh(x)^2``; ``bireal`` ``max(0, 2 - 2 abs(x))`` (Bi-Real Net, arXiv 1808.00278, eq. 5).

    Returns:
        Shape and dtype of ``x``.
    """
    return _Sign.apply(x, straight_through)
