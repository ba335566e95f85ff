"""BiLLM's groups, their shifts, scales and signs refined in turn."""

from itertools import combinations

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.blocks import BlockScheme
from bimamba_lit.binarize.ptb.half import Binary, Half, nearest_signs, residual_binary, set_in_turn

ROUNDS = 15


class ARB(BlockScheme):
    """Alternating refined binarization: ARB-LLM (arXiv 2410.03129, section 3.2), in BiLLM's loop over blocks.

    15 rounds of ``mu += mean(W - W^)``, ``alpha_n = sum B_n (W - mu - alpha_m B_m) / sum B_n^2`` and the nearest signs.

    Args:
        column_groups: Whether salient columns are parted by magnitude too (the column-group bitmap).
    """

    def __init__(self, column_groups: bool = True) -> None:
        self.column_groups = column_groups

    def binarize(self, w: Tensor, half: Half) -> Binary:
        """Return the refined form of a half."""
        binary = residual_binary(w, half)
        signs, numbers = binary.signs, numbers_of(binary)
        gram = half.sum(torch.ones_like(w)).repeat(len(numbers), len(numbers), 1, 1, 1)
        for _ in range(ROUNDS):
            planes = [torch.ones_like(w), *signs]
            for i, j in combinations(range(len(planes)), 2):
                gram[i, j] = gram[j, i] = half.sum(planes[i] * planes[j])
            set_in_turn(numbers, gram, torch.stack([half.sum(plane * w) for plane in planes]))
            shift, *scales = numbers
            signs = nearest_signs(w - half.spread(shift), torch.stack([half.spread(scale) for scale in scales]))
        return with_numbers(signs, numbers)


def numbers_of(binary: Binary) -> Tensor:
    """Return the shift and then the scales of a form, ``(1 + N, G, O, 1)``."""
    assert binary.shift is not None
    return torch.cat([binary.shift.unsqueeze(0), binary.scales])


def with_numbers(signs: Tensor, numbers: Tensor) -> Binary:
    """Return the form of signs ``(N, O, K)`` with the numbers that :func:`numbers_of` took apart."""
    return Binary(signs, numbers[1:], numbers[0])
