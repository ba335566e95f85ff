"""ARB, its shifts and scales refined once more for the error of the layer's outputs."""

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.arb import ARB, ROUNDS
from bimamba_lit.binarize.ptb.half import Binary, Half


class ARBX(ARB):
    """ARB with calibration data: ARB-LLM_X (arXiv 2410.03129, section 3.3), in BiLLM's loop over blocks.

    With ARB's signs kept, 15 rounds set every shift and scale in turn to the minimum of the block's output error
    ``tr(R S R^T)``, ``R = W - W^``, S the block of the Hessian.

    Args:
        column_groups: Whether salient columns are parted by magnitude too (the column-group bitmap, section 3.5).
    """

    def binarize(self, weights: list[Tensor], halves: list[Half], hessian: Tensor) -> list[Binary]:
        """Return the form of each half, refined for both together."""
        fitted = super().binarize(weights, halves, hessian)
        w = weights[0].new_empty(len(weights[0]), len(hessian))
        for half, values in zip(halves, weights, strict=True):
            w[:, half.columns] = values
        directions = torch.cat([_directions(b, half) for b, half in zip(fitted, halves, strict=True)])
        numbers = [_numbers(binary) for binary in fitted]
        refined = _least_output_error(w, directions, torch.cat(numbers), hessian)
        return [
            _with_numbers(binary, own)
            for binary, own in zip(fitted, refined.split([len(own) for own in numbers]), strict=True)
        ]


def _directions(binary: Binary, half: Half) -> Tensor:
    """Return what each number of a half multiplies in the block, ``(J, O, C)``: first shifts, then scales, by group."""
    planes = torch.cat([torch.ones_like(binary.signs[:1]), binary.signs])
    parted = torch.cat([half.parted(plane) for plane in planes])
    directions = parted.new_zeros(*parted.shape[:2], len(half.columns))
    directions[:, :, half.columns] = parted
    return directions


def _numbers(binary: Binary) -> Tensor:
    assert binary.shift is not None
    return torch.cat([binary.shift.unsqueeze(0), binary.scales]).flatten(0, 1).squeeze(2)


def _with_numbers(binary: Binary, numbers: Tensor) -> Binary:
    shift, *scales = numbers.unflatten(0, (len(binary.signs) + 1, -1)).unsqueeze(3)
    return Binary(binary.signs, torch.stack(scales), shift)


def _least_output_error(w: Tensor, directions: Tensor, numbers: Tensor, hessian: Tensor) -> Tensor:
    """Return the numbers ``(J, O)`` of ``W^ = sum_j number_j direction_j``, each set in turn, 15 rounds."""
    weighted = directions @ hessian
    gram = torch.einsum("joc,koc->jko", weighted, directions)
    wanted = torch.einsum("joc,oc->jo", weighted, w)
    for _ in range(ROUNDS):
        for j in range(len(numbers)):
            slope = wanted[j] - (gram[j] * numbers).sum(0)
            numbers[j] += torch.where(gram[j, j] > 0, slope / gram[j, j], 0.0)
    return numbers
