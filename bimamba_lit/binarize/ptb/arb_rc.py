"""BiLLM's groups with a scale by row and a scale by column, refined in turn."""

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.arb import ROUNDS
from bimamba_lit.binarize.ptb.blocks import BlockScheme
from bimamba_lit.binarize.ptb.half import Binary, Half, nearest_signs, sign

_LEAST = 1e-30  # a divisor of an all-zero row or column


class ARBRC(BlockScheme):
    """Row and column scales: ARB-LLM_RC (arXiv 2410.03129, section 3.4), in BiLLM's loop over blocks.

    ``W^ = sum_n row_n column_n B_n`` in each group. 15 rounds set ``row_n`` and ``column_n`` in turn to their least
    squares and, to second order, the signs to the nearest.

    Args:
        column_groups: Whether salient columns are parted by magnitude too (the column-group bitmap, section 3.5).
    """

    def __init__(self, column_groups: bool = True) -> None:
        self.column_groups = column_groups

    def binarize(self, weights: list[Tensor], halves: list[Half], hessian: Tensor) -> list[Binary]:
        """Return the refined form of each half."""
        return [_refined(w, half) for w, half in zip(weights, halves, strict=True)]


def _refined(w: Tensor, half: Half) -> Binary:
    signs, rows, columns = _start(w, half)
    for _ in range(ROUNDS):
        for n in range(half.order):
            terms = Binary(signs, rows, column_scales=columns).terms(half)
            part = (w - terms.sum(0) + terms[n]) * signs[n]
            rows[n] = _least_squares(part, columns[n], half, 2)
            columns[n] = _least_squares(part, rows[n], half, 1)
        if half.order > 1:  # to first order the signs of W stay the nearest
            ones = torch.ones_like(signs)
            signs = nearest_signs(w, Binary(ones, rows, column_scales=columns).terms(half))
    return Binary(signs, rows, column_scales=columns)


def _start(w: Tensor, half: Half) -> tuple[Tensor, Tensor, Tensor]:
    signs, rows, columns = [], [], []
    for _ in range(half.order):
        rows.append(half.mean(w.abs()))
        columns.append(half.mean(w.abs() / half.spread(rows[-1]).clamp(min=_LEAST), axis=1))
        signs.append(sign(w))
        w = w - half.spread(rows[-1]) * half.spread(columns[-1]) * signs[-1]
    return torch.stack(signs), torch.stack(rows), torch.stack(columns)


def _least_squares(part: Tensor, scale: Tensor, half: Half, axis: int) -> Tensor:
    """Return the scale along ``axis`` that, times ``scale`` along the other, is nearest to ``part`` ``(O, K)``."""
    other = half.spread(scale).expand_as(part)
    return half.parted(other * part).sum(axis, keepdim=True) / half.parted(other.square()).sum(
        axis, keepdim=True
    ).clamp(min=_LEAST)
