"""Signs alone."""

from torch import Tensor

from bimamba_lit import ops
from bimamba_lit.binarize.ptb.hessian import Calibrated
from bimamba_lit.binarize.ptb.scheme import PTBScheme


class Sign(PTBScheme):
    """``W^ = sign(W)``, the plainest baseline; zero counts as -1. Needs no Hessian."""

    needs_hessian = False

    def encode(self, weight: Tensor, data: Calibrated | None) -> dict[str, Tensor]:
        """Return the signs."""
        return {"signs": ops.pack_signs(weight)}

    def decode(self, parts: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Return the signs, ``(O, I)``."""
        return ops.unpack_signs(parts["signs"], in_features)

    def terms(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return nothing: the signs are the weight."""
        return {}
