"""``W x`` of one token: a program asks for whole rows of the weight at once, and reads them once.

Legend: O out features, I in features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.configurations import CompileCase, configuration


def linear_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (I,) by the weight (O, I): (O,) in x's dtype, with sums in float32."""
    out_features, in_features = weight.shape
    y = torch.empty(out_features, dtype=x.dtype, device=x.device)
    chosen = configuration("linear_rows/rows", x.dtype, in_features, x.device)
    _rows_kernel[(triton.cdiv(out_features, chosen.blocks["ROWS"]),)](
        x.contiguous(), weight, y, out_features, weight.stride(0), WIDTH=in_features, **chosen.launch()
    )
    return y


@triton.jit
def _rows_kernel(x, weight, y, out_features, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    there = rows < out_features
    at = weight + rows.to(tl.int64)[:, None] * stride + i[None, :]
    parts = ()
    for start in tl.static_range(0, WIDTH, BLOCK):
        parts = parts + (tl.load(at + start, mask=there[:, None] & (start + i < WIDTH)[None, :], other=0.0),)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for n in tl.static_range(len(parts)):
        value = tl.load(x + n * BLOCK + i, mask=n * BLOCK + i < WIDTH, other=0.0).to(tl.float32)
        total += parts[n].to(tl.float32) * value[None, :]
    tl.store(y + rows, tl.sum(total, 1).to(y.dtype.element_ty), mask=there)


def compile_cases() -> list[CompileCase]:
    """Return the calls by which the kernel is compiled without a GPU."""

    def call() -> None:
        x = torch.empty(2560, dtype=torch.bfloat16, device="meta")
        linear_rows(x, torch.empty(50288, 2560, dtype=torch.bfloat16, device="meta"))

    return [CompileCase("2.7B head bf16", call, representative=True)]
