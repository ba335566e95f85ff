"""FBI-Linear, the scheme of Bi-Mamba."""

from typing import Literal

from torch import Tensor, nn

from bimamba_lit.binarize.linear import BinaryLinear, no_decay
from bimamba_lit.binarize.straight_through import StraightThrough


class FBI(BinaryLinear):
    """``weight = alpha sign(latent) + beta`` with learnable scale and shift, as in Bi-Mamba (arXiv 2411.11843).

    The layer is FBI-LLM's FBI-Linear (arXiv 2407.07093). Scale and shift start at ``beta = mean(latent)`` and
    ``alpha = mean(abs(latent - beta))`` over the other axis; the sign is of the latent weights as they are.

    Args:
        linear: The layer whose weights are taken over.
        pattern: ``column`` has one pair per input feature, as Bi-Mamba has it; ``row`` one per output feature;
            ``single`` one for the whole matrix.
        straight_through: The gradient that stands in for that of the sign.
        reach: How far it reaches; see :class:`BinaryLinear`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        pattern: Literal["column", "row", "single"] = "column",
        straight_through: StraightThrough = "identity",
        reach: float | None = None,
    ) -> None:
        super().__init__(linear, straight_through, reach)
        self.pattern = pattern
        axes = {"column": (0,), "row": (1,), "single": (0, 1)}[pattern]
        beta = self.latent.mean(dim=axes, keepdim=True)
        alpha = (self.latent - beta).abs().mean(dim=axes)
        side = "in" if pattern == "column" else "out"
        self._scale, self._shift = f"{side}_scale", f"{side}_shift"
        self.register_parameter(self._scale, no_decay(alpha.reshape(-1)))
        self.register_parameter(self._shift, no_decay(beta.reshape(-1)))

    def terms(self) -> dict[str, Tensor]:
        """Return the scale and the shift: ``in_`` ``(I,)``, ``out_`` ``(O,)`` or, for ``single``, ``out_`` ``(1,)``."""
        return {name: self.get_parameter(name) for name in (self._scale, self._shift)}
