"""Codes of 1 to 8 bits, rounded column by column."""

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.columns import round_columns
from bimamba_lit.binarize.ptb.grid import codes_on, fit_grid, pack_codes, unpack_codes
from bimamba_lit.binarize.ptb.hessian import Calibrated
from bimamba_lit.binarize.ptb.scheme import PTBScheme, group_of
from bimamba_lit.errors import UserError

BITS = (1, 2, 3, 4, 8)


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
        self.bits = bits
        self.group_size = group_size

    def encode(self, weight: Tensor, data: Calibrated | None) -> dict[str, Tensor]:
        """Return the codes, or the signs, and their grids."""
        assert data is not None
        size = group_of(self.group_size, weight.shape[1])
        codes = torch.empty_like(weight.T)
        grids: list[tuple[Tensor, Tensor]] = []

        def rounded(rest: Tensor, i: int) -> Tensor:
            if i % size == 0:
                grids.append(fit_grid(rest[i : i + size], self.bits))
            scale, zero = grids[-1]
            codes[i] = codes_on(rest[i], scale, zero, self.bits)
            return scale * (codes[i] - zero)

        round_columns(data, rounded)
        scales, zeros = (torch.stack(values, 1) for values in zip(*grids, strict=True))
        numbers = {"scales": scales.half(), "zeros": zeros.to(torch.uint8)}
        planes = pack_codes(codes.T, self.bits)
        return {"signs": planes[0], **numbers} if self._is_binary() else {"codes": planes, **numbers}

    def decode(self, parts: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Return ``scale (code - zero)``, ``(O, I)``."""
        planes = parts["signs"].unsqueeze(0) if self._is_binary() else parts["codes"]
        scales, zeros = parts["scales"].float().unsqueeze(2), parts["zeros"].float().unsqueeze(2)
        codes = unpack_codes(planes, in_features).unflatten(1, (scales.shape[1], -1))
        return (scales * (codes - zeros)).flatten(1)

    def terms(self, parts: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Return ``out_scale`` and ``out_shift`` ``(O,)`` of one 1-bit group: half the scale, and the grid's middle."""
        if not self._is_binary():
            return None
        scale, zero = parts["scales"][:, 0].float(), parts["zeros"][:, 0].float()
        return {"out_scale": 0.5 * scale, "out_shift": scale * (0.5 - zero)}

    def _is_binary(self) -> bool:
        return self.bits == 1 and self.group_size is None
