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
        large = [half.large for half in halves if half.large is not None]
        if large:
            parts[f"{prefix}groups"] = pack_bits(torch.cat(large, 1))
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


def _unpack_half(parts: dict[str, Tensor], prefix: str, masks: tuple[Tensor, ...]) -> Iterator[tuple[Half, Binary]]:
    widths = [int(mask.sum()) for mask in masks]
    planes = [unpack_bits(plane, sum(widths)) for plane in parts[f"{prefix}signs"]]
    signs = sign(torch.stack(planes).float()).split(widths, 2)
    groups, shifts, columns = (parts.get(prefix + name) for name in ("groups", "shifts", "column_scales"))
    large = None if groups is None else unpack_bits(groups, sum(widths)).split(widths, 1)
    column_scales = None if columns is None else columns.float().unsqueeze(2).split(widths, 3)
    for i, mask in enumerate(masks):
        half = Half(mask, len(planes), None if large is None else large[i])
        yield (
            half,
            Binary(
                signs[i],
                parts[f"{prefix}scales"][i].float().unsqueeze(3),
                None if shifts is None else shifts[i].float().unsqueeze(2),
                None if column_scales is None else column_scales[i],
            ),
        )
