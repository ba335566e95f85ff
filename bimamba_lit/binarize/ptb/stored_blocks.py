"""How the blocks of BiLLM's loop are stored, and read back.

``salient`` ``(1, I / 8)`` tells the salient columns. Each half is stored under its own names, those of the salient half
with ``salient_`` before them; with B blocks, K columns of the half in the layer, G groups and N orders:
``signs`` ``(N, O, K / 8)``; ``groups`` ``(O, K / 8)``, 1 in the group of larger magnitudes; ``scales`` ``(B, N, G, O)``
and ``shifts`` ``(B, G, O)`` by row; ``column_scales`` ``(N, G, K)``; each where the scheme has it. Numbers are fp16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bimamba_lit.binarize.ptb.columns import BLOCK
from bimamba_lit.binarize.ptb.grid import pack_bits, unpack_bits
from bimamba_lit.binarize.ptb.half import Binary, Half, sign

Block = tuple[list[Half], list[Binary]]
PREFIXES = ("", "salient_")


def pack_blocks(blocks: list[Block]) -> dict[str, Tensor]:
    """Return the parts that the blocks of a layer are stored as."""
    parts = {"salient": pack_bits(torch.cat([halves[1].columns for halves, _ in blocks]).unsqueeze(0))}
    for index, prefix in enumerate(PREFIXES):
        halves = [block[0][index] for block in blocks]
        fitted = [block[1][index] for block in blocks]
        signs = torch.cat([binary.signs > 0 for binary in fitted], 2)
        parts[f"{prefix}signs"] = torch.stack([pack_bits(plane) for plane in signs])
        if len(halves[0].masks) == 2:
            parts[f"{prefix}groups"] = pack_bits(torch.cat([half.masks[1] for half in halves], 1))
        parts[f"{prefix}scales"] = torch.stack([binary.scales.squeeze(3) for binary in fitted]).half()
        shifts = [binary.shift.squeeze(2) for binary in fitted if binary.shift is not None]
        if shifts:
            parts[f"{prefix}shifts"] = torch.stack(shifts).half()
        columns = [binary.column_scales.squeeze(2) for binary in fitted if binary.column_scales is not None]
        if columns:
            parts[f"{prefix}column_scales"] = torch.cat(columns, 2).half()
    return parts


def unpack_blocks(parts: dict[str, Tensor], in_features: int) -> Iterator[Block]:
    """Yield the blocks that :func:`pack_blocks` packed."""
    salient = unpack_bits(parts["salient"], in_features)[0].split(BLOCK)
    others = tuple(~columns for columns in salient)
    unpacked = [_unpack_half(parts, prefix, masks) for prefix, masks in zip(PREFIXES, (others, salient), strict=True)]
    for (half, binary), (salient_half, salient_binary) in zip(*unpacked, strict=True):
        yield [half, salient_half], [binary, salient_binary]


def _unpack_half(parts: dict[str, Tensor], prefix: str, columns: tuple[Tensor, ...]) -> Iterator[tuple[Half, Binary]]:
    widths = [int(mask.sum()) for mask in columns]
    signs = sign(torch.stack([unpack_bits(plane, sum(widths)) for plane in parts[f"{prefix}signs"]]).float())
    masks = torch.ones_like(signs[:1])
    if f"{prefix}groups" in parts:
        large = unpack_bits(parts[f"{prefix}groups"], sum(widths)).float()
        masks = torch.stack([1 - large, large])
    shifts, by_column = parts.get(f"{prefix}shifts"), parts.get(f"{prefix}column_scales")
    column_scales = None if by_column is None else by_column.float().unsqueeze(2).split(widths, 3)
    for i, (own, planes) in enumerate(zip(masks.split(widths, 2), signs.split(widths, 2), strict=True)):
        yield (
            Half(columns[i], len(planes), own),
            Binary(
                planes,
                parts[f"{prefix}scales"][i].float().unsqueeze(3),
                None if shifts is None else shifts[i].float().unsqueeze(2),
                None if column_scales is None else column_scales[i],
            ),
        )
