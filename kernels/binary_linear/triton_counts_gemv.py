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

from bimamba_lit.kernels.binary_linear.triton_counts import ask, count, four, put
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
        aligned_words(signs), *(_aligned(values, in_features) for values in (x, in_scale, in_shift)), out_scale,
        out_shift, bias, *map(stride_of, (out_scale, out_shift, bias)), y, out_features, W=words, DIGITS=digits,
        PTX=architecture(x.device) != INTERPRETER, PDL=overlaps(x.device), SPLIT=chosen.num_warps,
        **launch_early(x.device), **chosen.launch(),
    )  # fmt: skip
    return y


def _aligned(values: Tensor | None, in_features: int) -> Tensor | None:
    """Return values (…, I), or (1,), of every input, and such that a load of 16 bytes may begin with a row's first.

    Only then does a thread of the kernel have 8 after one another.
    """
    if values is None:
        return None
    values = values.expand(*values.shape[:-1], in_features)
    if values.is_contiguous() and values.data_ptr() % 16 == 0:
        return values
    return values.clone(memory_format=torch.contiguous_format)


@triton.jit
def _fetch(at, SIZE: tl.constexpr, WARPS: tl.constexpr):
    """Ask for SIZE elements into the farther cache, where what is written meanwhile is seen: a line a warp."""
    LINE: tl.constexpr = 1024 // at.dtype.element_ty.primitive_bitwidth
    line = tl.program_id(0) * WARPS + tl.arange(0, 32 * WARPS) // 32
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // no result $0", "=r,l", [(at + line * LINE % SIZE).to(tl.uint64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load(at, inside, PTX: tl.constexpr):
    """Load numbers as float32."""
    value = tl.load(at, mask=inside, other=0.0)
    if PTX and value.dtype == tl.bfloat16:
        # An instruction a number, where the compiler has one and a half.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [value], tl.float32, is_pure=True, pack=2
        )
    else:
        return value.to(tl.float32)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


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
        value = _load(x + i, inside, PTX)
        if SUMS:
            total += tl.sum(value, 1)
        if in_shift is not None:
            shifted += tl.sum(value * _load(in_shift + i, inside, PTX), 1)
        if in_scale is not None:
            value *= _load(in_scale + i, inside, PTX)
        largest = _larger(largest, tl.reduce(tl.abs(value), 1, _larger))
        scaled = scaled + (value,)
    if SUMS:
        total, shifted = tl.reduce((total, shifted), 0, _add)
    return scaled, largest.to(tl.int32, bitcast=True), total, shifted


@triton.constexpr_function
def bytes_text(SELECT):
    """Return the text of `_bytes`."""
    return f"prmt.b32 $0, $1, $2, {SELECT};"


@triton.jit
def _bytes(a, b, select: tl.constexpr, PTX: tl.constexpr):
    """Return four bytes of a's and b's eight, 4 bits of `select` a byte."""
    if PTX:
        return tl.inline_asm_elementwise(bytes_text(select), "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        found = tl.zeros_like(a)
        for byte in tl.static_range(4):
            place: tl.constexpr = (select >> (4 * byte)) & 7
            found |= (((a if place < 4 else b) >> (8 * (place % 4))) & 255) << (8 * byte)
        return found


@triton.jit
def _add_bytes(total, bytes, SIGNED: tl.constexpr, PTX: tl.constexpr):
    """Add four integers of 8 bits to a total."""
    if PTX:
        text: tl.constexpr = (
            "dp4a.s32.u32 $0, $1, 0x01010101, $2;" if SIGNED else "dp4a.u32.u32 $0, $1, 0x01010101, $2;"
        )
        return tl.inline_asm_elementwise(text, "=r,r,r", [bytes, total], tl.int32, is_pure=True, pack=1)
    else:
        for byte in tl.static_range(4):
            value = (bytes >> (8 * byte)) & 255
            total += (value ^ 128) - 128 if SIGNED else value
        return total


@triton.jit
def _eight(words, THREADS: tl.constexpr):
    """Take (THREADS, 8) apart."""
    even, odd = tl.split(tl.reshape(words, [THREADS, 4, 2]))
    a, c, e, g = four(even, THREADS)
    b, d, f, h = four(odd, THREADS)
    return a, b, c, d, e, f, g, h


@triton.constexpr_function
def chosen_text(MASK):
    """Return the text of `_chosen`."""
    return f"lop3.b32 $0, $1, $2, {MASK}, 0xE4;"


@triton.jit
def _chosen(a, b, mask: tl.constexpr, PTX: tl.constexpr):
    """Return a's bits in a mask and b's beside it: an instruction, where the compiler has two."""
    if PTX:
        return tl.inline_asm_elementwise(chosen_text(mask), "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        return (a & mask) | (b & ~mask)


@triton.jit
def _swap(a, b, by: tl.constexpr, mask: tl.constexpr, PTX: tl.constexpr):
    """Trade a's bits beside a mask for b's in it, `by` places lower."""
    return _chosen(a, b << by, mask, PTX), _chosen(a >> by, b, mask, PTX)


@triton.jit
def _transposed(a, b, c, d, e, f, g, h, PTX: tl.constexpr):
    """Take numbers of 8 bits apart into planes, in each byte by itself: bit i of plane p is bit p of number i."""
    a, b = _swap(a, b, 1, 0x55555555, PTX)
    c, d = _swap(c, d, 1, 0x55555555, PTX)
    e, f = _swap(e, f, 1, 0x55555555, PTX)
    g, h = _swap(g, h, 1, 0x55555555, PTX)
    a, c = _swap(a, c, 2, 0x33333333, PTX)
    b, d = _swap(b, d, 2, 0x33333333, PTX)
    e, g = _swap(e, g, 2, 0x33333333, PTX)
    f, h = _swap(f, h, 2, 0x33333333, PTX)
    a, e = _swap(a, e, 4, 0x0F0F0F0F, PTX)
    b, f = _swap(b, f, 4, 0x0F0F0F0F, PTX)
    c, g = _swap(c, g, 4, 0x0F0F0F0F, PTX)
    d, h = _swap(d, h, 4, 0x0F0F0F0F, PTX)
    return a, b, c, d, e, f, g, h


@triton.jit
def _made(scaled, inverse, SPLIT: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr):
    """Return a thread's bytes of planes, 8 for each digit, one for each of its words; and the sum of its numbers."""
    THREADS: tl.constexpr = 32 * SPLIT
    numbers = ()
    for part in tl.static_range(4):
        # A float of this size has a step of 1 and, in its low bits, the integer in two's complement.
        numbers = numbers + ((scaled[part] * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True),)
    # Of each only the lower 16 bits count.
    ab, cd = _bytes(numbers[0], numbers[1], 0x5410, PTX), _bytes(numbers[2], numbers[3], 0x5410, PTX)
    total = tl.zeros([THREADS], tl.int32)
    made = ()
    for digit in tl.static_range(DIGITS - 1, -1, -1):
        own = _eight(_bytes(ab, cd, 0x6420 + 0x1111 * digit, PTX), THREADS)
        total = total << 8
        for n in tl.static_range(8):
            total = _add_bytes(total, own[n], digit == DIGITS - 1, PTX)
        made = _transposed(own[0], own[1], own[2], own[3], own[4], own[5], own[6], own[7], PTX) + made
    return made, total


@triton.jit
def _turned(a, b, c, d, PTX: tl.constexpr):
    """Return the first bytes of four words, the second, and so on."""
    ab, cd = _bytes(a, b, 0x5140, PTX), _bytes(c, d, 0x5140, PTX)
    ef, gh = _bytes(a, b, 0x7362, PTX), _bytes(c, d, 0x7362, PTX)
    return (
        _bytes(ab, cd, 0x5410, PTX), _bytes(ab, cd, 0x7632, PTX),
        _bytes(ef, gh, 0x5410, PTX), _bytes(ef, gh, 0x7632, PTX),
    )  # fmt: skip


@triton.jit
def _of_warp(own, SPLIT: tl.constexpr, PTX: tl.constexpr):
    """Add up what a warp's threads have."""
    if PTX:
        return tl.inline_asm_elementwise(
            "redux.sync.add.s32 $0, $1, -1;", "=r,r", [own], tl.int32, is_pure=True, pack=1
        )
    else:
        each = tl.sum(tl.reshape(own, [SPLIT, 32]), 1)
        return tl.reshape(tl.broadcast_to(each[:, None], [SPLIT, 32]), [32 * SPLIT])


@triton.jit
def _counted(
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
        _fetch(x, 32 * W, SPLIT)
        if in_scale is not None:
            _fetch(in_scale, 32 * W, SPLIT)
        if in_shift is not None:
            _fetch(in_shift, 32 * W, SPLIT)
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
        planes = planes + (_turned(taken[4 * n], taken[4 * n + 1], taken[4 * n + 2], taken[4 * n + 3], PTX),)
    # Once in a row's sum, in the first column.
    column = thread % 4
    own = tl.where(column == 0, _of_warp(own, SPLIT, PTX), 0)
    parts = ()
    for tile in tl.static_range(ROWS // 16):
        parts = parts + _counted(words, planes, tile, own, column, STEPS, DIGITS, PTX)
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
