"""Signs with a scale per row."""

from torch import Tensor

from bimamba_lit import ops
from bimamba_lit.binarize.linear import compose
from bimamba_lit.binarize.ptb.hessian import Calibrated
from bimamba_lit.binarize.ptb.scheme import PTBScheme


class ScaledSign(PTBScheme):
    """``W^ = alpha sign(W)``, ``alpha = mean_i abs(W)`` by row: XNOR-Net (arXiv 1603.05279, eq. 6). Needs no Hessian.

    Args:
        centred_rows: Subtract each row's mean ``mu`` first: ``W^ = alpha sign(W - mu) + mu`` with
            ``alpha = mean_i abs(W - mu)``.
    """

    needs_hessian = False

    def __init__(self, centred_rows: bool = False) -> None:
        self.centred_rows = centred_rows

    def encode(self, weight: Tensor, data: Calibrated | None) -> dict[str, Tensor]:
        """Return signs and numbers by row."""
        parts = {}
        if self.centred_rows:
            parts["shifts"] = weight.mean(1).half()
            weight = weight - parts["shifts"].float().unsqueeze(1)
        return {"signs": ops.pack_signs(weight), "scales": weight.abs().mean(1).half(), **parts}

    def decode(self, parts: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Return the scaled signs, ``(O, I)``."""
        return compose(ops.unpack_signs(parts["signs"], in_features), self.terms(parts))

    def terms(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``out_scale`` ``(O,)`` and, where centred, ``out_shift`` ``(O,)``."""
        terms = {"out_scale": parts["scales"].float()}
        if self.centred_rows:
            terms["out_shift"] = parts["shifts"].float()
        return terms
