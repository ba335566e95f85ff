"""BiLLM's groups with a scale by row and a scale by column, refined in turn."""

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.arb import ROUNDS
from bimamba_lit.binarize.ptb.blocks import BlockScheme
from bimamba_lit.binarize.ptb.half import Binary, Half, nearest_signs, sign

_LEAST = 1e-30  # to divide by in an all-zero row or column


class ARBRC(BlockScheme):
    """Row and column scales: ARB-LLM_RC (arXiv 2410.03129, section 3.4), in BiLLM's loop over blocks.

    ``W^ = sum_n row_n column_n B_n`` in each group. 15 rounds set ``row_n`` and ``column_n`` in turn to their least
    squares and, to second order, the signs to the nearest.

    Args:
        column_groups: Whether salient columns are parted by magnitude too (the column-group bitmap).
    """

    def __init__(self, column_groups: bool = True) -> None:
        self.column_groups = column_groups

    def binarize(self, w: Tensor, half: Half) -> Binary:
        """Return the refined form of a half."""
        signs, rows, columns = _start(w, half)
        for _ in range(ROUNDS):
            for n in range(half.order):
                part = w * signs[n]
                for m in range(half.order):
                    if m != n:
                        part -= half.spread(rows[m]) * half.spread(columns[m]) * signs[m] * signs[n]
                part = half.masks * part
                rows[n] = (part @ columns[n].mT) / (half.masks @ columns[n].square().mT).clamp(min=_LEAST)
                columns[n] = (rows[n].mT @ part) / (rows[n].square().mT @ half.masks).clamp(min=_LEAST)
            if half.order > 1:  # to first order the signs of W stay the nearest
                signs = nearest_signs(w, Binary(signs, rows, column_scales=columns).magnitudes(half))
        return Binary(signs, rows, column_scales=columns)


def _start(w: Tensor, half: Half) -> tuple[Tensor, Tensor, Tensor]:
    """Return signs ``(N, O, K)``, row scales ``(N, G, O, 1)`` and column scales ``(N, G, 1, K)`` to refine."""
    signs, rows, columns = [], [], []
    for _ in range(half.order):
        rows.append(half.mean(w.abs()))
        columns.append(half.mean(w.abs() / half.spread(rows[-1]).clamp(min=_LEAST), axis=1))
        signs.append(sign(w))
        w = w - half.spread(rows[-1]) * half.spread(columns[-1]) * signs[-1]
    return torch.stack(signs), torch.stack(rows), torch.stack(columns)
