"""Signs with a learnable scale for every row and group of inputs."""

from torch import Tensor, nn

from bimamba_lit.binarize.linear import BinaryLinear, no_decay
from bimamba_lit.binarize.ptb.scheme import group_of
from bimamba_lit.binarize.straight_through import StraightThrough


class GroupScale(BinaryLinear):
    """``weight = group_scale sign(latent)``, one learnable scale for every row and ``group_size`` inputs.

    With 128 inputs it is what llama.cpp's ``Q1_0`` holds: 1.125 bits a weight. The scales start at the groups'
    ``mean(abs(latent))``, the nearest in squared error.

    Args:
        linear: The layer whose weights are taken over.
        group_size: Inputs that share a scale, a divisor of the layer's; null for one scale a row.
        straight_through: The gradient that stands in for that of the sign.
        scaled_gradients: As in :class:`~bimamba_lit.binarize.BinaryLinear`.
        reach: As in :class:`~bimamba_lit.binarize.BinaryLinear`.

    Raises:
        UserError: If the layer's inputs are no multiple of ``group_size``.
    """

    def __init__(
        self,
        linear: nn.Linear,
        group_size: int | None = 128,
        straight_through: StraightThrough = "identity",
        scaled_gradients: bool = False,
        reach: float | None = None,
    ) -> None:
        super().__init__(linear, straight_through, scaled_gradients, reach)
        self.group_size = group_size
        groups = self.latent.detach().unflatten(1, (-1, group_of(group_size, self.in_features)))
        self.group_scale = no_decay(groups.abs().mean(2))

    def terms(self) -> dict[str, Tensor]:
        """Return ``group_scale`` ``(O, I / group_size)``."""
        return {"group_scale": self.group_scale}
