"""The sign function and the gradients that stand in for its own, which is zero almost everywhere."""

from typing import Literal, get_args

from torch import Tensor

from bimamba_lit.errors import UserError
from bimamba_lit.kernels.binary_weight import naive

StraightThrough = Literal["identity", "clipped", "tanh", "bireal"]


def check_straight_through(name: str) -> None:
    """Refuse what is no gradient that stands in for the sign's."""
    if name not in get_args(StraightThrough):
        known = ", ".join(get_args(StraightThrough))
        raise UserError(f"straight_through is {name!r}, and must be one of {known}")


def straight_through_sign(
    x: Tensor, straight_through: StraightThrough = "identity", reach: Tensor | None = None
) -> Tensor:
    """Return +1 where ``x > 0`` and -1 elsewhere, so zero counts as -1, as in Bi-Mamba (arXiv 2411.11843, section 3).

    Args:
        x: Any shape, any floating dtype.
        straight_through: What the backward pass multiplies the gradient by, with ``u = x / reach``: ``identity`` 1
            (Bengio et al., arXiv 1308.3432); ``clipped`` 1 where ``abs(u) <= 1``, else 0 (Hubara et al., arXiv
            1602.02830); ``tanh`` ``1 - tanh(u)^2``; ``bireal`` ``max(0, 2 - 2 abs(u))`` (Bi-Real Net, arXiv 1808.00278,
            eq. 5). Each over ``reach``: the derivative to ``x`` of ``u``, ``clip(u)``, ``tanh(u)``, ``u (2 - abs(u))``.
        reach: Positive, broadcast against ``x``; by default 1, as in the papers.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        UserError: If ``straight_through`` is none of these.
    """
    check_straight_through(straight_through)
    return naive.straight_through_sign(x, straight_through, reach)
