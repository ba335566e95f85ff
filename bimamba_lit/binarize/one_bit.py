"""OneBit's layer."""

from torch import Tensor, nn
from torch.nn.functional import layer_norm

from bimamba_lit.binarize.straight_through import StraightThrough
from bimamba_lit.binarize.two_sided import TwoSided


class OneBit(TwoSided):
    """``TwoSided`` with a layer norm without parameters after it: OneBit (arXiv 2402.11295, section 3.1).

    The norm is part of what the layer computes and not of its weight, so only the packed form of this project holds it.
    With a bias it comes after that.

    Args:
        linear: The layer whose weights are taken over.
        straight_through: The gradient that stands in for that of the sign; the paper's is ``tanh``.
        scaled_gradients: As in :class:`~bimamba_lit.binarize.BinaryLinear`.
        reach: As in :class:`~bimamba_lit.binarize.BinaryLinear`.
    """

    formats = ("safetensors",)

    def __init__(
        self,
        linear: nn.Linear,
        straight_through: StraightThrough = "tanh",
        scaled_gradients: bool = False,
        reach: float | None = None,
    ) -> None:
        super().__init__(linear, "svd", straight_through, scaled_gradients, reach)

    @staticmethod
    def finish(y: Tensor) -> Tensor:
        """Return ``y`` ``(..., O)`` normalized over its outputs."""
        return layer_norm(y, y.shape[-1:])
