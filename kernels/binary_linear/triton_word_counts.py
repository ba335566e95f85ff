"""The product of a decoding step's packed layers by counts, of planes whose words have steps of their own.

What a kernel leaves for the next is written word by word, and no program knows a token's largest input: a word's step
is a power of two, and here its planes are shifted to where the token's largest step has them. A thread has one of eight
planes of a word, so that shift is a move from lane to lane of a warp.

Legend: W words of a row; see `triton_counts` for lines, columns, steps and tiles.
"""

import triton
import triton.language as tl

from bimamba_lit.kernels.binary_linear.triton_counts import by_row, count, four, thread_places, worth


@triton.jit
def _from_lane(words, lane, THREADS: tl.constexpr, PTX: tl.constexpr):
    """Return what a lane of the same warp has, one word a thread."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [words, lane],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        warps: tl.constexpr = THREADS // 32
        return tl.reshape(tl.gather(tl.reshape(words, [warps, 32]), tl.reshape(lane, [warps, 32]), 1), [THREADS])


@triton.jit
def _shifted(tiles, down, THREADS: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr):
    """Return DIGITS + 1 tiles of a word's planes, moved up by 8 less `down` places, a plane a line."""
    lane = tl.arange(0, THREADS) % 32
    plane = down - 8 + lane // 4  # of the first tile
    source = (plane & 7) * 4 + lane % 4
    sign = _from_lane(tiles[DIGITS - 1], 28 + lane % 4, THREADS, PTX)
    found = ()
    for tile in tl.static_range(DIGITS):
        found = found + (_from_lane(tiles[tile], source, THREADS, PTX),)
    moved = ()
    for tile in tl.static_range(DIGITS + 1):
        value = tl.where(plane + 8 * tile < 0, 0, sign)
        for given in tl.static_range(DIGITS):
            value = tl.where((plane >> 3) + tile == given, found[given], value)
        moved = moved + (value,)
    return moved


@triton.jit
def _all_shifted(values, step: tl.constexpr, down, THREADS: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr):
    """Return what `_shifted` does of each of a step's four words."""
    taken = ()
    for digit in tl.static_range(DIGITS):
        taken = taken + (four(values[DIGITS * step + digit], THREADS),)
    moved = ()
    for word in tl.static_range(4):
        tiles = ()
        for digit in tl.static_range(DIGITS):
            tiles = tiles + (taken[digit][word],)
        moved = moved + (_shifted(tiles, down[word], THREADS, DIGITS, PTX),)
    return moved


@triton.jit
def multiply_planes(
    words, terms, planes, scales, in_shift, out_shift, in_features, eps, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    W: tl.constexpr, ALL: tl.constexpr, DIGITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Return what `triton_words.multiply` does with NORM, of words' planes in place of digits.

    A word's step is a power of two. Its planes take the places that the token's largest step gives them: shifted down,
    with 8 places below. What a word far smaller than the largest loses there is half a place on average, a number.
    """
    THREADS: tl.constexpr = 2 * ROWS * SPLIT
    STEPS: tl.constexpr = (W + 16 * SPLIT - 1) // (16 * SPLIT)
    _, line, column, w = thread_places(ROWS, SPLIT, W)
    every = tl.arange(0, ALL)
    there = every < W
    # As integers' bits, positive numbers keep their order, and what is not a number is above all.
    steps = tl.load(scales + every, mask=there, other=0.0).to(tl.int32, bitcast=True)
    square = tl.load(scales + W + every, mask=there, other=0.0)
    total = tl.load(scales + 2 * W + every, mask=there, other=0.0)
    shifted = tl.load(scales + 3 * W + every, mask=there, other=0.0)
    own = ()
    values = ()
    for step in tl.static_range(STEPS):
        inside = w + 16 * step < W
        own = own + (
            tl.load(scales + w + 16 * step, mask=inside, other=0.0),
            tl.load(scales + 4 * W + w + 16 * step, mask=inside, other=0.0),
        )
        for tile in tl.static_range(DIGITS):
            at = planes + (line[:, None] + 8 * tile) * W + w + 16 * step
            values = values + (tl.load(at, mask=inside, other=0),)
    longest, square, total, shifted = tl.reduce((steps, square, total, shifted), 0, _join)
    unit = longest.to(tl.float32, bitcast=True) * (1.0 / 256)
    counted = tl.zeros([THREADS], tl.float32)
    zero = tl.zeros([THREADS], tl.int32)
    tiles = ()
    for _ in tl.static_range(DIGITS + 1):
        tiles = tiles + ((zero, zero, zero, zero),)
    for step in tl.static_range(STEPS):
        size, number = own[2 * step], own[2 * step + 1].to(tl.int32, bitcast=True)
        lost = tl.where(w + 16 * step < W, 16.0 * tl.maximum(unit - size, 0.0), 0.0)
        counted += tl.sum(number.to(tl.float32) * size - lost, 1)
        down = (longest >> 23) - (size.to(tl.int32, bitcast=True) >> 23)
        moved = _all_shifted(values, step, four(down, THREADS), THREADS, DIGITS, PTX)
        first, last = four(words[2 * step], THREADS), four(words[2 * step + 1], THREADS)
        new = ()
        for tile in tl.static_range(DIGITS + 1):
            mine = (moved[0][tile], moved[1][tile], moved[2][tile], moved[3][tile])
            new = new + (count(first, last, mine, tiles[tile], THREADS, PTX),)
        tiles = new
    place: tl.constexpr = 2.0 ** (8 * (DIGITS - 1))
    parts = ()
    for half in tl.static_range(2):
        high = worth(tiles, half, column, DIGITS - 1, DIGITS + 1).to(tl.float32) * place
        positive = high + worth(tiles, half, column, 0, DIGITS - 1).to(tl.float32)
        parts = parts + (2.0 * unit * positive - counted,)
    product = by_row(parts, ROWS // 16, SPLIT)
    scale, shift, added = terms
    y = product * scale
    if out_shift is not None:
        y += shift * total
    if in_shift is not None:
        y += shifted
    return y * (1.0 / tl.sqrt(square / in_features + eps)) + added


@triton.jit
def _join(step, square, total, shift, other_step, other_square, other_total, other_shift):
    return tl.maximum(step, other_step), square + other_square, total + other_total, shift + other_shift
