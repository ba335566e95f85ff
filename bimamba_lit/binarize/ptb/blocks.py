"""BiLLM's loop over blocks of 128 columns (arXiv 2402.04291, algorithm 1), into which schemes plug their binarizer.

In each block the salient columns are binarized to second order and the others, parted by magnitude into two groups, to
first order; the block's error is then made up for by the blocks to come. The loop corrects them exactly: with ``U`` the
factor of the inverse Hessian, ``W[rest] -= (W - W^)[block] U[block, block]^-1 U[block, rest]``, which is what GPTQ's
column by column correction adds up to. (The released BiLLM divides by the diagonal of ``U[block, block]`` only.)
"""

from abc import abstractmethod

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.columns import BLOCK
from bimamba_lit.binarize.ptb.half import Binary, Half
from bimamba_lit.binarize.ptb.hessian import Calibrated
from bimamba_lit.binarize.ptb.scheme import PTBScheme
from bimamba_lit.binarize.ptb.split import break_point, salient_columns
from bimamba_lit.binarize.ptb.stored_blocks import pack_blocks, unpack_blocks


class BlockScheme(PTBScheme):
    """A scheme in BiLLM's loop over blocks; a subclass says how the two halves of a block are binarized.

    Stored are two bits an entry (its sign, and its group or, in a salient column, its second sign), a third in salient
    columns that are parted too, one bit a column, and for every block the fp16 numbers of each row and group.

    Attributes:
        column_groups: Whether salient columns are parted by magnitude too (the column-group bitmap of ARB-LLM).
    """

    column_groups = False

    @abstractmethod
    def binarize(self, w: Tensor, half: Half) -> Binary:
        """Return the binary form of the columns ``w`` ``(O, K)`` of a half, as corrected so far."""

    def binarize_block(self, weights: list[Tensor], halves: list[Half], hessian: Tensor) -> list[Binary]:
        """Return the binary form of both halves: each by itself, unless a scheme looks at the block as a whole.

        Args:
            weights: The columns of each half, ``(O, K)``.
            halves: The columns that are not salient, to first order, and the salient ones, to second.
            hessian: The block of the Hessian, ``(C, C)``.
        """
        return [self.binarize(w, half) for w, half in zip(weights, halves, strict=True)]

    def encode(self, weight: Tensor, data: Calibrated | None) -> dict[str, Tensor]:
        """Return the blocks."""
        assert data is not None
        rest, factor = data.weight.clone(), data.factor
        blocks = []
        for start in range(0, rest.shape[1], BLOCK):
            block = slice(start, min(start + BLOCK, rest.shape[1]))
            w, own = rest[:, block], factor[block, block]
            halves = self._halves(w, own.diagonal())
            weights = [w[:, half.columns] for half in halves]
            fitted = [binary.stored() for binary in self.binarize_block(weights, halves, data.hessian[block, block])]
            blocks.append((halves, fitted))
            errors = torch.linalg.solve_triangular(own, w - _assembled(halves, fitted), upper=True, left=False)
            rest[:, block.stop :].addmm_(errors, factor[block, block.stop :], alpha=-1)
        return pack_blocks(blocks)

    def _halves(self, w: Tensor, diagonal: Tensor) -> list[Half]:
        """Part a block ``(O, C)``; ``diagonal`` ``(C,)`` is that of the factor."""
        target = self.target(w, diagonal)
        salient = salient_columns(target, (w / diagonal).square().sum(0))
        halves = []
        for columns, order in ((~salient, 1), (salient, 2)):
            values = target[:, columns]
            masks = torch.ones_like(values).unsqueeze(0)
            if order == 1 or self.column_groups:
                large = (values.abs() >= break_point(values, order)).float()
                masks = torch.stack([1 - large, large])
            halves.append(Half(columns, order, masks))
        return halves

    def target(self, w: Tensor, diagonal: Tensor) -> Tensor:
        """Return what the searches measure their errors on, ``(O, C)``: the block itself."""
        return w

    def decode(self, parts: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Return the weight ``(O, I)``: every entry by the numbers of its block, row and group."""
        return torch.cat([_assembled(*block) for block in unpack_blocks(parts, in_features)], 1)


def _assembled(halves: list[Half], fitted: list[Binary]) -> Tensor:
    """Return the block ``(O, C)`` that its halves make."""
    block = torch.empty(fitted[0].signs.shape[1], len(halves[0].columns), device=halves[0].columns.device)
    for half, binary in zip(halves, fitted, strict=True):
        block[:, half.columns] = binary.dense(half)
    return block
