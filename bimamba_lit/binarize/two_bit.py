"""2-bit weights, ParetoQ's form."""

from typing import Any

import torch
from torch import Tensor, nn

from bimamba_lit.binarize import ptb
from bimamba_lit.binarize.coded import CodedLinear
from bimamba_lit.binarize.linear import no_decay
from bimamba_lit.binarize.ptb.grid import pack_codes
from bimamba_lit.binarize.ptb.two_bit import codes_of, levels_of, nearest_scales, stored_scales
from bimamba_lit.binarize.scaled_gradient import scaled_gradient


class TwoBit(CodedLinear):
    """``weight`` is the nearest of -3, -1, 1 and 3 quarters of a learnable scale by row.

    ParetoQ's stretched elastic quantization (SEQ, arXiv 2502.02631, section 4), which that paper finds the best at 2
    bits. The latent weights receive the weight's gradient where ``abs(latent) <= scale`` and none elsewhere; the scale
    that of learned step size quantization, multiplied by 1 / sqrt(weights of the layer). The scales start at the least
    squared error, not at the paper's ``max(abs(latent))``, which takes long to come down.

    Args:
        linear: The layer whose weights are taken over.
    """

    stored_as = ptb.TwoBit()

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.scale = no_decay(nearest_scales(self.latent.detach()))

    @property
    def parts(self) -> dict[str, Tensor]:
        """The codes as two planes of bits ``(2, O, ceil(I / 8))`` uint8 and the scales ``(O,)`` fp16."""
        scales = stored_scales(self.scale.detach())
        return {"codes": pack_codes(codes_of(self.latent.detach(), scales), 2), "scales": scales.half()}

    def _weight_in(self, dtype: torch.dtype | None) -> Tensor:
        scale = scaled_gradient(self.scale, self.latent.numel() ** -0.5)
        return _TwoBit.apply(self.latent, scale).to(dtype or self.latent.dtype)


class _TwoBit(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func's transforms

    @staticmethod
    def forward(latent: Tensor, scale: Tensor) -> Tensor:
        scale = stored_scales(scale)
        return levels_of(codes_of(latent, scale), scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        latent, scale = ctx.saved_tensors
        scale = stored_scales(scale)
        ratio = latent / scale.unsqueeze(1)
        inside = ratio.abs() <= 1
        level = levels_of(codes_of(latent, scale), torch.ones_like(scale))
        return gradient * inside, (gradient * (level - ratio * inside)).sum(1)
