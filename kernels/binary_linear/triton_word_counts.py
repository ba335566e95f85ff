"""The product of a decoding step's packed layers by counts, of planes whose words have steps of their own.

What a kernel leaves for the next is written word by word, and no program knows a token's largest input: a word's step
is a power of two, and here its planes are shifted to where the token's largest step has them. A thread has one of eight
planes of a word, so that shift is a move from lane to lane of a warp: up 4 lanes are down a plane.

Nothing of a warp waits for others but its sums, at the end. Tensors have one element a thread, in order.

Legend: W words of a row; see `triton_counts` for lines, columns, steps and tiles. Planes are (M, 8 DIGITS, W). `scales`
are (M, 5, W): of a word its numbers' sum times its step, the sums of squares, of inputs and of inputs times `in_shift`,
and its step.
"""

import triton
import triton.language as tl

from bimamba_lit.kernels.binary_linear.triton_counts import count, four, thread_places
from bimamba_lit.kernels.binary_linear.triton_trades import float_sums, largest_of_all, largest_of_warp


@triton.jit
def _from_lane(words, lane, THREADS: tl.constexpr, PTX: tl.constexpr):
    """Return what a lane of the same warp has, one word a thread; of lanes the last 5 bits count."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [words, lane],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        warps: tl.constexpr = THREADS // 32
        return tl.reshape(tl.gather(tl.reshape(words, [warps, 32]), tl.reshape(lane & 31, [warps, 32]), 1), [THREADS])


@triton.jit
def _shifted(tiles, source, lane, THREADS: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr):
    """Return DIGITS + 1 tiles of a word's planes, moved down, with a tile of room below them, a plane a line.

    `source` is the lane, counted on through the tiles, of the plane that comes to the second tile. Above the last plane
    are copies of it, the sign. Of a word that loses 2 planes or more below, the first plane of all is set: what is lost
    then is as often too much as too little.
    """
    sign = lane | 28
    found = ()
    for tile in tl.static_range(DIGITS - 1):
        found = found + (_from_lane(tiles[tile], source, THREADS, PTX),)
    moved = ()
    for tile in tl.static_range(DIGITS + 1):
        last = tl.minimum(source, 32 * (DIGITS - tile) + sign)
        value = _from_lane(tiles[DIGITS - 1], last, THREADS, PTX)
        for back in tl.static_range(2, DIGITS + 1):
            if DIGITS - back >= tile - 1:
                value = tl.where(source < 32 * (DIGITS - back - tile + 2), found[DIGITS - back], value)
        if tile == 0:
            value = tl.where(source < 32, 0, value)
            value = tl.where(source >= tl.where(lane < 4, 40, 1 << 30), -1, value)
        moved = moved + (value,)
    return moved


@triton.jit
def _all_shifted(
    values, step: tl.constexpr, longest, own, lane, THREADS: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr
):
    """Return what `_shifted` does of each of a step's four words."""
    taken = ()
    for digit in tl.static_range(DIGITS):
        taken = taken + (four(values[DIGITS * step + digit], THREADS),)
    moved = ()
    for word in tl.static_range(4):
        tiles = ()
        for digit in tl.static_range(DIGITS):
            tiles = tiles + (taken[digit][word],)
        # An exponent's bits begin at 23: 4 lanes a plane.
        source = lane + ((longest - own[word]) >> 21)
        moved = moved + (_shifted(tiles, source, lane, THREADS, DIGITS, PTX),)
    return moved


@triton.constexpr_function
def _across_text(by):
    return f"shfl.sync.bfly.b32 $0, $1, {by}, 31, 0xffffffff;"


@triton.jit
def across(values, lane, BY: tl.constexpr, PTX: tl.constexpr):
    """Return what the lane BY beside has, of 32 bits."""
    if PTX:
        kind: tl.constexpr = "=f,f" if values.dtype == tl.float32 else "=r,r"
        return tl.inline_asm_elementwise(_across_text(BY), kind, [values], dtype=values.dtype, is_pure=True, pack=1)
    else:
        moved = _from_lane(values.to(tl.int32, bitcast=True), lane ^ BY, values.shape[0], PTX)
        return moved.to(values.dtype, bitcast=True)


@triton.jit
def sums_of_warp(a, b, c, d, lane, PTX: tl.constexpr):
    """Return a warp's sums: lane 0 has that of a, the next that of b, of c and of d, the next that of a again."""
    odd, upper = lane % 2 == 1, lane % 4 >= 2
    low = tl.where(odd, b, a) + across(tl.where(odd, a, b), lane, 1, PTX)
    high = tl.where(odd, d, c) + across(tl.where(odd, c, d), lane, 1, PTX)
    own = tl.where(upper, high, low) + across(tl.where(upper, low, high), lane, 2, PTX)
    own += across(own, lane, 4, PTX)
    own += across(own, lane, 8, PTX)
    return own + across(own, lane, 16, PTX)


@triton.jit
def _ballot(words, PTX: tl.constexpr):
    """Return a word with a bit of every lane of a warp: whether it has anything but 0."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{.reg .pred any; setp.ne.b32 any, $1, 0; vote.sync.ballot.b32 $0, any, 0xffffffff;}", "=r,r", [words],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        warps: tl.constexpr = words.shape[0] // 32
        bits = tl.reshape(words != 0, [warps, 32]).to(tl.int32) << tl.arange(0, 32)[None, :]
        return tl.reshape(tl.broadcast_to(tl.sum(bits, 1)[:, None], [warps, 32]), [32 * warps])


@triton.jit
def write_planes(
    x, u, scaled, shift, word, there, planes, scales, W: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr
):
    """Write the planes of a word: bits of the numbers of 32 inputs in two's complement, and its scales.

    Every warp has the inputs x, a norm's gain times them, u, and what `scaled` are; it writes eight planes, and the
    scales if it is the first. `shift` is u times `in_shift`. The step is not a number where an input is not finite.
    """
    THREADS: tl.constexpr = x.shape[0]
    tl.static_assert(THREADS >= 32 * DIGITS)
    thread = tl.arange(0, THREADS)
    lane, tile = thread % 32, thread // 32
    limit: tl.constexpr = 2.0 ** (8 * DIGITS - 1) - 1
    largest = largest_of_warp(tl.abs(scaled).to(tl.int32, bitcast=True), PTX)
    finite = largest < 0x7F800000
    power = tl.maximum(largest >> 23, 8 * DIGITS)  # of two, and 127
    inverse = ((254 - power + 8 * DIGITS - 2) << 23).to(tl.float32, bitcast=True)
    step = ((power - 8 * DIGITS + 2) << 23).to(tl.float32, bitcast=True)
    number = tl.floor(tl.where(finite, scaled, 0.0) * inverse + 0.5)
    number = tl.minimum(number, limit)
    values = sums_of_warp(number * step, x * x, u, shift, lane, PTX)
    values = tl.where(lane == 4, tl.where(finite, step, float("nan")), values)
    tl.store(scales + lane * W + word, values, mask=there & (tile == 0) & (lane < 5))
    own = number.to(tl.int32) >> (8 * tile)
    words = tl.zeros_like(own)
    for plane in tl.static_range(8):
        words = tl.where(lane == plane, _ballot(own & (1 << plane), PTX), words)
    tl.store(planes + (8 * tile + lane) * W + word, words, mask=there & (tile < DIGITS) & (lane < 8))


@triton.jit
def multiply_planes(
    words, terms, planes, scales, in_shift, out_shift, in_features, eps, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    W: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Return what `triton_words.multiply` does with NORM, of words' planes in place of digits: a row a thread.

    Thread t has row t % ROWS; so have `terms`. A word's planes take the places that the token's largest step gives
    them: shifted down, with 8 places below.
    """
    THREADS: tl.constexpr = 2 * ROWS * SPLIT
    STEPS: tl.constexpr = (W + 16 * SPLIT - 1) // (16 * SPLIT)
    _, line, column, w = thread_places(ROWS, SPLIT, W)
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    # As integers' bits, positive numbers keep their order, and what is not a number is above all.
    longest = tl.zeros([THREADS], tl.int32)
    whole = tl.zeros([THREADS], tl.float32)
    square, total, shifted = whole, whole, whole
    for first in tl.static_range(0, W, THREADS):
        at, there = scales + first + thread, first + thread < W
        whole += tl.load(at, mask=there, other=0.0)
        square += tl.load(at + W, mask=there, other=0.0)
        total += tl.load(at + 2 * W, mask=there, other=0.0)
        shifted += tl.load(at + 3 * W, mask=there, other=0.0)
        size = tl.load(at + 4 * W, mask=there, other=0.0)
        longest = tl.maximum(longest, size.to(tl.int32, bitcast=True))
    own = ()
    values = ()
    for step in tl.static_range(STEPS):
        inside = w + 16 * step < W
        size = tl.load(scales + 4 * W + w + 16 * step, mask=inside, other=0.0)
        own = own + (four(size.to(tl.int32, bitcast=True), THREADS),)
        for tile in tl.static_range(DIGITS):
            at = planes + (line[:, None] + 8 * tile) * W + w + 16 * step
            values = values + (tl.load(at, mask=inside, other=0),)
    # By way of a barrier: without one the compiler moves loads down to where their values are wanted.
    longest = largest_of_all(longest, THREADS // 32, PTX)
    sums = sums_of_warp(whole, square, total, shifted, lane, PTX)
    zero = tl.zeros([THREADS], tl.int32)
    tiles = ()
    for _ in tl.static_range(DIGITS + 1):
        tiles = tiles + ((zero, zero, zero, zero),)
    for step in tl.static_range(STEPS):
        moved = _all_shifted(values, step, longest, own[step], lane, THREADS, DIGITS, PTX)
        first, last = words[2 * step], words[2 * step + 1]
        new = ()
        for tile in tl.static_range(DIGITS + 1):
            mine = (moved[0][tile], moved[1][tile], moved[2][tile], moved[3][tile])
            new = new + (count(first, last, mine, tiles[tile], THREADS, PTX),)
        tiles = new
    even = 1 << (2 * column)
    parts = (_worth(tiles, 0, even, column), _worth(tiles, 2, even, column))
    product, whole, square, total, shifted = float_sums(parts, sums, ROWS, SPLIT, PTX)
    scale, shift, added = terms
    y = (longest.to(tl.float32, bitcast=True) * product - whole) * scale
    if out_shift is not None:
        y += shift * total
    if in_shift is not None:
        y += shifted
    return y * (1.0 / tl.sqrt(square / in_features + eps)) + added


@triton.jit
def _worth(tiles, first: tl.constexpr, even, column):
    """Return twice what a thread counted in a row is worth, of the tiles' two counts from `first`, in largest steps."""
    TILES: tl.constexpr = len(tiles)
    low = tl.zeros_like(even)
    high = low
    for tile in tl.static_range(TILES):
        odd = tl.where(column == 3, -2 * even, 2 * even) if tile == TILES - 1 else 2 * even
        value = tiles[tile][first] * even + tiles[tile][first + 1] * odd
        if tile >= TILES - 2:
            high += value << (8 * (tile - TILES + 2))
        else:
            low += value << (8 * tile)
    place: tl.constexpr = 2.0 ** (8 * (TILES - 2))
    return (high.to(tl.float32) * place + low.to(tl.float32)) * (1.0 / 128)
