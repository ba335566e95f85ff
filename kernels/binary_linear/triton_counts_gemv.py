"""The packed product for a token or two by counts, in one launch that reads signs at close to the memory's speed.

Every program makes the planes of all inputs for itself, from the cache, while its signs are still on their way: that
costs less than a launch for it. Numbers are 16 bits (a step of 2^-15 of the token's largest), or 8 where 8-bit
activations are asked for. All of a program's signs are asked for at once, before the kernel before has ended: no kernel
that lets others begin early writes signs. Whatever else is read may be that kernel's output, and is waited for.

Legend: M tokens, O out features, I in features, W = I / 32 words of a row; `triton_counts` has the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_linear.triton_counts import ask, by_row, count, four, stack, worth
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


def counts_gemv(x: Tensor, signs: Tensor, digits: int, terms: Terms = NO_TERMS, bias: Tensor | None = None) -> Tensor:
    """Map x (M, I) to (M, O) in x's dtype, with numbers of `digits` (1 or 2) times 8 bits, where `counts_fit`."""
    tokens, in_features = x.shape
    out_features, words = signs.shape[0], in_features // BITS
    in_scale, out_scale, _, in_shift, out_shift = terms
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    chosen = configuration("binary_linear/counts", x.dtype, words, x.device)
    counts_kernel[(triton.cdiv(out_features, chosen.blocks["ROWS"]), tokens)](
        aligned_words(signs), x, in_scale, in_shift, out_scale, out_shift, bias, x.stride(0),
        *map(stride_of, (in_scale, in_shift, out_scale, out_shift, bias)), y, out_features, W=words, DIGITS=digits,
        PTX=architecture(x.device) != INTERPRETER, PDL=overlaps(x.device), SPLIT=chosen.num_warps,
        **launch_early(x.device), **chosen.launch(),
    )  # fmt: skip
    return y


@triton.jit
def _fetch(at, step, SIZE: tl.constexpr, WARPS: tl.constexpr):
    """Ask for SIZE elements into the farther cache, where what is written meanwhile is seen: a line a warp."""
    LINE: tl.constexpr = 1024 // at.dtype.element_ty.primitive_bitwidth
    line = tl.program_id(0) * WARPS + tl.arange(0, 32 * WARPS) // 32
    place = at + (line * LINE % SIZE) * step
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // no result $0", "=r,l", [place.to(tl.uint64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _merge(largest, total, shift, other_largest, other_total, other_shift):
    return tl.maximum(largest, other_largest), total + other_total, shift + other_shift


@triton.jit
def _scaled_inputs(x, in_scale, in_shift, in_scale_step, in_shift_step, W: tl.constexpr, SPLIT: tl.constexpr):
    """Return a thread's inputs times `in_scale`, 8 after one another as two (THREADS, 4) for each 8 words of its warp.

    And of all inputs the largest of these, the sum of x, and that of x times `in_shift`.
    """
    STEPS: tl.constexpr = (W + 16 * SPLIT - 1) // (16 * SPLIT)
    thread = tl.arange(0, 32 * SPLIT)
    first = (thread // 32 * 512 * STEPS + thread % 32 * 8)[:, None] + tl.arange(0, 4)[None, :]
    largest = tl.zeros([32 * SPLIT], tl.float32)
    total, shifted = largest, largest
    scaled = ()
    for part in tl.static_range(4 * STEPS):
        i = first + part // 2 * 256 + part % 2 * 4
        inside = i < 32 * W
        value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(value, 1)
        if in_shift is not None:
            shifted += tl.sum(value * tl.load(in_shift + i * in_shift_step, mask=inside, other=0.0).to(tl.float32), 1)
        if in_scale is not None:
            value *= tl.load(in_scale + i * in_scale_step, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
        scaled = scaled + (value,)
    largest, total, shifted = tl.reduce((largest, total, shifted), 0, _merge)
    return scaled, largest, total, shifted


@triton.jit
def _rounded(scaled, inverse):
    """Return integers, in the low 16 bits, and what a thread's add up to."""
    numbers = ()
    total = tl.zeros([scaled[0].shape[0]], tl.int32)
    for part in tl.static_range(len(scaled)):
        # A float of this size has a step of 1 and, in its low bits, the integer in two's complement.
        number = (scaled[part] * inverse + 12582912.0).to(tl.int32, bitcast=True)
        total += tl.sum(number, 1)
        numbers = numbers + (number,)
    above: tl.constexpr = 4 * len(scaled) * 0x4B400000 % 2**32
    return numbers, total - (above - 2**32 if above >= 2**31 else above)


@triton.jit
def _planes(numbers, SPLIT: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr):
    """Return the words of planes that `count` wants of a thread: four for each digit, for each step."""
    made = ()
    for part in tl.static_range(len(numbers) // 2):
        if DIGITS == 1:
            bytes = _bytes_of_eight_planes(numbers[2 * part], numbers[2 * part + 1])
        else:
            bytes = _bytes_of_planes(numbers[2 * part], numbers[2 * part + 1])
        for word in tl.static_range(2 * DIGITS):
            made = made + (_whole_words(bytes[word], PTX),)
    return _placed(tl.reshape(stack(made), [len(made) * 32 * SPLIT]), SPLIT, len(numbers) // 4, DIGITS)


@triton.jit
def _bytes_of_planes(low, high):
    """Take the numbers n of 8 inputs, 0 to 3 and 4 to 7, apart into planes: four words of four bytes each.

    Byte b of word j is plane j + 4 * (b // 2) + 8 * (b % 2), an input a bit: three rounds of a transposition, in which
    a bit of the input's number changes places with one of the plane's.
    """
    a, b, c, d = four((low & 0xFFFF) | (high << 16), low.shape[0])
    a, b = _swap(a, b, 1, 0x55555555)
    c, d = _swap(c, d, 1, 0x55555555)
    a, c = _swap(a, c, 2, 0x33333333)
    b, d = _swap(b, d, 2, 0x33333333)
    return _swap_within(a), _swap_within(b), _swap_within(c), _swap_within(d)


@triton.jit
def _bytes_of_eight_planes(low, high):
    """Take numbers of 8 bits apart: byte b of word j is plane 4 j + b."""
    place = (tl.arange(0, 4) * 8)[None, :]
    a, b = _swap(tl.sum((low & 255) << place, 1), tl.sum((high & 255) << place, 1), 4, 0x0F0F0F0F)
    return _turn(a), _turn(b)


@triton.jit
def _turn(a):
    changed = ((a >> 14) ^ a) & 0xCCCC
    a = a ^ changed ^ (changed << 14)
    changed = ((a >> 7) ^ a) & 0x00AA00AA
    return a ^ changed ^ (changed << 7)


@triton.jit
def _swap(a, b, by: tl.constexpr, mask: tl.constexpr):
    changed = ((a >> by) ^ b) & mask
    return a ^ (changed << by), b ^ changed


@triton.jit
def _swap_within(a):
    changed = ((a >> 12) ^ a) & 0xF0F0
    return a ^ changed ^ (changed << 12)


@triton.jit
def _whole_words(bytes, PTX: tl.constexpr):
    """Trade bytes among four threads, so that byte b of the first to the last are the word of thread b."""
    THREADS: tl.constexpr = bytes.shape[0]
    lane = tl.arange(0, THREADS) % 4
    if PTX:
        near = tl.where(lane % 2 == 0, 0x6240, 0x3715)
        far = tl.where(lane < 2, 0x5410, 0x3276)
        return tl.inline_asm_elementwise(
            "{.reg .b32 one, two, other; shfl.sync.bfly.b32 other, $1, 1, 31, -1; prmt.b32 one, $1, other, $2; "
            "shfl.sync.bfly.b32 two, one, 2, 31, -1; prmt.b32 $0, one, two, $3;}",
            "=r,r,r,r", [bytes, near, far], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        quad = tl.reshape(bytes, [THREADS // 4, 1, 4])
        i = tl.arange(0, 4)
        return tl.reshape(tl.sum(((quad >> (8 * i)[None, :, None]) & 255) << (8 * i)[None, None, :], 2), [THREADS])


@triton.jit
def _placed(made, SPLIT: tl.constexpr, STEPS: tl.constexpr, DIGITS: tl.constexpr):
    """Give each thread the words that `count` wants of it: four for each digit, for each step.

    Of a step, a thread made word b of 4 planes for b = 0 and 1, in this order.
    """
    THREADS: tl.constexpr = 32 * SPLIT
    EACH: tl.constexpr = 4 * DIGITS * STEPS
    # In this order a thread has all that it is to have.
    place = tl.arange(0, EACH * THREADS)
    lane, warp = place % 32, place % THREADS // 32
    word = lane % 4 * 4 + place // THREADS % 4
    plane = lane // 4 + place // (4 * THREADS) % DIGITS * 8
    step = place // (4 * DIGITS * THREADS)
    MADE: tl.constexpr = 4 * DIGITS * STEPS
    byte = plane % 8 // 4 * 2 + plane // 8
    number = plane % 4
    if DIGITS == 1:
        byte, number = plane % 4, plane // 4
    maker = warp * 32 + word % 8 * 4 + byte
    found = tl.gather(made, maker * MADE + (step * 2 + word // 8) * (2 * DIGITS) + number, 0)
    return _unstack(tl.reshape(found, [EACH, THREADS]))


@triton.jit
def _unstack(values):
    """Take (a power of two, THREADS) apart."""
    COUNT: tl.constexpr = values.shape[0]
    THREADS: tl.constexpr = values.shape[1]
    if COUNT == 1:
        return (tl.reshape(values, [THREADS]),)
    else:
        first, last = tl.split(tl.permute(tl.reshape(values, [2, COUNT // 2, THREADS]), [1, 2, 0]))
        return _unstack(first) + _unstack(last)


@triton.jit
def counts_kernel(
    signs, x, in_scale, in_shift, out_scale, out_shift, bias, x_m, in_scale_step, in_shift_step, out_scale_step,
    out_shift_step, bias_step, y, out_features, W: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of the layer for a token, 16 at a time by SPLIT warps."""
    THREADS: tl.constexpr = 32 * SPLIT
    STEPS: tl.constexpr = (W + 16 * SPLIT - 1) // (16 * SPLIT)
    TILES: tl.constexpr = ROWS // 16
    begin_next(PDL)
    token = tl.program_id(1).to(tl.int64)
    x += token * x_m
    words = ()
    for tile in tl.static_range(TILES):
        words = words + ask(signs, tl.program_id(0) * ROWS + 16 * tile, out_features, 16, SPLIT, W)
    if PTX:
        _fetch(x, 1, 32 * W, SPLIT)
        if in_scale is not None:
            _fetch(in_scale, in_scale_step, 32 * W, SPLIT)
        if in_shift is not None:
            _fetch(in_shift, in_shift_step, 32 * W, SPLIT)
    wait(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < out_features
    scale, shift, added = load_terms(
        rows, there, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, ROWS
    )
    scaled, largest, total, shifted = _scaled_inputs(x, in_scale, in_shift, in_scale_step, in_shift_step, W, SPLIT)
    limit: tl.constexpr = 127 if DIGITS == 1 else 127 * 256
    finite = tl.abs(total) < float("inf")
    length = tl.where(finite, largest / limit, float("nan"))
    inverse = tl.where(largest > 1e-30, limit / tl.maximum(largest, 1e-30), 0.0)
    numbers, own = _rounded(scaled, inverse)
    planes = _planes(numbers, SPLIT, DIGITS, PTX)
    zero = tl.zeros([THREADS], tl.int32)
    # Once in a row's sum, in the first column.
    column = tl.arange(0, THREADS) % 4
    own = tl.broadcast_to(tl.sum(tl.reshape(own, [SPLIT, 32]), 1)[:, None], [SPLIT, 32])
    own = tl.where(column == 0, tl.reshape(own, [THREADS]), 0)
    parts = ()
    for tile in tl.static_range(TILES):
        counted = ()
        for digit in tl.static_range(DIGITS):
            found = (zero, zero, zero, zero)
            for step in tl.static_range(STEPS):
                first = four(words[2 * (tile * STEPS + step)], THREADS)
                last = four(words[2 * (tile * STEPS + step) + 1], THREADS)
                mine = planes[4 * (step * DIGITS + digit) : 4 * (step * DIGITS + digit + 1)]
                found = count(first, last, mine, found, THREADS, PTX)
            counted = counted + (found,)
        for half in tl.static_range(2):
            parts = parts + (2 * worth(counted, half, column, 0, DIGITS) - own,)
    result = by_row(parts, 1, SPLIT).to(tl.float32) * length * scale + added
    if in_shift is not None:
        result += shifted
    if out_shift is not None:
        result += shift * total
    tl.store(y + token * out_features + rows, result.to(y.dtype.element_ty), mask=there)
