"""BitNet b1.58's ternary weights."""

from typing import Any

import torch
from torch import Tensor

from bimamba_lit.binarize import ptb
from bimamba_lit.binarize.coded import CodedLinear
from bimamba_lit.binarize.ptb.ternary import ternary


class Ternary(CodedLinear):
    """``weight = gamma round(latent / gamma)`` within -gamma to gamma, ``gamma = mean(abs(latent))`` of the matrix.

    BitNet b1.58 (arXiv 2402.17764, equations 1 to 3). The latent weights receive the weight's gradient as it is; the
    scale passes none. Stored as five weights a byte, 1.6 bits each, and one fp16 scale.

    Args:
        linear: The layer whose weights are taken over.
    """

    stored_as = ptb.Ternary()

    @property
    def parts(self) -> dict[str, Tensor]:
        """The trits ``(O, ceil(I / 5))`` uint8 and the scale ``(1,)`` fp16."""
        return self.stored_as.encode(self.latent.detach(), None)

    def _weight_in(self, dtype: torch.dtype | None) -> Tensor:
        return _Ternary.apply(self.latent).to(dtype or self.latent.dtype)


class _Ternary(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func's transforms

    @staticmethod
    def forward(latent: Tensor) -> Tensor:
        codes, scale = ternary(latent)
        return codes * scale  # not in place: see `straight_through_sign`

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
