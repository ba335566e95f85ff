"""ARB, its shifts and scales refined once more for the error of the layer's outputs."""

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.arb import ARB, ROUNDS, numbers_of, with_numbers
from bimamba_lit.binarize.ptb.half import Binary, Half, set_in_turn


class ARBX(ARB):
    """ARB with calibration data: ARB-LLM_X (arXiv 2410.03129, section 3.3), in BiLLM's loop over blocks.

    With ARB's signs kept, 15 rounds set every shift and scale of the block in turn to the minimum of its output error
    ``tr(R S R^T)``, ``R = W - W^``, S the block of the Hessian.

    Args:
        column_groups: Whether salient columns are parted by magnitude too (the column-group bitmap).
    """

    def binarize_block(self, weights: list[Tensor], halves: list[Half], hessian: Tensor) -> list[Binary]:
        """Return the form of each half, refined for both together."""
        fitted = super().binarize_block(weights, halves, hessian)
        w = weights[0].new_empty(len(weights[0]), len(hessian))
        for half, values in zip(halves, weights, strict=True):
            w[:, half.columns] = values
        directions = torch.cat([_directions(binary.signs, half) for binary, half in zip(fitted, halves, strict=True)])
        taken_apart = [numbers_of(binary) for binary in fitted]
        numbers = torch.cat([own.flatten(0, 1) for own in taken_apart]).squeeze(2)  # (J, O)
        weighted = directions @ hessian
        gram = torch.einsum("joc,koc->jko", weighted, directions)
        wanted = torch.einsum("joc,oc->jo", weighted, w)
        for _ in range(ROUNDS):
            set_in_turn(numbers, gram, wanted)
        refined = numbers.split([own.shape[0] * own.shape[1] for own in taken_apart])
        return [
            with_numbers(binary.signs, new.view_as(old))
            for binary, new, old in zip(fitted, refined, taken_apart, strict=True)
        ]


def _directions(signs: Tensor, half: Half) -> Tensor:
    """Return what each number of a half multiplies in the block, ``(J, O, C)``: shifts, then scales, each by group."""
    planes = torch.cat([torch.ones_like(signs[:1]), signs])
    parted = (planes.unsqueeze(1) * half.masks).flatten(0, 1)
    directions = parted.new_zeros(*parted.shape[:2], len(half.columns))
    directions[:, :, half.columns] = parted
    return directions
