"""Salient columns binarized twice, the others parted by magnitude."""

from typing import Literal, get_args

from torch import Tensor

from bimamba_lit.binarize.ptb.blocks import BlockScheme
from bimamba_lit.binarize.ptb.half import Binary, Half, residual_binary
from bimamba_lit.errors import UserError

Metric = Literal["paper", "released"]


class BiLLM(BlockScheme):
    """Binary residual approximation of salient columns, optimal splitting of the rest: BiLLM (arXiv 2402.04291).

    Args:
        metric: What the searches for salient columns and for the break point measure their squared error on:
            ``"paper"``, the weight; ``"released"``, as the authors' code does, the saliency ``W^2 / U_jj^2``.
    """

    def __init__(self, metric: Metric = "paper") -> None:
        if metric not in get_args(Metric):
            raise UserError(f"BiLLM's metric is 'paper' or 'released', not {metric!r}")
        self.metric = metric

    def target(self, w: Tensor, diagonal: Tensor) -> Tensor:
        """Return what the searches measure their errors on, ``(O, C)``."""
        return w if self.metric == "paper" else (w / diagonal).square()

    def binarize(self, w: Tensor, half: Half) -> Binary:
        """Return the residual approximation of a half."""
        return residual_binary(w, half)
