"""Sums of partial results over the programs that wrote them, in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.configurations import configuration


@triton.jit
def sum_kernel(parts, out, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the sums over parts (count, width) of some columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    for first in range(0, count, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        total += tl.load(parts + row * width + column, mask=(row < count) & (column < width), other=0.0)
    tl.store(out + column, tl.sum(total, axis=0)[None, :], mask=column < width)


def sum_parts(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension of contiguous parts, few columns a program where torch takes many."""
    out = parts.new_empty(parts.shape[1:])
    chosen = configuration("sums", parts.dtype, parts.shape[0], parts.device)
    sum_kernel[(-(-out.numel() // chosen.blocks["COLUMNS"]),)](
        parts, out, parts.shape[0], out.numel(), **chosen.launch()
    )
    return out
