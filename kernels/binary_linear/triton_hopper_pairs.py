"""Tokens as sums and differences of pairs of inputs: the launch before the products of `triton_hopper_sparse`.

Copies go by the engine that Hopper has for them, so that a thread may have pairs as they are and memory whole lines.

Legend: M tokens, I in features.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from bimamba_lit.kernels.binary_linear.triton_gemv import step_of
from bimamba_lit.kernels.binary_linear.triton_hopper import barrier
from bimamba_lit.kernels.binary_linear.triton_hopper_many import blocks_of
from bimamba_lit.kernels.binary_linear.triton_rounding import empty_scales
from bimamba_lit.kernels.binary_linear.triton_words import begin_next, launch_early, overlaps, wait
from bimamba_lit.kernels.binary_weight.triton import Terms
from bimamba_lit.kernels.configurations import configuration

TOKENS = 8  # of a program
MOST_INPUTS = 13 * 1024  # whose pairs, of so many tokens, fit the shared memory


def in_steps(x: Tensor) -> bool:
    """Return whether pairs are in steps of their token's largest: float16 could not hold their sums."""
    return x.dtype == torch.float16


def pairs(x: Tensor, in_features: int, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """Return sums and differences of pairs (M, I); steps, sums of x and of `in_shift` times x (4, M padded) if any."""
    in_scale, _, _, in_shift, out_shift = terms
    tokens, given = x.shape
    x = x.contiguous() if x.storage_offset() % 8 == 0 else x.clone(memory_format=torch.contiguous_format)
    numbers = x.new_empty(tokens, in_features)
    scales: Tensor | None = None
    if in_steps(x) or in_shift is not None or out_shift is not None:
        scales = empty_scales(tokens, x.device)
    chosen = configuration("binary_linear/sparse_pairs", x.dtype, in_features, x.device)
    block = [TOKENS, 128 * chosen.num_warps]
    _pairs_kernel[(triton.cdiv(tokens, TOKENS),)](
        blocks_of(x, block), in_scale, in_shift, blocks_of(numbers, block), scales, tokens,
        0 if scales is None else scales.shape[1], given, step_of(in_scale), step_of(in_shift),
        BLOCKS=triton.cdiv(in_features, block[1]), STEPS=in_steps(x), TOTALS=out_shift is not None,
        PDL=overlaps(x.device), **launch_early(x.device), **chosen.launch(),
    )  # fmt: skip
    return numbers, scales


@gluon.constexpr_function
def _pairs_layout(warps):
    """Return a layout (tokens, chunks, 4, 16) of which a thread has the same 8 of each 16: whole pairs.

    The lanes that memory serves at once have eight tokens' same inputs, which lie in all of its banks.
    """
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0]]
    lanes = [[1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0], [0, 0, 0, 8], [0, 1, 0, 0]]
    of_warps = [[0, 2 << k, 0, 0] for k in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [8, 2 * warps, 4, 16])


@gluon.constexpr_function
def _paired_layout(warps):
    """Return the same of (tokens, inputs)."""

    def flat(bases):
        return [[token, 64 * chunk + 16 * quarter + within] for token, chunk, quarter, within in bases]

    of = _pairs_layout(warps)
    return gl.DistributedLinearLayout(
        flat(of.reg_bases), flat(of.lane_bases), flat(of.warp_bases), [], [8, 128 * warps]
    )


@gluon.jit
def _places(CHUNKS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the places of inputs in chunks of 64 (1, chunks, 4, 16)."""
    chunk = gl.arange(0, CHUNKS, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    quarter = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    within = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    return chunk[None, :, None, None] * 64 + quarter[None, None, :, None] * 16 + within[None, None, None, :]


@gluon.jit
def _own(values, MOST: gl.constexpr = False):
    """Return the sums, or the largest, of what a thread has of a chunk (tokens, chunks, 2)."""
    values = gl.reshape(values, [values.shape[0], values.shape[1], 4, 2, 8])
    return gl.max(gl.max(values, 4), 2) if MOST else gl.sum(gl.sum(values, 4), 2)


@gluon.jit
def _of_token(values, LAYOUT: gl.constexpr, MOST: gl.constexpr = False):
    """Return the sums, or the largest, of each token."""
    values = gl.max(gl.max(values, 2), 1) if MOST else gl.sum(gl.sum(values, 2), 1)
    return gl.convert_layout(values, LAYOUT)


@gluon.jit
def _read(block, LAYOUT: gl.constexpr):
    """Return tokens (8, inputs) in chunks."""
    value = gl.reshape(block.load(_paired_layout(gl.num_warps())).to(gl.float32), [8, 2 * gl.num_warps(), 4, 16])
    return gl.convert_layout(value, LAYOUT, assert_trivial=True)


@gluon.jit
def _pairs_kernel(
    x, in_scale, in_shift, numbers, scales, tokens, padded, in_features, in_scale_step, in_shift_step,
    BLOCKS: gl.constexpr, STEPS: gl.constexpr, TOTALS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Write the pairs of eight tokens, in the order in which signs unpack fast, and what is known of the tokens.

    Of 64 inputs, two words of signs, input p and input p + 32 are a pair; with p = 16 h + 4 c + k its sum is at
    16 k + 4 c + 2 h, and its difference after that. STEPS brings inputs to steps of a 127th of their token's largest.
    All of a token is asked for at once; pairs take their inputs' place, of the same thread.
    """
    WARPS: gl.constexpr = gl.num_warps()
    INPUTS: gl.constexpr = 128 * WARPS
    LAYOUT: gl.constexpr = _pairs_layout(WARPS)
    OF_TOKEN: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    xs = gl.allocate_shared_memory(x.dtype, [BLOCKS, 8, INPUTS], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    for block in gl.static_range(BLOCKS):
        mbarrier.init(bars.index(block), count=1)
    barrier()
    wait(PDL)
    begin_next(PDL)
    first_token = gl.program_id(0) * 8
    for block in gl.static_range(BLOCKS):
        mbarrier.expect(bars.index(block), 16 * INPUTS)
        tma.async_copy_global_to_shared(x, [first_token, block * INPUTS], bars.index(block), xs.index(block))
    place = _places(2 * WARPS, LAYOUT)
    token = first_token + gl.arange(0, 8, OF_TOKEN)
    there = token < tokens

    total = _own(gl.zeros([8, 2 * WARPS, 4, 16], gl.float32, LAYOUT))
    shift = total
    inverse = gl.full([8], 1.0, gl.float32, OF_TOKEN)
    if STEPS:
        largest = total
        for block in range(BLOCKS):
            mbarrier.wait(bars.index(block), 0)
            value = _read(xs.index(block), LAYOUT)
            total += _own(value)
            if in_scale is not None:
                value *= _of_inputs(in_scale, block * INPUTS + place, in_scale_step, in_features)
            largest = gl.maximum(largest, _own(gl.abs(value), True))
        largest = _of_token(largest, OF_TOKEN, True)
        finite = gl.abs(_of_token(total, OF_TOKEN)) < float("inf")
        gl.store(scales + token, gl.where(finite, largest / 127, float("nan")), mask=there)
        inverse = gl.where(largest > 1e-30, 127 / gl.maximum(largest, 1e-30), 0.0)

    scale = _of_inputs(in_scale, place, in_scale_step, in_features)
    weight = _of_inputs(in_shift, place, in_shift_step, in_features)
    for block in range(BLOCKS):
        mbarrier.wait(bars.index(block), 0)
        value = _read(xs.index(block), LAYOUT)
        if TOTALS and not STEPS:
            total += _own(value)
        if in_shift is not None:
            if STEPS:
                weight = _of_inputs(in_shift, block * INPUTS + place, in_shift_step, in_features)
            shift += _own(value * weight)
        if in_scale is not None:
            if STEPS:
                scale = _of_inputs(in_scale, block * INPUTS + place, in_scale_step, in_features)
            value *= scale
        if STEPS:
            value *= inverse[:, None, None, None]
        first, second = gl.split(gl.permute(gl.reshape(value, [8, 2 * WARPS, 2, 2, 4, 4]), [0, 1, 5, 4, 3, 2]))
        both = gl.reshape(gl.join(first + second, first - second).to(x.dtype), [8, INPUTS])
        xs.index(block).store(gl.convert_layout(both, _paired_layout(WARPS), assert_trivial=True))
        # The terms of what comes next are on their way while this is written, where registers are left for them.
        if not STEPS:
            scale = _of_inputs(in_scale, (block + 1) * INPUTS + place, in_scale_step, in_features)
            weight = _of_inputs(in_shift, (block + 1) * INPUTS + place, in_shift_step, in_features)
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(numbers, [first_token, block * INPUTS], xs.index(block))
    if scales is not None:
        gl.store(scales + padded + token, _of_token(total, OF_TOKEN), mask=there)
        gl.store(scales + 2 * padded + token, _of_token(shift, OF_TOKEN), mask=there)
    tma.store_wait(0)
    xs._keep_alive()  # while pairs are copied from it
    for block in gl.static_range(BLOCKS):
        mbarrier.invalidate(bars.index(block))


@gluon.jit
def _of_inputs(term, i, step, in_features):
    if term is None:
        found = gl.to_tensor(0.0)
    else:
        found = gl.load(term + i * step, mask=i < in_features, other=0.0).to(gl.float32)
    return found
