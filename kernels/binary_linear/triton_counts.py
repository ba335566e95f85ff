"""The packed product for a token or two on the binary units of the tensor cores: nothing of a weight is unpacked.

A row's word is 32 signs, and so is a word of a plane: bit p of the fixed-point numbers of 32 inputs, in two's
complement. How often both have a 1 is what a tensor core counts, for 16 rows, 8 planes and 256 inputs an instruction.
Counts times 2^p, the last plane's less, are the sum of the numbers where the sign is +1, an integer that is exact.
Numbers are 16 bits (a step of 2^-15 of the token's largest), or 8 where 8-bit activations are asked for.

A thread keeps the words that an instruction wants of it, four a load. Tensors have one element a thread for that: the
compiler has no other way to place them. All of a program's signs are asked for at once, and before the kernel that
makes the planes has ended. SPLIT warps share 16 rows, each with a stretch of the inputs.

Legend: M tokens, O out features, I in features, W = I / 32 words of a row, P planes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_linear.triton_words import (
    BITS,
    aligned_words,
    begin_next,
    launch_early,
    load_terms,
    overlaps,
    stride_of,
    wait,
)
from bimamba_lit.kernels.binary_weight.triton import NO_TERMS, Terms
from bimamba_lit.kernels.configurations import INTERPRETER, architecture, configuration

# Where an instruction counts common ones: later tensor cores have none for it.
COUNTING = ("sm_80", "sm_90", INTERPRETER)
MOST_INPUTS = 16384  # with more, sums of numbers would leave 32 bits, and signs their registers


def counts_fit(in_features: int, group_scale: Tensor | None, device: torch.device) -> bool:
    """Say whether a device counts, and a layer's rows are whole words under one scale."""
    whole = in_features % BITS == 0 and group_scale is None
    return whole and in_features <= MOST_INPUTS and architecture(device) in COUNTING


def counts_gemv(x: Tensor, signs: Tensor, digits: int, terms: Terms = NO_TERMS, bias: Tensor | None = None) -> Tensor:
    """Map x (M, I) to (M, O) in x's dtype, with numbers of `digits` (1 or 2) times 8 bits, where `counts_fit`."""
    tokens, in_features = x.shape
    out_features, words = signs.shape[0], in_features // BITS
    in_scale, out_scale, _, in_shift, out_shift = terms
    planes = torch.empty(tokens, 8 * digits, words, dtype=torch.int32, device=x.device)
    scales = torch.empty(tokens, 4 + words, dtype=torch.float32, device=x.device)
    early = {"PDL": overlaps(x.device), **launch_early(x.device)}
    chosen = configuration("binary_linear/planes", x.dtype, words, x.device)
    planes_kernel[(triton.cdiv(words, chosen.blocks["WORDS"]), tokens)](
        x, in_scale, in_shift, planes, scales, x.stride(0), x.stride(1), stride_of(in_scale), stride_of(in_shift),
        W=words, ALL=triton.next_power_of_2(in_features), DIGITS=digits, **early, **chosen.launch(),
    )  # fmt: skip
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    chosen = configuration("binary_linear/counts", x.dtype, words, x.device)
    counts_kernel[(triton.cdiv(out_features, chosen.blocks["ROWS"]), tokens)](
        aligned_words(signs), planes, scales, out_scale, out_shift, bias, stride_of(out_scale), stride_of(out_shift),
        stride_of(bias), y, out_features, W=words, DIGITS=digits, PTX=architecture(x.device) != INTERPRETER,
        **early, **chosen.launch(),
    )  # fmt: skip
    return y


@triton.jit
def _scaled(x, in_scale, i, inside, x_i, in_scale_step):
    value = tl.load(x + i * x_i, mask=inside, other=0.0).to(tl.float32)
    scaled = value
    if in_scale is not None:
        scaled = value * tl.load(in_scale + i * in_scale_step, mask=inside, other=0.0).to(tl.float32)
    return value, scaled


@triton.jit
def _numbers(scaled, inverse, finite):
    return tl.floor(tl.where(finite, scaled, 0.0) * inverse + 0.5).to(tl.int32)


@triton.jit
def _merge(largest, total, shift, other_largest, other_total, other_shift):
    return tl.maximum(largest, other_largest), total + other_total, shift + other_shift


@triton.jit
def planes_kernel(
    x, in_scale, in_shift, planes, scales, x_m, x_i, in_scale_step, in_shift_step,
    W: tl.constexpr, ALL: tl.constexpr, DIGITS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write WORDS words of every plane (M, P, W); the first program also a token's step and sums.

    `scales` are (M, 4 + W): the step, the sums of inputs and of inputs times `in_shift`, a gap, and for each word the
    sum of its numbers, an integer's bits.
    """
    wait(PDL)
    begin_next(PDL)
    token = tl.program_id(1).to(tl.int64)
    x += token * x_m
    i = tl.arange(0, ALL)
    inside = i < 32 * W
    value, scaled = _scaled(x, in_scale, i, inside, x_i, in_scale_step)
    w = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mine = w[:, None] * 32 + tl.arange(0, 32)[None, :]
    _, own = _scaled(x, in_scale, mine, mine < 32 * W, x_i, in_scale_step)
    shift = tl.zeros([ALL], tl.float32)
    if in_shift is not None:
        shift = value * tl.load(in_shift + i * in_shift_step, mask=inside, other=0.0).to(tl.float32)
    largest, total, shift_sum = tl.reduce((tl.abs(scaled), value, shift), 0, _merge)
    limit: tl.constexpr = 127 if DIGITS == 1 else 127 * 256
    finite = tl.abs(total) < float("inf")
    inverse = tl.where(largest > 1e-30, limit / tl.maximum(largest, 1e-30), 0.0)
    numbers = _numbers(own, inverse, finite)
    bit = tl.arange(0, 32)[None, :]
    words = tl.zeros([WORDS, 32], tl.int32)
    for plane in tl.static_range(8 * DIGITS):
        words = tl.where(bit == plane, tl.sum(((numbers >> plane) & 1) << bit, 1)[:, None], words)
    to = planes + token * (8 * DIGITS * W) + bit * W + w[:, None]
    tl.store(to, words, mask=(bit < 8 * DIGITS) & (w < W)[:, None])
    scales += token * (4 + W)
    tl.store(scales + 4 + w, tl.sum(numbers, 1).to(tl.float32, bitcast=True), mask=w < W)
    if tl.program_id(0) == 0:
        tl.store(scales, tl.where(finite, largest / limit, float("nan")))
        tl.store(scales + 1, total)
        tl.store(scales + 2, shift_sum)


@triton.jit
def thread_places(ROWS: tl.constexpr, SPLIT: tl.constexpr, W: tl.constexpr):
    """Return a thread's first row of a program's, its line, column, and words (THREADS, 4) of the first step."""
    STEPS: tl.constexpr = (W + 16 * SPLIT - 1) // (16 * SPLIT)
    thread = tl.arange(0, 2 * ROWS * SPLIT)
    warp = thread // 32
    line, column = thread % 32 // 4, thread % 4
    w = (warp % SPLIT * (16 * STEPS) + column * 4)[:, None] + tl.arange(0, 4)[None, :]
    return warp // SPLIT * 16 + line, line, column, w


@triton.jit
def ask(signs, first_row, out_features, ROWS: tl.constexpr, SPLIT: tl.constexpr, W: tl.constexpr):
    """Ask for all words of a program's rows: a thread's four of its row, and of that 8 below, for each step."""
    STEPS: tl.constexpr = (W + 16 * SPLIT - 1) // (16 * SPLIT)
    row, _, _, w = thread_places(ROWS, SPLIT, W)
    row += first_row
    at = signs + row.to(tl.int64)[:, None] * W + w
    words = ()
    for step in tl.static_range(STEPS):
        inside = w + 16 * step < W
        words = words + (
            tl.load(at + 16 * step, mask=inside & (row < out_features)[:, None], other=0),
            tl.load(at + 16 * step + 8 * W, mask=inside & (row + 8 < out_features)[:, None], other=0),
        )
    return words


@triton.jit
def four(words, THREADS: tl.constexpr):
    """Take (THREADS, 4) apart."""
    even, odd = tl.split(tl.reshape(words, [THREADS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def count(low, high, planes, c, THREADS: tl.constexpr, PTX: tl.constexpr):
    """Add to c the common ones of 8 planes and 16 rows, of 512 inputs, in the places that m16n8k256 has for them.

    `low`, `high` and `planes` are four words a thread: of the first 8 rows, of the last, and of its line's plane.
    """
    a0, a1, a2, a3 = low
    b0, b1, b2, b3 = high
    p0, p1, p2, p3 = planes
    return _count(a2, b2, a3, b3, p2, p3, _count(a0, b0, a1, b1, p0, p1, c, THREADS, PTX), THREADS, PTX)


@triton.jit
def _count(a0, a1, a2, a3, b0, b1, c, THREADS: tl.constexpr, PTX: tl.constexpr):
    c0, c1, c2, c3 = c
    if PTX:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low0, low1 = _common(a0, b0, THREADS)
        low2, low3 = _common(a2, b1, THREADS)
        high0, high1 = _common(a1, b0, THREADS)
        high2, high3 = _common(a3, b1, THREADS)
        c0, c1, c2, c3 = c0 + low0 + low2, c1 + low1 + low3, c2 + high0 + high2, c3 + high1 + high3
    return c0, c1, c2, c3


@triton.jit
def _common(a, b, THREADS: tl.constexpr):
    """Count the common ones of 8 rows and 8 planes; a thread has those of two planes."""
    both = tl.reshape(a, [THREADS // 32, 8, 1, 4]) & tl.reshape(b, [THREADS // 32, 1, 8, 4])
    both = both - ((both >> 1) & 0x55555555)
    both = (both & 0x33333333) + ((both >> 2) & 0x33333333)
    both = (both + (both >> 4)) & 0x0F0F0F0F
    even, odd = tl.split(tl.reshape(tl.sum((both * 0x01010101) >> 24, 3), [THREADS // 32, 8, 4, 2]))
    return tl.reshape(even, [THREADS]), tl.reshape(odd, [THREADS])


@triton.jit
def worth(tiles, half: tl.constexpr, column, FIRST: tl.constexpr, STOP: tl.constexpr):
    """Return what a thread counted in a row, of tiles FIRST to STOP, is worth; the first plane of FIRST is worth 1."""
    value = tl.zeros_like(column)
    for tile in tl.static_range(FIRST, STOP):
        even, odd = tiles[tile][2 * half], tiles[tile][2 * half + 1]
        if tile == len(tiles) - 1:
            odd = tl.where(column == 3, -odd, odd)
        value += ((even + 2 * odd) << (2 * column)) << (8 * (tile - FIRST))
    return value


@triton.jit
def by_row(low, high, ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """Add up what threads have of their first row, and of that 8 below: (ROWS,)."""
    both = tl.reshape(tl.join(low, high), [ROWS // 16, SPLIT, 8, 4, 2])
    return tl.sum(tl.reshape(tl.permute(both, [0, 4, 2, 1, 3]), [ROWS, SPLIT * 4]), 1)


@triton.jit
def counts_kernel(
    signs, planes, scales, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, y, out_features,
    W: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of the layer for a token."""
    THREADS: tl.constexpr = 2 * ROWS * SPLIT
    begin_next(PDL)
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < out_features
    _, line, column, w = thread_places(ROWS, SPLIT, W)
    words = ask(signs, tl.program_id(0) * ROWS, out_features, ROWS, SPLIT, W)
    terms = load_terms(rows, there, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, ROWS)
    wait(PDL)
    scales += token * (4 + W)
    planes += token * (8 * DIGITS * W)
    length, total, shifted = tl.load(scales), tl.load(scales + 1), tl.load(scales + 2)
    counted = tl.zeros([THREADS], tl.int32)
    zero = tl.zeros([THREADS], tl.int32)
    values = ()
    for step in tl.static_range(len(words) // 2):
        inside = w + 16 * step < W
        for digit in tl.static_range(DIGITS):
            at = planes + (line[:, None] + 8 * digit) * W + w + 16 * step
            values = values + (tl.load(at, mask=inside, other=0),)
        sums = tl.load(scales + 4 + w + 16 * step, mask=inside, other=0.0)
        values = values + (sums.to(tl.int32, bitcast=True),)
    tiles = ()
    for _ in tl.static_range(DIGITS):
        tiles = tiles + ((zero, zero, zero, zero),)
    for step in tl.static_range(len(words) // 2):
        first, last = four(words[2 * step], THREADS), four(words[2 * step + 1], THREADS)
        counted += tl.sum(values[(DIGITS + 1) * step + DIGITS], 1)
        new = ()
        for digit in tl.static_range(DIGITS):
            mine = four(values[(DIGITS + 1) * step + digit], THREADS)
            new = new + (count(first, last, mine, tiles[digit], THREADS, PTX),)
        tiles = new
    low = 2 * worth(tiles, 0, column, 0, DIGITS) - counted
    high = 2 * worth(tiles, 1, column, 0, DIGITS) - counted
    scale, shift, added = terms
    result = by_row(low, high, ROWS, SPLIT).to(tl.float32) * length * scale + shifted + added
    if out_shift is not None:
        result += shift * total
    tl.store(y + token * out_features + rows, result.to(y.dtype.element_ty), mask=there)
