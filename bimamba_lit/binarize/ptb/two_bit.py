"""Four levels around zero, with a scale per row."""

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.grid import SMALLEST, pack_codes, unpack_codes
from bimamba_lit.binarize.ptb.hessian import Calibrated
from bimamba_lit.binarize.ptb.scheme import PTBScheme

_ROUNDS = 15
_NORMAL = 2.5  # the nearest scale, in mean magnitudes, of normally distributed weights


class TwoBit(PTBScheme):
    """``W^`` is the nearest of -3, -1, 1 and 3 quarters of a scale by row, the scale by least squares. No Hessian.

    The levels of ParetoQ's stretched elastic quantization at 2 bits (SEQ, arXiv 2502.02631, section 4), rounded without
    training. They lie evenly and none is zero.
    """

    needs_hessian = False

    def encode(self, weight: Tensor, data: Calibrated | None) -> dict[str, Tensor]:
        """Return the codes, as two planes of bits, and the scales."""
        scales = stored_scales(nearest_scales(weight))
        return {"codes": pack_codes(codes_of(weight, scales), 2), "scales": scales.half()}

    def decode(self, parts: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Return the levels, ``(O, I)``."""
        return levels_of(unpack_codes(parts["codes"], in_features), parts["scales"].float())


def codes_of(weight: Tensor, scales: Tensor) -> Tensor:
    """Return the code, 0 to 3 in fp32, of the level nearest to each weight ``(O, I)``, given scales ``(O,)``."""
    return (weight / scales.unsqueeze(1) * 2 + 1.5).round().clamp(0, 3)


def levels_of(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the levels ``(O, I)`` of codes, given scales ``(O,)``."""
    return (codes - 1.5) / 2 * scales.unsqueeze(1)


def nearest_scales(weight: Tensor) -> Tensor:
    """Return the scales ``(O,)`` of least squared error, found by setting codes and scales in turn."""
    scales = (_NORMAL * weight.abs().mean(1)).clamp(min=SMALLEST)
    for _ in range(_ROUNDS):
        levels = levels_of(codes_of(weight, scales), torch.ones_like(scales))
        scales = ((weight * levels).sum(1) / levels.square().sum(1)).clamp(min=SMALLEST)
    return scales


def stored_scales(scales: Tensor) -> Tensor:
    """Return scales as fp16 holds them, above zero, in fp32."""
    return scales.clamp(min=SMALLEST).half().float()
