"""The packed product for a token or two by counts, in one launch.

Every program makes the planes of all inputs for itself, from the cache, while its signs are still on their way: that
costs less than a launch for it. A warp makes those of its own stretch of inputs. Numbers are 16 bits, with a step a
warp, 2^-15 of the largest of its inputs; or 8 where 8-bit activations are asked for, with a step a token. All of a
program's signs are asked for at once, before the kernel before has ended: no kernel that lets others begin early writes
signs. Whatever else is read may be that kernel's output, and is waited for.

A thread makes its byte of four words of every plane: a quarter of each word's inputs, 8, a bit for each.

Legend: M tokens, O out features, I in features, W = I / 32 words of a row; `triton_counts` has the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_linear.triton_counts import ask, counted, put
from bimamba_lit.kernels.binary_linear.triton_planes import (
    add_bytes,
    aligned,
    bytes_of,
    eight,
    fetch,
    larger,
    load_numbers,
    sum_of_warp,
    transposed,
    turned,
)
from bimamba_lit.kernels.binary_linear.triton_trades import (
    largest_of_all,
    largest_of_warp,
    row_sums,
    row_sums_of_steps,
    trade_planes,
)
from bimamba_lit.kernels.binary_linear.triton_words import (
    BITS,
    aligned_words,
    begin_next,
    launch_early,
    load_terms,
    overlaps,
    stride_of,
    wait_if,
)
from bimamba_lit.kernels.binary_weight.triton import NO_TERMS, Terms
from bimamba_lit.kernels.configurations import INTERPRETER, architecture, configuration


def counts_gemv(x: Tensor, signs: Tensor, digits: int, terms: Terms = NO_TERMS, bias: Tensor | None = None) -> Tensor:
    """Map x (M, I) to (M, O) in x's dtype, with numbers of `digits` (1 or 2) times 8 bits, where `counts_fit`."""
    tokens, in_features = x.shape
    out_features, words = signs.shape[0], in_features // BITS
    in_scale, out_scale, _, in_shift, out_shift = terms
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    chosen = configuration("binary_linear/counts", x.dtype, words, x.device)
    counts_kernel[(triton.cdiv(out_features, chosen.blocks["ROWS"]), tokens)](
        aligned_words(signs), *(aligned(values, in_features) for values in (x, in_scale, in_shift)), out_scale,
        out_shift, bias, *map(stride_of, (out_scale, out_shift, bias)), y, out_features, W=words, DIGITS=digits,
        PTX=architecture(x.device) != INTERPRETER, PDL=overlaps(x.device), SPLIT=chosen.num_warps,
        **launch_early(x.device), **chosen.launch(),
    )  # fmt: skip
    return y


@triton.jit
def _add(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _scaled_inputs(
    x, in_scale, in_shift, SUMS: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Return a thread's inputs times `in_scale`: a quarter of four words of its warp's, each (THREADS, 8).

    And the largest of its own, the bits of an integer, which those of what is not finite exceed; with SUMS, of all
    inputs, the sums of x and of x times `in_shift`.
    """
    thread = tl.arange(0, 32 * SPLIT)
    largest = tl.zeros([32 * SPLIT], tl.float32)
    total, shifted = largest, largest
    scaled = ()
    for part in tl.static_range(4):
        word = thread // 32 * (16 * STEPS) + thread % 32 // 4 * 4 + part
        inside = ((word < W) & (thread % 32 < 16 * STEPS))[:, None]
        i = (word * 32 + thread % 4 * 8)[:, None] + tl.arange(0, 8)[None, :]
        value = load_numbers(x + i, inside, PTX)
        if SUMS:
            total += tl.sum(value, 1)
        if in_shift is not None:
            shifted += tl.sum(value * load_numbers(in_shift + i, inside, PTX), 1)
        if in_scale is not None:
            value *= load_numbers(in_scale + i, inside, PTX)
        largest = larger(largest, tl.reduce(tl.abs(value), 1, larger))
        scaled = scaled + (value,)
    if SUMS:
        total, shifted = tl.reduce((total, shifted), 0, _add)
    return scaled, largest.to(tl.int32, bitcast=True), total, shifted


@triton.jit
def _made(scaled, inverse, SPLIT: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr):
    """Return a thread's bytes of planes, 8 for each digit, one for each of its words; and the sum of its numbers."""
    THREADS: tl.constexpr = 32 * SPLIT
    numbers = ()
    for part in tl.static_range(4):
        # A float of this size has a step of 1 and, in its low bits, the integer in two's complement.
        numbers = numbers + ((scaled[part] * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True),)
    # Of each only the lower 16 bits count.
    ab, cd = bytes_of(numbers[0], numbers[1], 0x5410, PTX), bytes_of(numbers[2], numbers[3], 0x5410, PTX)
    total = tl.zeros([THREADS], tl.int32)
    made = ()
    for digit in tl.static_range(DIGITS - 1, -1, -1):
        own = eight(bytes_of(ab, cd, 0x6420 + 0x1111 * digit, PTX), THREADS)
        total = total << 8
        for n in tl.static_range(8):
            total = add_bytes(total, own[n], 0x01010101, digit == DIGITS - 1, PTX)
        made = transposed(own[0], own[1], own[2], own[3], own[4], own[5], own[6], own[7], PTX) + made
    return made, total


@triton.jit
def counts_kernel(
    signs, x, in_scale, in_shift, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, y,
    out_features, W: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of the layer for a token, 16 at a time by SPLIT warps."""
    THREADS: tl.constexpr = 32 * SPLIT
    STEPS: tl.constexpr = (W + 16 * SPLIT - 1) // (16 * SPLIT)
    SHARE: tl.constexpr = THREADS // ROWS
    SUMS: tl.constexpr = in_shift is not None or out_shift is not None
    tl.static_assert(W <= THREADS and ROWS <= THREADS)
    begin_next(PDL)
    token = tl.program_id(1).to(tl.int64)
    x += token * (32 * W)
    words = ()
    for tile in tl.static_range(ROWS // 16):
        words = words + ask(signs, tl.program_id(0) * ROWS + 16 * tile, out_features, 16, SPLIT, W)
    if PDL:
        fetch(x, 32 * W, SPLIT)
        if in_scale is not None:
            fetch(in_scale, 32 * W, SPLIT)
        if in_shift is not None:
            fetch(in_shift, 32 * W, SPLIT)
    zero = tl.program_id(2)  # of one: the compiler does not know that
    words = put(words, zero, THREADS)
    if PDL:
        wait_if(zero)
    scaled, largest, total, shifted = _scaled_inputs(x, in_scale, in_shift, SUMS, W, SPLIT, STEPS, PTX)
    thread = tl.arange(0, THREADS)
    row = tl.program_id(0) * ROWS + thread // SHARE
    there = row < out_features
    scale, shift, added = load_terms(
        row, there, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, THREADS
    )
    bits = largest_of_all(largest, SPLIT, PTX) if DIGITS == 1 else largest_of_warp(largest, PTX)
    largest = bits.to(tl.float32, bitcast=True)
    limit: tl.constexpr = 127 if DIGITS == 1 else 127 * 256
    inverse = tl.where(largest > 1e-30, limit / tl.maximum(largest, 1e-30), 0.0)
    made, own = _made(scaled, inverse, SPLIT, DIGITS, PTX)
    taken = trade_planes(made, SPLIT, STEPS, PTX)
    planes = ()
    for n in tl.static_range(DIGITS * STEPS):
        planes = planes + (turned(taken[4 * n], taken[4 * n + 1], taken[4 * n + 2], taken[4 * n + 3], PTX),)
    # Once in a row's sum, in the first column.
    column = thread % 4
    own = tl.where(column == 0, sum_of_warp(own, SPLIT, PTX), 0)
    parts = ()
    for tile in tl.static_range(ROWS // 16):
        parts = parts + counted(words, planes, tile, own, column, STEPS, DIGITS, PTX)
    length = tl.where(bits < 0x7F800000, largest / limit, float("nan"))
    if DIGITS == 1:
        result = row_sums(parts, SPLIT, PTX).to(tl.float32) * length
    else:
        result = row_sums_of_steps(parts, length, SPLIT, PTX)
    result = result * scale + added
    if in_shift is not None:
        result += shifted
    if out_shift is not None:
        result += shift * total
    tl.store(y + token * out_features + row, result.to(y.dtype.element_ty), mask=there & (thread % SHARE == 0))
