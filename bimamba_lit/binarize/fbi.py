"""FBI-Linear, the scheme of Bi-Mamba."""

from typing import Literal

from torch import Tensor, nn

from bimamba_lit.binarize.linear import BinaryLinear, no_decay
from bimamba_lit.binarize.straight_through import StraightThrough
from bimamba_lit.binarize.two_sided import rank_one
from bimamba_lit.errors import UserError

_AXES = {"column": (0,), "row": (1,), "single": (0, 1), "two_sided": (0,)}


class FBI(BinaryLinear):
    """``weight = alpha sign(latent) + beta`` with learnable scale and shift, as in Bi-Mamba (arXiv 2411.11843).

    The layer is FBI-LLM's FBI-Linear (arXiv 2407.07093). Scale and shift start at ``beta = mean(latent)`` and
    ``alpha = mean(abs(latent - beta))`` over the other axis; the sign is of the latent weights as they are.

    Args:
        linear: The layer whose weights are taken over.
        pattern: ``column`` has one pair per input feature, as Bi-Mamba has it; ``row`` one per output feature;
            ``single`` one for the whole matrix. ``two_sided`` adds a scale per output feature to ``column``; both start
            at the rank-one factorisation of ``abs(latent - beta)``, see :class:`~bimamba_lit.binarize.TwoSided`.
        straight_through: The gradient that stands in for that of the sign.
        scaled_gradients: As in :class:`~bimamba_lit.binarize.BinaryLinear`.
        reach: As in :class:`~bimamba_lit.binarize.BinaryLinear`.

    Raises:
        UserError: If ``pattern`` is none of these.
    """

    def __init__(
        self,
        linear: nn.Linear,
        pattern: Literal["column", "row", "single", "two_sided"] = "column",
        straight_through: StraightThrough = "identity",
        scaled_gradients: bool = False,
        reach: float | None = None,
    ) -> None:
        super().__init__(linear, straight_through, scaled_gradients, reach)
        if pattern not in _AXES:
            raise UserError(f"pattern is {pattern!r}, and must be one of {', '.join(_AXES)}")
        self.pattern = pattern
        axes = _AXES[pattern]
        beta = self.latent.detach().mean(dim=axes, keepdim=True)
        magnitude = (self.latent.detach() - beta).abs()
        side = "out" if pattern in ("row", "single") else "in"
        terms = {f"{side}_scale": magnitude.mean(dim=axes), f"{side}_shift": beta}
        if pattern == "two_sided":
            terms["out_scale"], terms["in_scale"] = rank_one(magnitude)
        self._terms = tuple(terms)
        for name, values in terms.items():
            self.register_parameter(name, no_decay(values.reshape(-1)))

    def take_second_signs_(self, inputs: Tensor) -> None:
        """Take the last inputs for second signs; they share the shift of their first ones, as two would only add up."""
        super().take_second_signs_(inputs)
        if "in_shift" in self._terms:
            first, second = self.get_parameter("in_shift").detach().split([self.in_features - len(inputs), len(inputs)])
            self.in_shift = no_decay(first.index_add(0, inputs, second))

    def terms(self) -> dict[str, Tensor]:
        """Return scale and shift: ``in_`` ``(I,)``, ``out_`` ``(O,)`` or ``(1,)``; for ``two_sided`` both scales."""
        return {name: getattr(self, name) for name in self._terms}
