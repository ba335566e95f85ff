"""Signs alone."""

from torch import Tensor

from bimamba_lit.binarize.linear import BinaryLinear


class Sign(BinaryLinear):
    """``weight = sign(latent)``: no scale at all, the plainest baseline (BinaryConnect, arXiv 1511.00363)."""

    def terms(self) -> dict[str, Tensor]:
        """Return nothing: the signs are the weight."""
        return {}
