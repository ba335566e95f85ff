"""The packed linear layer for a few tokens, on the integer units of the tensor cores.

With one token a layer is bound by the bytes of its signs, and next by the instructions that unpack them. Here nothing
is unpacked. Four bytes of signs, masked with one instruction to bit k of each, are four 8-bit integers that are 0 or
2^k: an operand of an integer matrix product as they stand. One product a bit, over the inputs 8 j + k, sums in
integers, and a shift takes the power of two out again.

Activations enter as fixed-point numbers with a scale a token: two 8-bit digits for 16-bit floats (a step of 2^-15 of
the largest), three for 32-bit floats (2^-23), one where 8-bit activations are asked for. Digits are columns of the
product beside the tokens, which a tensor core computes for nothing: its tile is eight columns wide. Sums are exact and
the same in any order, so runs repeat bit for bit.

Legend: M tokens, O out features, I in features, J = ceil(I / 8) bytes of a row of signs, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_weight.triton import NO_TERMS, Terms
from bimamba_lit.kernels.configurations import architecture, configuration

COLUMNS = 8  # the least a tensor core multiplies by


def binary_gemv(
    x: Tensor, signs: Tensor, in_features: int, digits: int, terms: Terms = NO_TERMS, bias: Tensor | None = None
) -> Tensor:
    """Map x (M, I) to (M, O) in x's dtype; `digits` is 1, 2 or 4 (three and a zero).

    The groups of `group_scale` must be whole bytes: I / G a multiple of 8 or G = 1.
    """
    tokens, signs = x.shape[0], signs.contiguous()
    out_features, width = signs.shape
    in_scale, out_scale, group_scale, in_shift, out_shift = terms
    groups = 1 if group_scale is None else group_scale.shape[1]
    columns = max(triton.next_power_of_2(tokens * digits), COLUMNS)
    padded = -(-width // 128) * 128
    planes = torch.empty(8, columns, padded, dtype=torch.int8, device=x.device)
    totals = torch.empty(groups, columns, dtype=torch.int32, device=x.device)
    scales = write_digits(x, in_scale, in_shift, planes, totals, digits)
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if group_scale is not None:
        chosen = configuration("binary_linear/gemv_groups", x.dtype, columns, x.device)
    elif columns > COLUMNS:
        chosen = configuration("binary_linear/gemv_wide", x.dtype, columns, x.device)
    else:
        chosen = configuration("binary_linear/gemv", x.dtype, out_features * width, x.device)
    _gemv_kernel[(triton.cdiv(out_features, chosen.blocks["ROWS"]),)](
        signs, planes, totals, scales, out_scale, group_scale, out_shift, bias, y,
        out_features, width, width // groups, padded, groups, tokens,
        step_of(out_scale), step_of(out_shift), step_of(bias),
        USED=tokens * digits, COLUMNS=columns, DIGITS=digits, **_overlap(x.device), **chosen.launch(),
    )  # fmt: skip
    return y


def write_digits(
    x: Tensor, in_scale: Tensor | None, in_shift: Tensor | None, planes: Tensor, totals: Tensor, digits: int
) -> Tensor:
    """Write the digits of x (M, I) times `in_scale` to `planes`, and their sums to `totals` (G, columns).

    `planes` is (8, columns, padded).

    Returns:
        (3, M): steps, sums of x, and sums of `in_shift` times x.
    """
    tokens, in_features = x.shape
    groups = totals.shape[0]
    scales = torch.empty(3, tokens, dtype=torch.float32, device=x.device)
    chosen = configuration("binary_linear/digits", x.dtype, in_features, x.device)
    _digits_kernel[(tokens,)](
        x, in_scale, in_shift, planes, totals, scales, in_features, in_features // groups, planes.shape[-1], groups,
        tokens, x.stride(0), x.stride(1), step_of(in_scale), step_of(in_shift),
        COLUMNS=totals.shape[1], DIGITS=digits, SINGLE=groups == 1 and in_features <= chosen.blocks["INPUTS"],
        **_overlap(x.device), **chosen.launch(),
    )  # fmt: skip
    return scales


def step_of(term: Tensor | None) -> int:
    """Return the stride of a term, which is 0 where one element serves all."""
    return 0 if term is None or term.shape[0] == 1 else term.stride(0)


def _overlap(device: torch.device) -> dict[str, bool]:
    """Return how to launch a kernel that begins before the one before it has ended, where a GPU can."""
    name = architecture(device)
    can = name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90
    return {"PDL": True, "launch_pdl": True} if can else {"PDL": False}


@triton.jit
def _merge(largest, total, shift, other_largest, other_total, other_shift):
    return tl.maximum(largest, other_largest), total + other_total, shift + other_shift


@triton.jit
def _add(low, middle, high, other_low, other_middle, other_high):
    return low + other_low, middle + other_middle, high + other_high


@triton.jit
def scaled_inputs(x, in_scale, i, inside, stride_i, in_scale_step):
    """Return inputs, and inputs times their scale, in float32."""
    value = tl.load(x + i.to(tl.int64) * stride_i, mask=inside, other=0.0).to(tl.float32)
    scaled = value
    if in_scale is not None:
        scaled *= tl.load(in_scale + i * in_scale_step, mask=inside, other=0.0).to(tl.float32)
    return value, scaled


@triton.jit
def survey(
    x, in_scale, in_shift, scales, token, tokens, in_features, stride_i, in_scale_step, in_shift_step,
    LIMIT: tl.constexpr, INPUTS: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Read a token at `x`, INPUTS at a time, and write its step, LIMIT of which are the largest, and its sums.

    Returns:
        The last stretch's inputs times their scales, what turns such into steps, a step, and whether all are finite.
    """
    block = tl.arange(0, INPUTS)
    largest = tl.zeros([INPUTS], tl.float32)
    total = tl.zeros([INPUTS], tl.float32)
    shift = tl.zeros([INPUTS], tl.float32)
    scaled = tl.zeros([INPUTS], tl.float32)
    for start in range(0, INPUTS if SINGLE else in_features, INPUTS):
        i = start + block
        inside = i < in_features
        value, scaled = scaled_inputs(x, in_scale, i, inside, stride_i, in_scale_step)
        total += value
        if in_shift is not None:
            shift += value * tl.load(in_shift + i * in_shift_step, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(scaled))
    amax, total_sum, shift_sum = tl.reduce((largest, total, shift), 0, _merge)
    finite = tl.abs(total_sum) < float("inf")
    step = tl.where(finite, amax / LIMIT, float("nan"))
    tl.store(scales + token, step)
    tl.store(scales + tokens + token, total_sum)
    tl.store(scales + 2 * tokens + token, shift_sum)
    inverse = tl.where(amax > 1e-30, LIMIT / tl.maximum(amax, 1e-30), 0.0)
    return scaled, inverse, step, finite


@triton.jit
def _digits_kernel(
    x, in_scale, in_shift, planes, totals, scales, in_features, group_size, padded, groups, tokens,
    stride_m, stride_i, in_scale_step, in_shift_step,
    COLUMNS: tl.constexpr, DIGITS: tl.constexpr, INPUTS: tl.constexpr, PDL: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Write a token's fixed-point digits (8, COLUMNS, padded), their sums by group, its step and its shifts' sums.

    SINGLE says that INPUTS covers a token, which is then read once.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    block = tl.arange(0, INPUTS)
    x += token.to(tl.int64) * stride_m
    limit: tl.constexpr = 127 if DIGITS == 1 else (127 * 256 if DIGITS == 2 else 127 * 65536)
    scaled, inverse, step, finite = survey(
        x, in_scale, in_shift, scales, token, tokens, in_features, stride_i, in_scale_step, in_shift_step,
        limit, INPUTS, SINGLE,
    )  # fmt: skip
    planes += token.to(tl.int64) * DIGITS * padded
    totals += token * DIGITS
    for group in range(1 if SINGLE else groups):
        low_sum = tl.zeros([INPUTS], tl.int32)
        middle_sum = tl.zeros([INPUTS], tl.int32)
        high_sum = tl.zeros([INPUTS], tl.int32)
        for start in range(0, INPUTS if SINGLE else group_size, INPUTS):
            i = group * group_size + start + block
            inside = start + block < group_size
            if not SINGLE:
                _, scaled = scaled_inputs(x, in_scale, i, inside, stride_i, in_scale_step)
            number = tl.floor(tl.where(finite, scaled, 0.0) * inverse + 0.5).to(tl.int32)
            place = planes + i % 8 * COLUMNS * padded + i // 8
            low = number if DIGITS == 1 else ((number + 128) & 255) - 128
            tl.store(place, low.to(tl.int8), mask=inside)
            low_sum += low
            if DIGITS == 2:
                high = (number - low) >> 8
                tl.store(place + padded, high.to(tl.int8), mask=inside)
                middle_sum += high
            if DIGITS == 4:
                number = (number - low) >> 8
                middle = ((number + 128) & 255) - 128
                high = (number - middle) >> 8
                tl.store(place + padded, middle.to(tl.int8), mask=inside)
                tl.store(place + 2 * padded, high.to(tl.int8), mask=inside)
                middle_sum += middle
                high_sum += high
        low_total, middle_total, high_total = tl.reduce((low_sum, middle_sum, high_sum), 0, _add)
        to = totals + group * COLUMNS
        tl.store(to, low_total)
        if DIGITS > 1:
            tl.store(to + 1, middle_total)
        if DIGITS == 4:
            tl.store(to + 2, high_total)


@triton.jit
def _gemv_kernel(
    signs, planes, totals, scales, out_scale, group_scale, out_shift, bias, y,
    out_features, width, group_width, padded, groups, tokens,
    out_scale_step, out_shift_step, bias_step,
    USED: tl.constexpr, COLUMNS: tl.constexpr, DIGITS: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BYTES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply ROWS rows of signs by every column of digits, bit by bit, and apply the terms.

    PARTS stretches of BYTES bytes of a row are products of their own, one a warp, added up at the end.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS) * BYTES
    j = tl.arange(0, BYTES)
    there = rows < out_features
    used = (columns < USED) & (columns % DIGITS < 3)
    bit = COLUMNS * padded
    row = rows.to(tl.int64) * width
    signs_at = signs + row[None, :, None] + (part[:, None, None] + j[None, None, :])
    planes_at = planes + columns[None, None, :] * padded + (part[:, None, None] + j[None, :, None])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # Signs come into the cache while the digits are made.
        line = tl.arange(0, 8) * 128
        for start in range(0, width, 1024):
            at = tl.where(there[:, None], row[:, None] + tl.minimum(start + line, width - 1)[None, :], 0)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; // no result $0", "=r,l", [(signs + at).to(tl.uint64)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        tl.extra.cuda.gdc_wait()
    TOKENS: tl.constexpr = COLUMNS // DIGITS
    token = tl.arange(0, TOKENS)
    counted = token < tokens
    step = tl.load(scales + token, mask=counted, other=0.0)
    row_scale = tl.full([ROWS], 1.0, tl.float32)
    if out_scale is not None:
        row_scale = tl.load(out_scale + rows * out_scale_step, mask=there, other=0.0).to(tl.float32)
    shift = tl.broadcast_to(tl.load(scales + 2 * tokens + token, mask=counted, other=0.0)[None, :], [ROWS, TOKENS])
    if out_shift is not None:
        row_shift = tl.load(out_shift + rows * out_shift_step, mask=there, other=0.0).to(tl.float32)
        shift += row_shift[:, None] * tl.load(scales + tokens + token, mask=counted, other=0.0)[None, :]
    if bias is not None:
        shift += tl.load(bias + rows * bias_step, mask=there, other=0.0).to(tl.float32)[:, None]
    y_digits = tl.zeros([ROWS, COLUMNS], tl.float32)
    for group in range(groups):
        total = tl.load(totals + group * COLUMNS + columns, mask=used, other=0)
        a0 = tl.zeros([PARTS, ROWS, COLUMNS], tl.int32)
        a1 = tl.zeros([PARTS, ROWS, COLUMNS], tl.int32)
        a2 = tl.zeros([PARTS, ROWS, COLUMNS], tl.int32)
        a3 = tl.zeros([PARTS, ROWS, COLUMNS], tl.int32)
        a4 = tl.zeros([PARTS, ROWS, COLUMNS], tl.int32)
        a5 = tl.zeros([PARTS, ROWS, COLUMNS], tl.int32)
        a6 = tl.zeros([PARTS, ROWS, COLUMNS], tl.int32)
        a7 = tl.zeros([PARTS, ROWS, COLUMNS], tl.int32)
        for start in range(0, group_width, PARTS * BYTES):
            inside = part[:, None] + j[None, :] < group_width - start
            at = group * group_width + start
            word = tl.load(signs_at + at, mask=there[None, :, None] & inside[:, None, :], other=0)
            word = word.to(tl.int8, bitcast=True)
            wanted = used[None, None, :] & inside[:, :, None]
            a0 = tl.dot(word & 1, tl.load(planes_at + at, mask=wanted, other=0), a0, out_dtype=tl.int32)
            a1 = tl.dot(word & 2, tl.load(planes_at + bit + at, mask=wanted, other=0), a1, out_dtype=tl.int32)
            a2 = tl.dot(word & 4, tl.load(planes_at + 2 * bit + at, mask=wanted, other=0), a2, out_dtype=tl.int32)
            a3 = tl.dot(word & 8, tl.load(planes_at + 3 * bit + at, mask=wanted, other=0), a3, out_dtype=tl.int32)
            a4 = tl.dot(word & 16, tl.load(planes_at + 4 * bit + at, mask=wanted, other=0), a4, out_dtype=tl.int32)
            a5 = tl.dot(word & 32, tl.load(planes_at + 5 * bit + at, mask=wanted, other=0), a5, out_dtype=tl.int32)
            a6 = tl.dot(word & 64, tl.load(planes_at + 6 * bit + at, mask=wanted, other=0), a6, out_dtype=tl.int32)
            # As an 8-bit integer the last bit is -2^7.
            a7 = tl.dot(word & -128, tl.load(planes_at + 7 * bit + at, mask=wanted, other=0), a7, out_dtype=tl.int32)
        positive = a0 + (a1 >> 1) + (a2 >> 2) + (a3 >> 3) + (a4 >> 4) + (a5 >> 5) + (a6 >> 6) - (a7 >> 7)
        signed = (2 * tl.sum(positive, 0) - total[None, :]).to(tl.float32)
        if group_scale is not None:
            signed *= tl.load(group_scale + rows * groups + group, mask=there, other=0.0).to(tl.float32)[:, None]
        y_digits += signed
    place = tl.exp2((8 * (columns % DIGITS)).to(tl.float32))
    product = tl.sum(tl.reshape(y_digits * place[None, :], [ROWS, TOKENS, DIGITS]), 2)
    result = product * step[None, :] * row_scale[:, None] + shift
    at = y + token.to(tl.int64)[None, :] * out_features + rows[:, None]
    tl.store(at, result.to(y.dtype.element_ty), mask=counted[None, :] & there[:, None])
