"""Counting on the binary units of the tensor cores: products of packed signs of which nothing is unpacked.

A row's word is 32 signs, and so is a word of a plane: bit p of the fixed-point numbers of 32 inputs, in two's
complement. How often both have a 1 is what a tensor core counts, for 16 rows, 8 planes and 256 inputs an instruction.
Counts times 2^p, the last plane's less, are the sum of the numbers where the sign is +1, an integer that is exact.

A thread keeps the words that an instruction wants of it, four a load. Tensors have one element a thread for that: the
compiler has no other way to place them. SPLIT warps share 16 rows, each with a stretch of the inputs: STEPS steps of 16
words. Of an instruction's places a thread has one line of eight, rows or planes, and one column of four, words.

Legend: W = I / 32 words of a row of I inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_linear.triton_words import BITS
from bimamba_lit.kernels.configurations import INTERPRETER, architecture

# Where an instruction counts common ones: later tensor cores have none for it.
COUNTING = ("sm_80", "sm_90", INTERPRETER)
MOST_INPUTS = 16384  # with more, sums of numbers would leave 32 bits, and signs their registers


def counts_fit(in_features: int, group_scale: Tensor | None, device: torch.device) -> bool:
    """Say whether a device counts, and a layer's rows are whole words under one scale."""
    whole = in_features % BITS == 0 and group_scale is None
    return whole and in_features <= MOST_INPUTS and architecture(device) in COUNTING


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
def put(words, zero, THREADS: tl.constexpr):
    """Return a step's words where an instruction wants them, by an operation of which the compiler knows no result.

    Left to itself it would move them just before they are counted, after the wait.
    """
    put = ()
    for n in tl.static_range(len(words)):
        a, b, c, d = four(words[n], THREADS)
        put = put + ((a ^ zero, b ^ zero, c ^ zero, d ^ zero),)
    return put


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
def counted(
    words, planes, tile: tl.constexpr, own, column, STEPS: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr
):
    """Return a thread's parts of a tile's first 8 rows and of its last: what counts are worth, twice, less `own`."""
    THREADS: tl.constexpr = own.shape[0]
    zero = tl.zeros_like(own)
    even = 2 << (2 * column)
    low, high = -own, -own
    for digit in tl.static_range(DIGITS):
        found = (zero, zero, zero, zero)
        for step in tl.static_range(STEPS):
            first, last = words[2 * (tile * STEPS + step)], words[2 * (tile * STEPS + step) + 1]
            found = count(first, last, planes[step * DIGITS + digit], found, THREADS, PTX)
        odd = tl.where(column == 3, -2 * even, 2 * even) if digit == DIGITS - 1 else 2 * even
        low += found[0] * (even << (8 * digit)) + found[1] * (odd << (8 * digit))
        high += found[2] * (even << (8 * digit)) + found[3] * (odd << (8 * digit))
    return low, high


@triton.jit
def stack(parts):
    """Join a power of two of parts, by a last dimension for each bit of a part's number."""
    if len(parts) == 1:
        return parts[0]
    else:
        joined = ()
        for n in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[n], parts[n + len(parts) // 2]),)
        return stack(joined)
