"""Signs with a learnable scale for every input and every output."""

from typing import Literal

from torch import Tensor, nn

from bimamba_lit.binarize.linear import BinaryLinear, no_decay
from bimamba_lit.binarize.straight_through import StraightThrough
from bimamba_lit.errors import UserError

_ROUNDS = 15  # as in ARB-LLM; a weight matrix takes about five
_LEAST = 1e-30  # to divide by where all is zero


class TwoSided(BinaryLinear):
    """``weight[o, i] = out_scale[o] in_scale[i] sign(latent[o, i])``, both scales learnable.

    The scales start at a rank-one factorisation of ``abs(latent)``: OneBit's SVID (arXiv 2402.11295, section 3.3),
    whose layer this is without the norm (see :class:`~bimamba_lit.binarize.OneBit`).

    Args:
        linear: The layer whose weights are taken over.
        init: ``svd``, the nearest in squared error. Non-negative factorisation (NMF) and the alternation of
            ARB-LLM_RC (arXiv 2410.03129) lead to the same pair: the first singular vectors of a matrix without negative
            entries have none. ``means``, the means of rows and of columns: what NMF gives in KL divergence.
        straight_through: The gradient that stands in for that of the sign.
        scaled_gradients: As in :class:`~bimamba_lit.binarize.BinaryLinear`.
        reach: As in :class:`~bimamba_lit.binarize.BinaryLinear`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        init: Literal["svd", "means"] = "svd",
        straight_through: StraightThrough = "identity",
        scaled_gradients: bool = False,
        reach: float | None = None,
    ) -> None:
        super().__init__(linear, straight_through, scaled_gradients, reach)
        if init not in ("svd", "means"):
            raise UserError(f"init is {init!r}, and must be svd or means")
        self.init = init
        out_scale, in_scale = rank_one(self.latent.detach().abs(), rounds=_ROUNDS if init == "svd" else 0)
        self.in_scale = no_decay(in_scale)
        self.out_scale = no_decay(out_scale)

    def terms(self) -> dict[str, Tensor]:
        """Return ``in_scale`` ``(I,)`` and ``out_scale`` ``(O,)``."""
        return {"in_scale": self.in_scale, "out_scale": self.out_scale}


def rank_one(magnitudes: Tensor, rounds: int = _ROUNDS) -> tuple[Tensor, Tensor]:
    """Return scales ``(O,)`` and ``(I,)``, of equal mean, whose outer product is near to ``magnitudes`` ``(O, I)``.

    From the means of rows and columns, each side in turn is set to its least squares: the power iteration that finds
    the first pair of singular vectors, and the update of ARB-LLM_RC (arXiv 2410.03129, eq. 8).
    """
    rows, columns = magnitudes.mean(1), magnitudes.mean(0) / magnitudes.mean().clamp(min=_LEAST)
    for _ in range(rounds):
        rows = magnitudes @ columns / columns.square().sum().clamp(min=_LEAST)
        columns = rows @ magnitudes / rows.square().sum().clamp(min=_LEAST)
    balance = (columns.mean() / rows.mean().clamp(min=_LEAST)).sqrt()
    return rows * balance, columns / balance.clamp(min=_LEAST)
