"""Packing signs to bits and back in one pass over memory.

Legend: O out features, I in features. Bit i % 8 of byte i // 8 holds the sign of input i.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_weight.triton import dense_weight
from bimamba_lit.kernels.configurations import CompileCase, configuration


def pack_signs(w: Tensor) -> Tensor:
    """Compute what `naive.pack_signs` computes, for (O, I)."""
    return _op(w.detach())


def unpack_signs(signs: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute what `naive.unpack_signs` computes, for (O, ceil(I / 8))."""
    return dense_weight(signs, in_features, (None, None, None, None, None), dtype)


@torch.library.custom_op("bimamba_lit::pack_signs", mutates_args=())
def _op(w: Tensor) -> Tensor:
    return pack_forward(w)


@_op.register_fake
def _(w: Tensor) -> Tensor:
    return w.new_empty(w.shape[0], -(-w.shape[1] // 8), dtype=torch.uint8)


def pack_forward(w: Tensor) -> Tensor:
    """Launch the kernel."""
    out_features, in_features = w.shape
    width = triton.cdiv(in_features, 8)
    signs = torch.empty(out_features, width, dtype=torch.uint8, device=w.device)
    if signs.numel() == 0:
        return signs
    chosen = configuration("signs/pack", w.dtype, w.numel(), w.device)
    grid = (triton.cdiv(width, chosen.blocks["BYTES"]), triton.cdiv(out_features, chosen.blocks["ROWS"]))
    _pack_kernel[grid](w, signs, out_features, in_features, width, w.stride(0), w.stride(1), **chosen.launch())
    return signs


def compile_cases() -> list[CompileCase]:
    """Return calls that launch every kernel of this folder; see `CompileCase`."""

    def call(out_features: int, in_features: int, dtype: torch.dtype) -> None:
        pack_forward(torch.empty(out_features, in_features, dtype=dtype, device="meta"))

    return [
        CompileCase("fp32", partial(call, 10576, 2560, torch.float32), representative=True),
        CompileCase("bf16 odd", partial(call, 1001, 2051, torch.bfloat16)),
    ]


@triton.jit
def _pack_kernel(
    w, signs, out_features, in_features, width, stride_o, stride_i, ROWS: tl.constexpr, BYTES: tl.constexpr
):
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * BYTES * 8 + tl.arange(0, BYTES * 8)
    inside = (rows < out_features)[:, None] & (columns < in_features)[None, :]
    value = tl.load(w + rows[:, None] * stride_o + columns.to(tl.int64)[None, :] * stride_i, mask=inside, other=0.0)
    bits = (value > 0).to(tl.int32) << (columns % 8)[None, :]
    byte = tl.sum(tl.reshape(bits, [ROWS, BYTES, 8]), 2)
    places = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    inside = (rows < out_features)[:, None] & (places < width)[None, :]
    tl.store(signs + rows[:, None] * width + places[None, :], byte.to(tl.uint8), mask=inside)
