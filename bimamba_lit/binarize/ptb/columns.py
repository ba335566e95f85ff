"""Rounding column by column, each column's error made up for by those still to come (GPTQ, arXiv 2210.17323)."""

from collections.abc import Callable

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.hessian import Calibrated

BLOCK = 128
"""Columns whose errors are gathered before the rest of the weight is corrected, in one product."""


def round_columns(data: Calibrated, rounded: Callable[[Tensor, int], Tensor]) -> None:
    """Call ``rounded`` for every column in turn and correct the columns after it.

    Args:
        data: The layer.
        rounded: Given the weight as corrected so far, transposed ``(I, O)``, and the column's index, returns what is
            stored of that column, ``(O,)``.
    """
    rest, factor = data.weight.T.contiguous(), data.factor  # transposed: a column lies in one piece
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        errors = torch.empty_like(rest[start:stop])
        for i in range(start, stop):
            error = (rest[i] - rounded(rest, i)) / factor[i, i]
            rest[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
