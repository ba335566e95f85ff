"""The packed linear layer for many tokens of 8-bit activations: an integer product with the terms in its epilogue.

One launch prepares both operands, the tokens rounded to 8 bits and the signs as 8-bit numbers, and one multiplies them.

Legend: M tokens, O out features, I in features.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bimamba_lit.kernels.binary_linear.triton_gemv import scaled_inputs, step_of, survey
from bimamba_lit.kernels.binary_weight.triton import Terms
from bimamba_lit.kernels.configurations import configuration

MULTIPLE = 128  # of in_features


def binary_gemm8(x: Tensor, signs: Tensor, in_features: int, terms: Terms, bias: Tensor | None) -> Tensor:
    """Map x (M, I), rounded to 8 bits a token, to (M, O) in x's dtype; I a multiple of `MULTIPLE`, no group scales."""
    tokens, out_features = x.shape[0], signs.shape[0]
    _, out_scale, _, _, out_shift = terms
    numbers, scales, weight = _operands(x, signs.contiguous(), in_features, terms)
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    chosen = configuration("binary_linear/gemm8", x.dtype, in_features, x.device)
    blocks = chosen.blocks
    left: Any = numbers
    right: Any = weight
    if blocks["DESCRIPTORS"]:
        left = TensorDescriptor.from_tensor(numbers, [blocks["TOKENS"], blocks["INPUTS"]])
        right = TensorDescriptor.from_tensor(weight, [blocks["ROWS"], blocks["INPUTS"]])
    tiles = triton.cdiv(tokens, blocks["TOKENS"]) * triton.cdiv(out_features, blocks["ROWS"])
    _gemm8_kernel[(tiles,)](
        left, right, scales, out_scale, out_shift, bias, y, tokens, out_features, in_features,
        step_of(out_scale), step_of(out_shift), step_of(bias),
        **chosen.launch(),
    )  # fmt: skip
    return y


def _operands(x: Tensor, signs: Tensor, in_features: int, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers (M, I) int8; their steps, sums of x and sums of `in_shift` times x (3, M); weight (O, I) int8."""
    tokens, out_features = x.shape[0], signs.shape[0]
    in_scale, _, _, in_shift, _ = terms
    numbers = torch.empty(tokens, in_features, dtype=torch.int8, device=x.device)
    weight = torch.empty(out_features, in_features, dtype=torch.int8, device=x.device)
    scales = torch.empty(3, tokens, dtype=torch.float32, device=x.device)
    chosen = configuration("binary_linear/operands8", x.dtype, in_features, x.device)
    across = triton.cdiv(in_features // 8, chosen.blocks["BYTES"])
    tiles = across * triton.cdiv(out_features, chosen.blocks["ROWS"])
    _operands_kernel[(tokens + tiles,)](
        x, in_scale, in_shift, signs, numbers, weight.view(torch.int32), scales, tokens, out_features, in_features,
        across, x.stride(0), x.stride(1), step_of(in_scale), step_of(in_shift),
        SINGLE=in_features <= chosen.blocks["INPUTS"], **chosen.launch(),
    )  # fmt: skip
    return numbers, scales, weight


@triton.jit
def _operands_kernel(
    x, in_scale, in_shift, signs, numbers, weight, scales, tokens, out_features, in_features, across,
    stride_m, stride_i, in_scale_step, in_shift_step,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < tokens:
        _round(
            x, in_scale, in_shift, numbers, scales, program, tokens, in_features, stride_m, stride_i,
            in_scale_step, in_shift_step, INPUTS, SINGLE,
        )  # fmt: skip
    else:
        _unpack(signs, weight, program - tokens, across, out_features, in_features, ROWS, BYTES)


@triton.jit
def _round(
    x, in_scale, in_shift, numbers, scales, token, tokens, in_features, stride_m, stride_i,
    in_scale_step, in_shift_step, INPUTS: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Round a token, times the inputs' scales, to 8 bits; SINGLE says that INPUTS covers it: it is read once."""
    block = tl.arange(0, INPUTS)
    x += token.to(tl.int64) * stride_m
    numbers += token.to(tl.int64) * in_features
    scaled, inverse, step, finite = survey(
        x, in_scale, in_shift, scales, token, tokens, in_features, stride_i, in_scale_step, in_shift_step,
        127, INPUTS, SINGLE,
    )  # fmt: skip
    for start in range(0, INPUTS if SINGLE else in_features, INPUTS):
        i = start + block
        inside = i < in_features
        if not SINGLE:
            _, scaled = scaled_inputs(x, in_scale, i, inside, stride_i, in_scale_step)
        number = tl.floor(tl.where(finite, scaled, 0.0) * inverse + 0.5)
        tl.store(numbers + i, number.to(tl.int32).to(tl.int8), mask=inside)


@triton.jit
def _unpack(signs, weight, tile, across, out_features, in_features, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Write a tile of signs as 8-bit numbers, four to a word: 0x204081 takes four bits to the last of four bytes."""
    byte = tile % across * BYTES + tl.arange(0, BYTES)
    half = tl.arange(0, 2)
    rows = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    width = in_features // 8
    mask = (rows < out_features)[:, None] & (byte < width)[None, :]
    word = tl.load(signs + rows[:, None] * width + byte[None, :], mask=mask, other=0).to(tl.int32)
    four = (word[:, :, None] >> (4 * half)[None, None, :]) & 15
    value = ((four * 0x204081) & 0x01010101) * 0xFE ^ -1
    to = weight + rows[:, None, None] * (2 * width) + (byte[:, None] * 2 + half[None, :])[None, :, :]
    tl.store(to, value, mask=mask[:, :, None])


@triton.jit
def _gemm8_kernel(
    numbers, weight, scales, out_scale, out_shift, bias, y, tokens, out_features, in_features,
    out_scale_step, out_shift_step, bias_step,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, NEAR: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Multiply a tile; `numbers` and `weight` are descriptors of tensors, or pointers."""
    # Tiles of NEAR blocks of tokens run side by side, so that they share what they read of the weight.
    token_tiles, row_tiles = tl.cdiv(tokens, TOKENS), tl.cdiv(out_features, ROWS)
    band = tl.program_id(0) // (NEAR * row_tiles)
    near = tl.minimum(token_tiles - band * NEAR, NEAR)
    within = tl.program_id(0) % (NEAR * row_tiles)
    first_token, first_row = (band * NEAR + within % near) * TOKENS, within // near * ROWS
    m, o, i = tl.arange(0, TOKENS), tl.arange(0, ROWS), tl.arange(0, INPUTS)
    total = tl.zeros([TOKENS, ROWS], tl.int32)
    if DESCRIPTORS:
        for start in range(0, in_features, INPUTS):
            left = numbers.load([first_token, start])
            total = tl.dot(left, weight.load([first_row, start]).T, total, out_dtype=tl.int32)
    else:
        # What lies beyond the last is read as the tile's first ones, without a mask in the loop, and never stored.
        left = numbers + first_token.to(tl.int64) * in_features
        left += m[:, None] % (tokens - first_token) * in_features + i[None, :]
        right = weight + first_row.to(tl.int64) * in_features
        right += o[None, :] % (out_features - first_row) * in_features + i[:, None]
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
