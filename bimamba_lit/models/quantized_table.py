"""The embedding and the output head in 8 or 4 bits: over half of a packed model's bits are in them otherwise.

A row, or a group of its entries, is whole numbers times one scale, symmetric about zero. A tied head reads the same
numbers as the embedding. The head turns a slice of rows at a time back to numbers, so that the table is never whole
in full precision.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bimamba_lit.binarize import LatentLinear
from bimamba_lit.errors import UserError

BITS = (8, 4)
_SLICE = 1 << 22  # entries of the table in full precision at a time
# A four-bit group is nearer to its values if its scale lets the largest one be cut; the best share is searched.
_SHRINK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}


class QuantizedTable(nn.Module):
    """A table of V rows of width D as whole numbers and scales.

    Args:
        weight: The table (V, D).
        bits: 8 or 4 for each entry.
        group_size: Entries that share a scale, a divisor of D; None for the whole row.
        dtype: What a scale is rounded to before entries are, since it is stored so.

    Attributes:
        codes: (V, D) int8, or (V, D / 2) uint8 with two entries a byte, the even one in the low half, 8 added.
        scale: (V, D / group_size) fp32.

    Raises:
        UserError: If bits or group_size do not fit.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self, weight: Tensor, bits: int, group_size: int | None = None, dtype: torch.dtype = torch.float16
    ) -> None:
        super().__init__()
        width = weight.shape[1]
        group = width if group_size is None else group_size
        if isinstance(bits, bool) or bits not in BITS:
            raise UserError(f"a quantized embedding has {' or '.join(map(str, BITS))} bits an entry, not {bits!r}")
        if type(group) is not int or group < 1 or width % group:
            raise UserError(f"the group size must divide the embedding's width {width}, and {group_size!r} does not")
        if bits == 4 and width % 2:
            raise UserError(f"4-bit entries lie two in a byte, and the embedding's width {width} is odd")
        self.bits, self.group_size, self.width = bits, group_size, width
        rows = weight.shape[0] if weight.is_meta else max(1, _SLICE // width)
        parts = [_quantized(part, bits, group, dtype) for part in weight.detach().split(rows)]
        self.register_buffer("codes", torch.cat([codes for codes, _ in parts]))
        self.register_buffer("scale", torch.cat([scale for _, scale in parts]))

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows in full precision: ids (...) to (..., D) in the scale's type."""
        return self._dense(self.codes[ids], self.scale[ids])

    def slice(self, start: int, stop: int) -> Tensor:
        """Return the rows from ``start`` up to ``stop`` in full precision."""
        return self._dense(self.codes[start:stop], self.scale[start:stop])

    def storage(self) -> dict[str, int]:
        """Return the bits it takes to store the table, by part; a scale has 16."""
        return {"codes": self.bits * self.codes.shape[0] * self.width, "scale": 16 * self.scale.numel()}

    def _dense(self, codes: Tensor, scale: Tensor) -> Tensor:
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
        return (codes.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


class QuantizedEmbedding(nn.Module):
    """An embedding whose rows are those of a :class:`QuantizedTable`."""

    def __init__(self, table: QuantizedTable) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (..., D) of ids (...)."""
        return self.table.rows(ids)

    @property
    def weight(self) -> Tensor:
        """The table (V, D) in full precision, formed on every access."""
        return self.table.slice(0, self.table.codes.shape[0])


class QuantizedHead(QuantizedEmbedding):
    """A linear layer without bias whose weight is a :class:`QuantizedTable`."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` (..., D) by every row: (..., V)."""
        rows = self.table.codes.shape[0]
        step = max(1, _SLICE // self.table.width)
        parts = [F.linear(x, self.table.slice(i, i + step).to(x.dtype)) for i in range(0, rows, step)]
        return torch.cat(parts, dim=-1)


def quantize_tables_(
    lm: nn.Module, bits: int, group_size: int | None = None, dtype: torch.dtype = torch.float16
) -> None:
    """Put the embedding of a model and its output head, unless that is binary, into 8 or 4 bits, in place.

    Raises:
        UserError: If bits or group_size do not fit the width, or the tables are quantized already.
    """
    backbone = cast(Any, lm).backbone
    embedding, head = backbone.embedding, cast(Any, lm).lm_head
    if isinstance(embedding, QuantizedEmbedding):
        raise UserError(f"the model's embedding has {embedding.table.bits} bits an entry already")
    table = QuantizedTable(embedding.weight, bits, group_size, dtype)
    if isinstance(head, nn.Linear) and not isinstance(head, LatentLinear):
        tied = head.weight is embedding.weight
        cast(Any, lm).lm_head = QuantizedHead(table if tied else QuantizedTable(head.weight, bits, group_size, dtype))
    backbone.embedding = QuantizedEmbedding(table)


def describe_tables(lm: nn.Module) -> dict[str, Any] | None:
    """Return ``bits`` and ``group_size`` of a model's quantized tables, and None where they are not quantized."""
    embedding = cast(Any, lm).backbone.embedding
    if not isinstance(embedding, QuantizedEmbedding):
        return None
    return {"bits": embedding.table.bits, "group_size": embedding.table.group_size}


def _quantized(rows: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    levels = (1 << (bits - 1)) - 1
    groups = rows.float().unflatten(1, (-1, group))
    scale = _best_scale(groups, levels, _SHRINK[bits], dtype)
    codes = _codes(groups, scale, levels).flatten(1).to(torch.int8)
    return codes if bits == 8 else _in_pairs(codes), scale


def _codes(groups: Tensor, scale: Tensor, levels: int) -> Tensor:
    return (groups / scale.unsqueeze(-1)).nan_to_num().round().clamp(-levels, levels)


def _best_scale(groups: Tensor, levels: int, shares: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    largest = groups.abs().amax(dim=-1) / levels
    best = (largest * shares[0]).to(dtype).float()
    for share in shares[1:]:
        scale = (largest * share).to(dtype).float()
        better = _error(groups, scale, levels) < _error(groups, best, levels)
        best = torch.where(better, scale, best)
    return best


def _error(groups: Tensor, scale: Tensor, levels: int) -> Tensor:
    return (_codes(groups, scale, levels) * scale.unsqueeze(-1) - groups).square().sum(dim=-1)


def _in_pairs(codes: Tensor) -> Tensor:
    shifted = (codes + 8).to(torch.uint8)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)
