"""ParetoQ's 1-bit form."""

from torch import Tensor, nn

from bimamba_lit.binarize.linear import BinaryLinear, no_decay

_LEAST = 1e-5  # of a scale to divide by, as in the released code


class ParetoQ(BinaryLinear):
    """``weight = alpha sign(latent)``, one learnable ``alpha`` a row: ParetoQ at 1 bit (arXiv 2502.02631, section 3).

    ``alpha`` starts at ``mean(abs(latent))``. The latent weights receive the weight's gradient as it is, not multiplied
    by ``alpha``, where ``abs(latent) <= alpha``, and none elsewhere; that of ``alpha`` is multiplied by
    1 / sqrt(weights of the layer), as the released code has it. The paper trains from pretrained weights and without
    weight decay.

    Args:
        linear: The layer whose weights are taken over.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, "clipped", scaled_gradients=True)
        self.out_scale = no_decay(self.latent.detach().abs().mean(1))

    def centred(self) -> Tensor:
        """Return the latent weights over their row's scale ``(O, I)``: the sign's gradient is clipped at 1 of them.

        Through this division the gradient's factor of ``alpha`` goes, too.
        """
        return self.latent / self.out_scale.detach().abs().clamp(min=_LEAST).unsqueeze(1)

    def terms(self) -> dict[str, Tensor]:
        """Return ``out_scale`` ``(O,)``."""
        return {"out_scale": self.out_scale}

    def served(self, scale: Tensor) -> int:
        """Return the number of the layer's weights, whatever the scale."""
        return self.latent.numel()
