"""-1, 0 and 1, five to a byte, with one scale."""

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.grid import SMALLEST
from bimamba_lit.binarize.ptb.hessian import Calibrated
from bimamba_lit.binarize.ptb.scheme import PTBScheme

_TRITS = 5  # a byte: 3^5 = 243 of its 256 values, 1.6 bits a weight


class Ternary(PTBScheme):
    """``W^ = gamma round(W / gamma)`` within -gamma to gamma, ``gamma = mean abs(W)`` of the matrix. Needs no Hessian.

    The weight of BitNet b1.58 (arXiv 2402.17764, equations 1 to 3), rounded without training. Rows are stored in whole
    bytes of five weights, 1.6 bits each.
    """

    needs_hessian = False

    def encode(self, weight: Tensor, data: Calibrated | None) -> dict[str, Tensor]:
        """Return the trits and the scale."""
        codes, scale = ternary(weight)
        return {"trits": pack_trits(codes), "scale": scale.half().reshape(1)}

    def decode(self, parts: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Return ``scale * trit``, ``(O, I)``."""
        return unpack_trits(parts["trits"], in_features) * parts["scale"].float()


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return -1, 0 or 1 for every weight ``(O, I)``, and the scale, a number that fp16 holds; both fp32."""
    scale = weight.abs().mean().clamp(min=SMALLEST).half().float()
    return (weight / scale).round().clamp(-1, 1), scale


def pack_trits(codes: Tensor) -> Tensor:
    """Pack -1, 0 and 1, ``(O, I)``, to ``(O, ceil(I / 5))`` uint8; the first of a byte is its least digit, plus 1."""
    padded = torch.nn.functional.pad(codes.to(torch.uint8) + 1, (0, -codes.shape[1] % _TRITS))
    return (padded.unflatten(1, (-1, _TRITS)) * _powers(codes)).sum(2, dtype=torch.uint8)


def unpack_trits(packed: Tensor, in_features: int) -> Tensor:
    """Return -1, 0 and 1, ``(O, in_features)`` fp32, that :func:`pack_trits` packed."""
    digits = packed.unsqueeze(2) // _powers(packed) % 3
    return digits.flatten(1)[:, :in_features].float() - 1


def _powers(like: Tensor) -> Tensor:
    return torch.tensor([3**k for k in range(_TRITS)], dtype=torch.uint8, device=like.device)
