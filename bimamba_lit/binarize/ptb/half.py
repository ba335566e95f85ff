"""The salient columns of a block, or the others: their groups, and their binary form.

Legend: O out features, C columns of the block, K of them in the half, G groups (1 or 2), N order (1 or 2).
Masks are numbers and choices are products: on a CPU ``torch.where`` takes twenty times as long (seen, torch 2.13).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Half:
    """Some columns of a block, whose entries are one group or, parted by magnitude, two.

    Attributes:
        columns: Mask ``(C,)`` of the columns, boolean.
        order: 1, or 2 where what the first binarization leaves is binarized once more.
        masks: ``(G, O, K)``, 1 where an entry belongs to the group, else 0.
    """

    columns: Tensor
    order: int
    masks: Tensor

    def spread(self, numbers: Tensor) -> Tensor:
        """Give every entry the number of its group: ``(G, O, 1)`` or ``(G, 1, K)`` to ``(O, K)``."""
        entries = self.masks[0] * numbers[0]
        for mask, number in zip(self.masks[1:], numbers[1:], strict=True):
            entries.addcmul_(mask, number)
        return entries

    def sum(self, values: Tensor, axis: int = 2) -> Tensor:
        """Return the sum of each group by row, ``(G, O, 1)``, or, with ``axis=1``, by column, ``(G, 1, K)``."""
        return (self.masks * values).sum(axis, keepdim=True)

    def mean(self, values: Tensor, axis: int = 2) -> Tensor:
        """Return the mean likewise; 0 where a group has no entry."""
        return self.sum(values, axis) / self.masks.sum(axis, keepdim=True).clamp(min=1)


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

    def magnitudes(self, half: Half) -> Tensor:
        """Return ``scale_n column_scale_n`` of every entry, ``(N, O, K)``."""
        magnitudes = torch.stack([half.spread(scale) for scale in self.scales])
        if self.column_scales is not None:
            magnitudes *= torch.stack([half.spread(scale) for scale in self.column_scales])
        return magnitudes

    def dense(self, half: Half) -> Tensor:
        """Return the values ``(O, K)``."""
        total = (self.signs * self.magnitudes(half)).sum(0)
        return total if self.shift is None else total + half.spread(self.shift)

    def stored(self) -> "Binary":
        """Return the form with its numbers as fp16 holds them, in fp32."""
        shift, columns = self.shift, self.column_scales
        return Binary(
            self.signs,
            self.scales.half().float(),
            None if shift is None else shift.half().float(),
            None if columns is None else columns.half().float(),
        )


def sign(values: Tensor) -> Tensor:
    """Return +1 where a value is above 0, else -1."""
    return (values > 0).float().mul_(2).sub_(1)


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


def nearest_signs(w: Tensor, magnitudes: Tensor) -> Tensor:
    """Return the signs ``(N, O, K)`` whose sum, weighted by ``magnitudes`` ``(N, O, K)``, lies nearest to ``w``."""
    if len(magnitudes) == 1:
        return sign(w * magnitudes)
    first, second = magnitudes
    after_minus, after_plus = ((left.abs() - second.abs()).abs() for left in (w + first, w - first))
    signs = sign(after_minus - after_plus)
    return torch.stack([signs, sign((w - first * signs) * second)])


def set_in_turn(numbers: Tensor, gram: Tensor, wanted: Tensor) -> None:
    """Set each of the numbers of ``sum_j number_j direction_j`` in turn to its least squares, the others kept.

    Args:
        numbers: ``(J, ...)``, changed in place.
        gram: Products of the directions, ``(J, J, ...)``; a direction of length zero keeps its number.
        wanted: Products of the directions with what is fitted, ``(J, ...)``.
    """
    for j, row in enumerate(gram):
        slope = wanted[j] - (row * numbers).sum(0)
        numbers[j] += slope / row[j].masked_fill(row[j] <= 0, torch.inf)
