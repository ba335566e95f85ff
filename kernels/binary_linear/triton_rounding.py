"""Tokens as whole numbers of 8 bits on Hopper: the launch before the products of `triton_hopper*`, as fast as memory.

A program keeps a few tokens in registers, eight inputs of each to a thread at a time, so that x is read once, and the
terms of an input once for all of them. A product and sum that is rounded down leaves the number in a byte of its own:
there is no conversion to integers, of which a processor makes few at a time.

Legend: M tokens, I in features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bimamba_lit.kernels.binary_linear.triton_words import launch_early, stride_of
from bimamba_lit.kernels.configurations import configuration

PADDED = gl.constexpr(256)  # tokens, to a multiple of which what is known of them is padded: no tile has more


def rounded(x: Tensor, in_scale: Tensor | None, in_shift: Tensor | None, few: bool) -> tuple[Tensor, Tensor]:
    """Round x (M, I) times `in_scale` to steps of a 127th of a token's largest; I is a multiple of 32.

    With `few` tokens a program has one, and the next kernel begins when all are done: programs of a kernel that has
    several on a processor would gather where processors come free first.

    Returns:
        Numbers (M, I), of whose 32 inputs of a word of signs input 8 j + k is at 4 k + j: a shift of the word by k has
        the signs of four neighbours at the ends of its four bytes. And steps, sums of x, of `in_shift` times x, and of
        numbers of -1 step (4, M padded).
    """
    tokens, in_features = x.shape
    numbers = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = empty_scales(tokens, x.device)
    name = "binary_linear/hopper_rounding_few" if few else "binary_linear/hopper_rounding"
    chosen = configuration(name, x.dtype, in_features, x.device)
    _rounding_kernel[(triton.cdiv(tokens, chosen.blocks["TOKENS"]),)](
        x, in_scale, in_shift, numbers.view(torch.int32), scales, tokens, scales.shape[1], *x.stride(),
        stride_of(in_scale), stride_of(in_shift), INPUTS=in_features, EARLY=not few, **chosen.launch(),
        **launch_early(x.device),
    )  # fmt: skip
    return numbers, scales


def empty_scales(tokens: int, device: torch.device) -> Tensor:
    """Return room for what is known of tokens (4, M padded)."""
    return torch.empty(4, triton.cdiv(tokens, PADDED.value) * PADDED.value, dtype=torch.float32, device=device)


@gluon.constexpr_function
def _rounding_code():
    """Return what makes of a thread's eight inputs, times the inverse of a step, two words of numbers, and their sum.

    Of the sum with 49,152.5, a multiple of 2^-8, byte 1 is the number. Lanes 0 to 3 have bytes j = 0 to 3 of a word of
    signs; lane j leaves with the numbers of bits 2 j and 2 j + 1 of each byte, in two exchanges of half of what there
    is: with the lane two apart, then with the neighbour.
    """
    rounds = "".join(f"fma.rm.f32 f{k}, ${k + 3}, $11, 0f47400080; " for k in range(8))
    pairs = "".join(f"prmt.b32 p{k}, f{2 * k}, f{2 * k + 1}, 0x51; " for k in range(4))
    return (
        "{ .reg .f32 f<8>; .reg .b32 p<4>, low, high, lane, a, b, own, at, other; .reg .pred odd, late; "
        f"{rounds} {pairs} prmt.b32 low, p0, p1, 0x5410; prmt.b32 high, p2, p3, 0x5410; "
        "dp4a.s32.s32 a, low, 0x01010101, 0; dp4a.s32.s32 $2, high, 0x01010101, a; "
        "mov.u32 lane, %laneid; and.b32 a, lane, 1; setp.ne.u32 odd, a, 0; and.b32 a, lane, 2; setp.ne.u32 late, a, 0; "
        "selp.b32 a, high, low, late; selp.b32 b, low, high, late; shfl.sync.bfly.b32 b, b, 2, 31, -1; "
        "selp.b32 at, 0x7632, 0x5410, odd; prmt.b32 own, a, b, at; "
        "xor.b32 at, at, 0x2222; prmt.b32 other, a, b, at; shfl.sync.bfly.b32 other, other, 1, 31, -1; "
        "selp.b32 a, 0x2604, 0x6240, odd; selp.b32 b, 0x0426, 0x4062, odd; selp.b32 at, b, a, late; "
        "prmt.b32 $0, own, other, at; add.u32 at, at, 0x1111; prmt.b32 $1, own, other, at; }"
    )


@gluon.jit
def _merge(largest, total, shift, other_largest, other_total, other_shift):
    return gl.maximum(largest, other_largest), total + other_total, shift + other_shift


@gluon.jit
def _halves(tile):
    """Return the even and the odd of tile (TOKENS, bytes, inputs)."""
    return gl.split(gl.reshape(tile, [tile.shape[0], tile.shape[1], tile.shape[2] // 2, 2]))


@gluon.jit
def _words(scaled, inverse):
    """Return the words of scaled inputs (TOKENS, bytes, 8), and the sums of their numbers; of four bytes in lanes."""
    even, odd = _halves(scaled)
    of_four, two_of_four = _halves(even)
    one_of_four, three_of_four = _halves(odd)
    i0, i4 = gl.split(of_four)
    i1, i5 = gl.split(one_of_four)
    i2, i6 = gl.split(two_of_four)
    i3, i7 = gl.split(three_of_four)
    inverse = gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, i0.type.layout)), 1)
    inverse, _ = gl.broadcast(inverse, i0)
    first, second, total = gl.inline_asm_elementwise(
        _rounding_code(), "=r,=r,=r,f,f,f,f,f,f,f,f,f", [i0, i1, i2, i3, i4, i5, i6, i7, inverse],
        dtype=(gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    return gl.join(first, second), total


@gluon.jit
def _of_inputs(term, i, inside, step):
    return gl.load(term + i * step, mask=inside, other=0.0).to(gl.float32)[None, :, :]


@gluon.jit
def _places(COUNT: gl.constexpr, SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the places of COUNT times SIZE neighbours, of a layout (TOKENS, COUNT, SIZE)."""
    OF_TOKEN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    first = gl.arange(0, COUNT, gl.SliceLayout(1, OF_TOKEN)) * SIZE
    return first[:, None] + gl.arange(0, SIZE, gl.SliceLayout(0, OF_TOKEN))[None, :]


@gluon.jit
def _tokens(TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.program_id(0) * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))


@gluon.jit
def _rounding_kernel(
    x, in_scale, in_shift, numbers, scales, tokens, padded, stride_m, stride_i, in_scale_step, in_shift_step,
    INPUTS: gl.constexpr, EARLY: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    tl.extra.cuda.gdc_wait()
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    WARPS: gl.constexpr = gl.num_warps()
    BYTES: gl.constexpr = 32 * WARPS
    STRETCH: gl.constexpr = 8 * BYTES
    STRETCHES: gl.constexpr = (INPUTS + STRETCH - 1) // STRETCH
    READ: gl.constexpr = gl.BlockedLayout([TOKENS, 1, 8], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    WRITTEN: gl.constexpr = gl.BlockedLayout([TOKENS, 1, 2], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    SUMS: gl.constexpr = gl.SliceLayout(2, READ)
    token = _tokens(TOKENS, READ)
    there = token < tokens
    x += gl.minimum(token, tokens - 1).to(gl.int64)[:, None, None] * stride_m
    place = _places(BYTES, 8, READ)
    read = ()
    for stretch in gl.static_range(STRETCHES):
        i = (stretch * STRETCH + place)[None, :, :]
        tile = gl.load(x + i.to(gl.int64) * stride_i, mask=i < INPUTS, other=0.0, eviction_policy="evict_first")
        read += (tile,)  # type: ignore[assignment]

    largest = gl.zeros([TOKENS, BYTES], gl.float32, SUMS)
    total = gl.zeros([TOKENS, BYTES], gl.float32, SUMS)
    shift = gl.zeros([TOKENS, BYTES], gl.float32, SUMS)
    for stretch in gl.static_range(STRETCHES):
        i = stretch * STRETCH + place
        value = read[stretch].to(gl.float32)  # type: ignore[var-annotated]
        total += gl.sum(value, 2)
        if in_shift is not None:
            shift += gl.sum(value * _of_inputs(in_shift, i, i < INPUTS, in_shift_step), 2)
        if in_scale is not None:
            value *= _of_inputs(in_scale, i, i < INPUTS, in_scale_step)
        largest = gl.maximum(largest, gl.max(gl.abs(value), 2))
    largest, total, shift = gl.reduce((largest, total, shift), 1, _merge)
    step = gl.where(gl.abs(total) < float("inf"), largest / 127, float("nan"))
    inverse = gl.where(largest > 1e-30, 127 / gl.maximum(largest, 1e-30), 0.0)
    scales += token
    gl.store(scales, step, mask=there)
    gl.store(scales + padded, total, mask=there)
    gl.store(scales + 2 * padded, shift, mask=there)

    count = gl.zeros([TOKENS, BYTES], gl.int32, SUMS)
    row = _tokens(TOKENS, WRITTEN)[:, None, None]
    numbers += row.to(gl.int64) * (INPUTS // 4)
    for stretch in gl.static_range(STRETCHES):
        i = stretch * STRETCH + place
        value = read[stretch].to(gl.float32)
        if in_scale is not None:
            value *= _of_inputs(in_scale, i, i < INPUTS, in_scale_step)
        words, part = _words(value, inverse)
        count += gl.convert_layout(part, SUMS, assert_trivial=True)
        word = (stretch * STRETCH // 4 + _places(BYTES, 2, WRITTEN))[None, :, :]
        words = gl.convert_layout(words, WRITTEN, assert_trivial=True)
        gl.store(numbers + word, words, mask=(row < tokens) & (word < INPUTS // 4))
    gl.store(scales + 3 * padded, -step * gl.sum(count, 1).to(gl.float32), mask=there)
