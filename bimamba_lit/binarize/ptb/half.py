"""The salient columns of a block, or the others: their groups, and their binary form.

Legend: O out features, C columns of the block, K of them in the half, G groups (1 or 2), N order (1 or 2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Half:
    """Some columns of a block, whose entries are one group or, parted by magnitude, two.

    Attributes:
        columns: Mask ``(C,)`` of the columns.
        order: 1, or 2 where what the first binarization leaves is binarized once more.
        large: ``(O, K)`` boolean, whether an entry is in the second group; None for one group.
    """

    columns: Tensor
    order: int
    large: Tensor | None

    def spread(self, numbers: Tensor) -> Tensor:
        """Give every entry the number of its group: ``(G, O, 1)`` or ``(G, 1, K)`` or ``(G, O, K)`` to ``(O, K)``."""
        return numbers[0] if self.large is None else torch.where(self.large, numbers[1], numbers[0])

    def parted(self, values: Tensor) -> Tensor:
        """Return ``(G, O, K)``: values ``(O, K)`` where they belong to the group, else 0."""
        if self.large is None:
            return values.unsqueeze(0)
        return torch.stack([values.masked_fill(self.large, 0), values.masked_fill(~self.large, 0)])

    def mean(self, values: Tensor, axis: int = 2) -> Tensor:
        """Return the mean of each group by row, ``(G, O, 1)``, or, ``axis=1``, by column, ``(G, 1, K)``."""
        count = self.parted(torch.ones_like(values)).sum(axis, keepdim=True)
        return self.parted(values).sum(axis, keepdim=True) / count.clamp(min=1)


@dataclass(frozen=True)
class Binary:
    """The binary form of a half: ``shift + sum_n scale_n column_scale_n sign_n``, numbers by group.

    Attributes:
        signs: ``(N, O, K)``, +1 or -1.
        scales: ``(N, G, O, 1)`` by row.
        shift: ``(G, O, 1)`` by row, or None.
        column_scales: ``(N, G, 1, K)`` by column, or None.
    """

    signs: Tensor
    scales: Tensor
    shift: Tensor | None = None
    column_scales: Tensor | None = None

    def terms(self, half: Half) -> Tensor:
        """Return ``scale_n column_scale_n sign_n`` of every entry, ``(N, O, K)``."""
        terms = self.signs * torch.stack([half.spread(scale) for scale in self.scales])
        if self.column_scales is not None:
            terms = terms * torch.stack([half.spread(scale) for scale in self.column_scales])
        return terms

    def dense(self, half: Half) -> Tensor:
        """Return the values ``(O, K)``."""
        total = self.terms(half).sum(0)
        return total if self.shift is None else total + half.spread(self.shift)

    def stored(self) -> "Binary":
        """Return the form with its numbers as they are stored, in fp16, kept in fp32."""
        scales, shift, columns = self.scales.half().float(), self.shift, self.column_scales
        return Binary(
            self.signs,
            scales,
            None if shift is None else shift.half().float(),
            None if columns is None else columns.half().float(),
        )


def sign(values: Tensor) -> Tensor:
    """Return +1 where a value is above 0, else -1."""
    return torch.where(values > 0, 1.0, -1.0)


def residual_binary(w: Tensor, half: Half) -> Binary:
    """Binarize each group around its row means, then, to second order, what is left (arXiv 2402.04291, section 3.2).

    ``mu = mean w``, ``alpha = mean abs(w - mu)``, ``sign(w - mu)`` by row; the shifts of both times are one number.
    """
    signs, scales, shifts = [], [], []
    for _ in range(half.order):
        shifts.append(half.mean(w))
        w = w - half.spread(shifts[-1])
        scales.append(half.mean(w.abs()))
        signs.append(sign(w))
        w = w - half.spread(scales[-1]) * signs[-1]
    return Binary(torch.stack(signs), torch.stack(scales), torch.stack(shifts).sum(0))


def nearest_signs(w: Tensor, scales: Tensor) -> Tensor:
    """Return the signs ``(N, O, K)`` whose sum, weighted by ``scales`` ``(N, O, K)``, lies nearest to ``w``."""
    if len(scales) == 1:
        return sign(w * scales)
    first, second = scales
    plus, minus = w - first, w + first  # what is left for the second sign after + or - the first
    up = (plus.abs() - second.abs()).abs() < (minus.abs() - second.abs()).abs()
    return torch.stack([torch.where(up, 1.0, -1.0), sign(torch.where(up, plus, minus) * second)])
