"""Signs with a scale per row computed from the latent weights."""

from torch import Tensor, nn

from bimamba_lit.binarize.linear import BinaryLinear
from bimamba_lit.binarize.straight_through import StraightThrough


class ScaledSign(BinaryLinear):
    """``weight = alpha sign(latent)``, ``alpha = mean(abs(latent))`` by row: XNOR-Net (arXiv 1603.05279, eq. 6).

    The scale is computed in every forward pass, never stored, and passes a gradient of its own to the latent weights.

    Args:
        linear: The layer whose weights are taken over.
        centred_rows: Subtract each row's mean ``mu`` first: ``weight = alpha sign(latent - mu) + mu`` with
            ``alpha = mean_i abs(latent - mu)``.
        straight_through: The gradient that stands in for that of the sign.
        reach: How far it reaches; see :class:`BinaryLinear`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        centred_rows: bool = False,
        straight_through: StraightThrough = "identity",
        reach: float | None = None,
    ) -> None:
        super().__init__(linear, straight_through, reach=reach)
        self.centred_rows = centred_rows

    def centred(self) -> Tensor:
        """Return the latent weights ``(O, I)``, less each row's mean where the scheme is centred."""
        return self.latent - self.latent.mean(dim=1, keepdim=True) if self.centred_rows else self.latent

    def terms(self) -> dict[str, Tensor]:
        """Return ``out_scale`` ``(O,)`` and, where centred, ``out_shift`` ``(O,)``."""
        terms = {"out_scale": self.centred().abs().mean(dim=1)}
        if self.centred_rows:
            terms["out_shift"] = self.latent.mean(dim=1)
        return terms
