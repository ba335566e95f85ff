"""The packed linear layer for many tokens of 8-bit activations: an integer product with the terms in its epilogue.

Legend: M tokens, O out features, I in features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_linear.triton_gemv import step_of, write_digits
from bimamba_lit.kernels.binary_weight.triton import NO_TERMS, Terms, weight_forward
from bimamba_lit.kernels.configurations import configuration

MULTIPLE = 128  # of in_features


def binary_gemm8(x: Tensor, signs: Tensor, in_features: int, terms: Terms, bias: Tensor | None) -> Tensor:
    """Map x (M, I), rounded to 8 bits a token, to (M, O) in x's dtype; I a multiple of `MULTIPLE`, no group scales."""
    tokens, out_features = x.shape[0], signs.shape[0]
    in_scale, out_scale, _, in_shift, out_shift = terms
    numbers = torch.empty(tokens, in_features, dtype=torch.int8, device=x.device)
    totals = torch.empty(1, tokens, dtype=torch.int32, device=x.device)  # of no use here
    scales = write_digits(x, in_scale, in_shift, numbers, totals, 1)
    weight = weight_forward(signs, in_features, NO_TERMS, torch.int8)
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    chosen = configuration("binary_linear/gemm8", x.dtype, tokens, x.device)
    tiles = triton.cdiv(tokens, chosen.blocks["TOKENS"]) * triton.cdiv(out_features, chosen.blocks["ROWS"])
    _gemm8_kernel[(tiles,)](
        numbers, weight, scales, out_scale, out_shift, bias, y, tokens, out_features, in_features,
        step_of(out_scale), step_of(out_shift), step_of(bias),
        **chosen.launch(),
    )  # fmt: skip
    return y


@triton.jit
def _gemm8_kernel(
    numbers, weight, scales, out_scale, out_shift, bias, y, tokens, out_features, in_features,
    out_scale_step, out_shift_step, bias_step,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    # Tiles of NEAR blocks of tokens run side by side, so that they share what they read of the weight.
    token_tiles, row_tiles = tl.cdiv(tokens, TOKENS), tl.cdiv(out_features, ROWS)
    band = tl.program_id(0) // (NEAR * row_tiles)
    near = tl.minimum(token_tiles - band * NEAR, NEAR)
    within = tl.program_id(0) % (NEAR * row_tiles)
    first_token, first_row = (band * NEAR + within % near) * TOKENS, within // near * ROWS
    m, o, i = tl.arange(0, TOKENS), tl.arange(0, ROWS), tl.arange(0, INPUTS)
    # What lies beyond the last is read as the tile's first ones, without a mask in the loop, and never stored.
    left = numbers + first_token.to(tl.int64) * in_features
    left += m[:, None] % (tokens - first_token) * in_features + i[None, :]
    right = weight + first_row.to(tl.int64) * in_features
    right += o[None, :] % (out_features - first_row) * in_features + i[:, None]
    total = tl.zeros([TOKENS, ROWS], tl.int32)
    for start in range(0, in_features, INPUTS):
        total = tl.dot(tl.load(left + start), tl.load(right + start), total, out_dtype=tl.int32)
    token, row = first_token + m, first_row + o
    counted, there = token < tokens, row < out_features
    result = total.to(tl.float32) * tl.load(scales + token, mask=counted, other=0.0)[:, None]
    if out_scale is not None:
        result *= tl.load(out_scale + row * out_scale_step, mask=there, other=0.0).to(tl.float32)[None, :]
    if out_shift is not None:
        x_sum = tl.load(scales + tokens + token, mask=counted, other=0.0)
        shift = tl.load(out_shift + row * out_shift_step, mask=there, other=0.0).to(tl.float32)
        result += shift[None, :] * x_sum[:, None]
    result += tl.load(scales + 2 * tokens + token, mask=counted, other=0.0)[:, None]
    if bias is not None:
        result += tl.load(bias + row * bias_step, mask=there, other=0.0).to(tl.float32)[None, :]
    to = y + first_token.to(tl.int64) * out_features + first_row
    to += m[:, None] * out_features + o[None, :]
    tl.store(to, result.to(y.dtype.element_ty), mask=counted[:, None] & there[None, :])
