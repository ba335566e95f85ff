"""BiLLM's groups, their shifts, scales and signs refined in turn."""

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.blocks import BlockScheme
from bimamba_lit.binarize.ptb.half import Binary, Half, nearest_signs, residual_binary

ROUNDS = 15


class ARB(BlockScheme):
    """Alternating refined binarization: ARB-LLM (arXiv 2410.03129, section 3.2), in BiLLM's loop over blocks.

    15 rounds of ``mu += mean(W - W^)``, ``alpha_n = mean(B_n (W - mu - alpha_m B_m))`` and the nearest signs.

    Args:
        column_groups: Whether salient columns are parted by magnitude too (the column-group bitmap, section 3.5).
    """

    def __init__(self, column_groups: bool = True) -> None:
        self.column_groups = column_groups

    def binarize(self, weights: list[Tensor], halves: list[Half], hessian: Tensor) -> list[Binary]:
        """Return the refined form of each half."""
        return [_refined(w, half) for w, half in zip(weights, halves, strict=True)]


def _refined(w: Tensor, half: Half) -> Binary:
    binary = residual_binary(w, half)
    assert binary.shift is not None
    signs, scales, shift = binary.signs, binary.scales, binary.shift
    for _ in range(ROUNDS):
        shift = shift + half.mean(w - Binary(signs, scales, shift).dense(half))
        centred = w - half.spread(shift)
        for n in range(half.order):
            terms = Binary(signs, scales).terms(half)
            scales[n] = half.mean((centred - terms.sum(0) + terms[n]) * signs[n])
        signs = nearest_signs(centred, torch.stack([half.spread(scale).expand_as(w) for scale in scales]))
    return Binary(signs, scales, shift)
