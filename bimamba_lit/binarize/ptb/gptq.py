"""Codes of 1 to 8 bits, rounded column by column, each column's error made up for by those still to come."""

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.grid import encode, fit_grid, pack_codes, unpack_codes
from bimamba_lit.binarize.ptb.hessian import Calibrated
from bimamba_lit.binarize.ptb.scheme import PTBScheme, divides
from bimamba_lit.errors import UserError

BITS = (1, 2, 3, 4, 8)
BLOCK = 128


class GPTQ(PTBScheme):
    """Codes with a scale and a zero point for each row and group of inputs: GPTQ (arXiv 2210.17323, algorithm 1).

    Args:
        bits: Bits of a code: 1, 2, 3, 4 or 8.
        group_size: Inputs that share a scale and a zero point, fitted to the weights as corrected so far; null for one
            group a row, fitted to the weights as they were. One group of 1 bit packs as a binary layer.
    """

    def __init__(self, bits: int = 2, group_size: int | None = 128) -> None:
        if bits not in BITS:
            raise UserError(f"GPTQ's bits are one of {', '.join(map(str, BITS))}, not {bits!r}")
        if group_size is not None and group_size < 1:
            raise UserError(f"GPTQ's group_size is a number of inputs or null, not {group_size!r}")
        self.bits = bits
        self.group_size = group_size

    def _fit(self, weight: Tensor, data: Calibrated | None) -> dict[str, Tensor]:
        assert data is not None
        features = weight.shape[1]
        size = divides(self.group_size, features, "GPTQ's group_size")
        rest, factor = weight.T.contiguous(), data.factor  # (I, O): a column of the weight lies in one piece
        codes = torch.empty_like(rest)
        grids = []
        for start in range(0, features, BLOCK):
            stop = min(start + BLOCK, features)
            errors = torch.empty_like(rest[start:stop])
            for i in range(start, stop):
                if i % size == 0:
                    grids.append(fit_grid(rest[i : i + size], self.bits))
                scale, zero = grids[-1]
                codes[i] = encode(rest[i], scale, zero, self.bits)
                error = (rest[i] - scale * (codes[i] - zero)) / factor[i, i]
                rest[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
                errors[i - start] = error
            rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        scales, zeros = (torch.stack(values, 1) for values in zip(*grids, strict=True))
        if self.group_size is None and self.bits == 1:
            return {"signs": pack_codes(codes.T, 1)[0], "scales": scales.half(), "zeros": zeros.to(torch.uint8)}
        return {"codes": pack_codes(codes.T, self.bits), "scales": scales.half(), "zeros": zeros.to(torch.uint8)}

    def decode(self, parts: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Return ``scale (code - zero)``, ``(O, I)``."""
        planes = parts["codes"] if "codes" in parts else parts["signs"].unsqueeze(0)
        scales, zeros = parts["scales"].float().unsqueeze(2), parts["zeros"].float().unsqueeze(2)
        codes = unpack_codes(planes, in_features).unflatten(1, (scales.shape[1], -1))
        return (scales * (codes - zeros)).flatten(1)

    def terms(self, parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Return ``out_scale`` and ``out_shift`` ``(O,)`` of one 1-bit group: half the scale, and the grid's middle."""
        if "signs" not in parts:
            return None
        scale, zero = parts["scales"][:, 0].float(), parts["zeros"][:, 0].float()
        return {"out_scale": 0.5 * scale, "out_shift": scale * (0.5 - zero)}
