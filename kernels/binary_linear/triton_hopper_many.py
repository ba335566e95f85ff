"""The packed linear layer for hundreds of tokens and more on Hopper: warps that copy, and warps that multiply.

As in `triton_hopper` signs become numbers in registers, so there is no dense weight in memory. Here one warp asks for
what comes next all the time, and two or three groups of four warps multiply what has come by 64 rows each: while one
unpacks or writes y, the tensor cores work for the others. A program takes tile after tile, as many programs as the GPU
has processors.

With 16 bits tokens are taken as they are: scale and shift of an input are in the two numbers that its weights can be.
A shift that the scale by output must not reach is a sum over a token's inputs instead.

Legend: M tokens, O out features, I in features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bimamba_lit.kernels.binary_linear.triton_gemv import step_of
from bimamba_lit.kernels.binary_linear.triton_hopper import (
    barrier,
    hold,
    left_layout,
    place_of,
    product_layout,
    sign_layout,
    store,
    stored_layout,
    sums_of,
    with_terms,
)
from bimamba_lit.kernels.binary_linear.triton_rounding import rounded
from bimamba_lit.kernels.binary_linear.triton_words import aligned_words, launch_early
from bimamba_lit.kernels.binary_weight.triton import Terms
from bimamba_lit.kernels.configurations import Configuration, configuration, multiprocessors

INPUTS = 128  # of a step; a word has 32
ROWS = 64  # of a group of warps
# Names of configurations, and what a tile takes next to a wide one of as many numbers (measured on an H100).
COSTS = {"wide": 1.0, "long": 1.025, "square": 1.075}
KINDS = {torch.int8: gl.int8, torch.int32: gl.int32, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def fill(tokens: int, out_features: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the share of processors that have a tile, over the rounds that tiles take; `dtype` is multiplied."""
    tiles = _tiles(tokens, out_features, _fastest(tokens, out_features, dtype, device))
    return tiles / (_rounds(tiles, device) * multiprocessors(device))


def _fastest(tokens: int, out_features: int, dtype: torch.dtype, device: torch.device) -> Configuration:
    """Return the configuration whose rounds of tiles take the least time: it leaves few processors idle."""

    def time(name: str) -> float:
        blocks = found[name].blocks
        rounds = _rounds(_tiles(tokens, out_features, found[name]), device)
        return COSTS[name] * rounds * blocks["TOKENS"] * blocks["GROUPS"]

    names = [name for name in COSTS if name != "square" or dtype == torch.int8]
    found = {name: configuration(f"binary_linear/hopper_{name}", dtype, tokens, device) for name in names}
    return found[min(found, key=time)]


def _rounds(tiles: int, device: torch.device) -> int:
    return -(-tiles // multiprocessors(device))


def binary_gemm_hopper_many(
    x: Tensor, signs: Tensor, in_features: int, terms: Terms, bias: Tensor | None, activation_bits: int | None
) -> Tensor:
    """Map x (M, I) to (M, O) in x's dtype; I a multiple of `INPUTS`, no group scales, 16 bits unless rounded to 8."""
    tokens, out_features = x.shape[0], signs.shape[0]
    in_scale, out_scale, _, in_shift, out_shift = terms
    levels: Tensor | None = None
    scales: Tensor | None = None
    if activation_bits == 8:
        numbers, scales = rounded(x, in_scale, in_shift, few=False)
    else:
        numbers = x.contiguous() if x.storage_offset() % 8 == 0 else x.clone(memory_format=torch.contiguous_format)
        apart = out_shift is not None or (out_scale is not None and in_shift is not None)
        scales = sums_of(x, in_shift) if apart else None
        levels = _levels(in_features, in_scale, None if apart else in_shift, x)
    chosen = _fastest(tokens, out_features, numbers.dtype, x.device)
    blocks = chosen.blocks
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    tiles = _tiles(tokens, out_features, chosen)
    _many_kernel[(min(tiles, multiprocessors(x.device)),)](
        _blocks(numbers, [blocks["TOKENS"], INPUTS]), _blocks(aligned_words(signs), [ROWS, INPUTS // 32]),
        None if levels is None else _blocks(levels, [INPUTS]), scales, out_scale, out_shift, bias,
        y, _blocks(y, [blocks["PIECE"], ROWS]) if out_features % 8 == 0 else None,
        tokens, out_features, in_features, tiles, step_of(out_scale), step_of(out_shift), step_of(bias),
        **chosen.launch(), **launch_early(x.device),
    )  # fmt: skip
    return y


def _tiles(tokens: int, out_features: int, chosen: Configuration) -> int:
    return triton.cdiv(tokens, chosen.blocks["TOKENS"]) * triton.cdiv(out_features, ROWS * chosen.blocks["GROUPS"])


def _blocks(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return what blocks of a tensor are copied by."""
    layout = gl.NVMMASharedLayout.get_default_for(block, KINDS[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout)


def _levels(in_features: int, in_scale: Tensor | None, in_shift: Tensor | None, like: Tensor) -> Tensor:
    """Return what an input's weights are where their signs are 1, and after those where they are 0 (2 I,)."""
    levels = torch.empty(2 * in_features, dtype=like.dtype, device=like.device)
    chosen = configuration("binary_linear/levels", like.dtype, in_features, like.device)
    _levels_kernel[(triton.cdiv(in_features, chosen.blocks["INPUTS"]),)](
        in_scale, in_shift, levels, in_features, step_of(in_scale), step_of(in_shift), **chosen.launch()
    )
    return levels


@triton.jit
def _levels_kernel(in_scale, in_shift, levels, in_features, in_scale_step, in_shift_step, INPUTS: tl.constexpr):
    i = tl.program_id(0) * INPUTS + tl.arange(0, INPUTS)
    inside = i < in_features
    scale = tl.full([INPUTS], 1.0, tl.float32)
    if in_scale is not None:
        scale = tl.load(in_scale + i * in_scale_step, mask=inside, other=0.0).to(tl.float32)
    shift = tl.zeros([INPUTS], tl.float32)
    if in_shift is not None:
        shift = tl.load(in_shift + i * in_shift_step, mask=inside, other=0.0).to(tl.float32)
    tl.store(levels + i, (shift + scale).to(levels.dtype.element_ty), mask=inside)
    tl.store(levels + in_features + i, (shift - scale).to(levels.dtype.element_ty), mask=inside)


@gluon.jit
def _by_sign(word, high, low, SIGNS: gl.constexpr, LEFT: gl.constexpr):
    """Return of 16-bit numbers of each input the high or the low one, by the signs of words (rows, words)."""
    place = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, SIGNS)))
    wide, place = gl.broadcast(gl.expand_dims(word, 2), gl.expand_dims(gl.expand_dims(place, 0), 1))
    # The signs of two neighbours are the top bits of a byte of each of two shifted words: each fills two bytes.
    first, second = wide << (7 - (place & 6)), wide << (6 - (place & 6))
    mask = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $3, $5;", "=r,r,r,r,r,r,r", [first, second, 0xCC88 + 0x1111 * (place >> 3)],
        dtype=gl.int16, is_pure=True, pack=2,
    )  # fmt: skip
    mask = gl.convert_layout(gl.reshape(mask, [word.shape[0], 32 * word.shape[1]]), LEFT)
    mask, high = gl.broadcast(mask, gl.expand_dims(high.to(gl.int16, bitcast=True), 0))
    mask, low = gl.broadcast(mask, gl.expand_dims(low.to(gl.int16, bitcast=True), 0))
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xCA;", "=r,r,r,r", [mask, high, low], dtype=gl.int16, is_pure=False, pack=2
    )


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    last = (slot == STAGES - 1).to(gl.int32)
    return (slot + 1) * (1 - last), phase ^ last


@gluon.jit
def _copy(
    x, words, levels, xs, ws, ls, full, empty, tokens, out_features, in_features, tiles,
    TOKENS: gl.constexpr, GROUPS: gl.constexpr, NEAR: gl.constexpr, STAGES: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Ask for the inputs, words and levels of every step of this program's tiles, as room for them comes free."""
    slot, phase = gl.to_tensor(0), gl.to_tensor(1)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_token, first_row = place_of(tile, tokens, out_features, TOKENS, 64 * GROUPS, NEAR)
        for first_input in range(0, in_features, 128):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(x, [first_token, first_input], bar, xs.index(slot))
            for group in gl.static_range(GROUPS):
                to = ws.index(slot * GROUPS + group)
                tma.async_copy_global_to_shared(words, [first_row + group * 64, first_input // 32], bar, to)
            if levels is not None:
                tma.async_copy_global_to_shared(levels, [first_input], bar, ls.index(slot * 2))
                tma.async_copy_global_to_shared(levels, [in_features + first_input], bar, ls.index(slot * 2 + 1))
            slot, phase = _next(slot, phase, STAGES)


@gluon.constexpr_function
def _quad_layout():
    """Return the layout of bytes (rows, words, bits, bytes of a word) that the product's left operand has."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 0, 0], [0, 2, 0, 0], [8, 0, 0, 0], [0, 0, 4, 0]]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0, 0], [32, 0, 0, 0]], [], [64, 4, 8, 4])


@gluon.jit
def _shifted(words):
    """Return words (rows, words), each shifted by 0 to 7 bits (rows, words, bits)."""
    OF_BIT: gl.constexpr = gl.SliceLayout(3, _quad_layout())
    bit = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, OF_BIT)))[None, None, :]
    word, bit = gl.broadcast(words.load(gl.SliceLayout(2, OF_BIT))[:, :, None], bit)
    return gl.inline_asm_elementwise(
        "shr.b32 $0, $1, $2;", "=r,r,r", [word, bit], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _ends(shifted, LEFT: gl.constexpr):
    """Return the last bits of the four bytes of shifted words as numbers 0 and 1 (rows, inputs)."""
    OF_BYTE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, _quad_layout())))
    shifted, _ = gl.broadcast(shifted[:, :, :, None], gl.arange(0, 4, OF_BYTE)[None, None, None, :])
    number = gl.inline_asm_elementwise(
        "and.b32 $0, $1, 0x01010101;", "=r,r,r,r,r", [shifted], dtype=gl.int8, is_pure=False, pack=4
    )
    return gl.convert_layout(gl.reshape(number, [64, 128]), LEFT, assert_trivial=True)


@gluon.jit
def _add_product(left, xs, empty, slot, acc):
    """Add the product of a step and leave its place to another."""
    acc = warpgroup_mma(left, xs.index(slot).permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    hold(left)
    barrier()
    mbarrier.arrive(empty.index(slot), count=1)
    return acc


@gluon.jit
def _product_of_8_bits(
    acc, xs, ws, full, empty, slot, phase, in_features, LEFT: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Add the steps of a tile; the words of the next are waited for and read while the tensor cores work."""
    mbarrier.wait(full.index(slot), phase)
    shifted = _shifted(ws.index(slot * GROUPS + GROUP))
    for _ in range(in_features // 128 - 1):
        left = _ends(shifted, LEFT)
        acc = warpgroup_mma(left, xs.index(slot).permute((1, 0)), acc, is_async=True)
        after, phase = _next(slot, phase, STAGES)
        mbarrier.wait(full.index(after), phase)
        shifted = _shifted(ws.index(after * GROUPS + GROUP))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        hold(left)
        barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        slot = after
    acc = _add_product(_ends(shifted, LEFT), xs, empty, slot, acc)
    slot, phase = _next(slot, phase, STAGES)
    return acc, slot, phase


@gluon.jit
def _product_of_16_bits(
    acc, xs, ws, ls, full, empty, slot, phase, in_features, LEFT: gl.constexpr, GROUP: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add the steps of a tile."""
    SIGNS: gl.constexpr = sign_layout(64, 4, False, 4)
    for _ in range(in_features // 128):
        mbarrier.wait(full.index(slot), phase)
        word = ws.index(slot * GROUPS + GROUP).load(gl.SliceLayout(2, SIGNS))
        high = ls.index(slot * 2).load(gl.SliceLayout(0, LEFT))
        low = ls.index(slot * 2 + 1).load(gl.SliceLayout(0, LEFT))
        left = _by_sign(word, high, low, SIGNS, LEFT).to(xs.dtype, bitcast=True)
        acc = _add_product(left, xs, empty, slot, acc)
        slot, phase = _next(slot, phase, STAGES)
    return acc, slot, phase


@gluon.jit
def _multiply(
    xs, ws, ls, ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features,
    tiles, out_scale_step, out_shift_step, bias_step, GROUP: gl.constexpr, TOKENS: gl.constexpr, GROUPS: gl.constexpr,
    NEAR: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Multiply and write 64 rows of every tile of this program."""
    KIND: gl.constexpr = xs.dtype
    LEFT: gl.constexpr = left_layout(KIND, TOKENS, 4)
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_token, first_row = place_of(tile, tokens, out_features, TOKENS, 64 * GROUPS, NEAR)
        acc = gl.zeros([64, TOKENS], gl.int32 if KIND == gl.int8 else gl.float32, product_layout(KIND, TOKENS, 4))
        if KIND == gl.int8:
            acc, slot, phase = _product_of_8_bits(
                acc, xs, ws, full, empty, slot, phase, in_features, LEFT, GROUP, GROUPS, STAGES
            )
        else:
            acc, slot, phase = _product_of_16_bits(
                acc, xs, ws, ls, full, empty, slot, phase, in_features, LEFT, GROUP, GROUPS, STAGES
            )
        _finish(
            acc, scales, out_scale, out_shift, bias, y, y_blocks, ys, first_token, first_row + GROUP * 64, tokens,
            out_features, out_scale_step, out_shift_step, bias_step, GROUP * BUFFERS, 0, BUFFERS,
        )  # fmt: skip
    if y_blocks is not None:
        tma.store_wait(0)


@gluon.jit
def _finish(
    acc, scales, out_scale, out_shift, bias, y, y_blocks, ys, first_token, first_row, tokens, out_features,
    out_scale_step, out_shift_step, bias_step, BUFFER: gl.constexpr, PIECE: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Write a tile, piece by piece; pieces take turns in as many buffers as there are, and leave them on their own."""
    if acc.shape[1] > ys.shape[1]:
        HALF: gl.constexpr = acc.shape[1] // 2
        one, two = gl.split(gl.permute(gl.reshape(acc, [64, 2, HALF]), [0, 2, 1]))
        _finish(
            one, scales, out_scale, out_shift, bias, y, y_blocks, ys, first_token, first_row, tokens,
            out_features, out_scale_step, out_shift_step, bias_step, BUFFER, PIECE, BUFFERS,
        )  # fmt: skip
        _finish(
            two, scales, out_scale, out_shift, bias, y, y_blocks, ys, first_token + HALF, first_row, tokens,
            out_features, out_scale_step, out_shift_step, bias_step, BUFFER, PIECE + HALF // ys.shape[1], BUFFERS,
        )  # fmt: skip
    else:
        if y_blocks is None:
            acc = gl.convert_layout(acc, stored_layout(gl.num_warps()))
        result = with_terms(
            acc, scales, out_scale, out_shift, bias, first_token, first_row, tokens, out_features,
            out_scale_step, out_shift_step, bias_step,
        ).to(y.dtype.element_ty)  # fmt: skip
        if y_blocks is None:
            store(result, y, first_token, first_row, tokens, out_features)
        else:
            buffer = ys.index(BUFFER + PIECE % BUFFERS)
            tma.store_wait(BUFFERS - 1)
            barrier()
            buffer.permute((1, 0)).store(result)
            fence_async_shared()
            barrier()
            tma.async_copy_shared_to_global(y_blocks, [first_token, first_row], buffer)


@gluon.constexpr_function
def _bytes_of(kind, tokens, groups):
    """Return how many bytes a step takes."""
    eight = kind == gl.int8
    return 128 * tokens * (1 if eight else 2) + 64 * groups * 16 + (0 if eight else 512)


@gluon.jit
def _many_kernel(
    x, words, levels, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features, tiles,
    out_scale_step, out_shift_step, bias_step, TOKENS: gl.constexpr, GROUPS: gl.constexpr, NEAR: gl.constexpr,
    STAGES: gl.constexpr, PIECE: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    KIND: gl.constexpr = x.dtype
    xs = gl.allocate_shared_memory(KIND, [STAGES, TOKENS, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, 64, 4], words.layout)
    ls = xs if levels is None else gl.allocate_shared_memory(KIND, [STAGES * 2, 128], levels.layout)
    Y_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIECE, 64], y.dtype.element_ty)
    ys = gl.allocate_shared_memory(y.dtype.element_ty, [GROUPS * BUFFERS, PIECE, 64], Y_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    barrier()
    tl.extra.cuda.gdc_wait()
    BYTES: gl.constexpr = _bytes_of(KIND, TOKENS, GROUPS)
    if GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (
                xs, ws, ls, ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features,
                in_features, tiles, out_scale_step, out_shift_step, bias_step,
                gl.constexpr(0), TOKENS, GROUPS, NEAR, STAGES, BUFFERS,
            )),
            (_multiply, (
                xs, ws, ls, ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features,
                in_features, tiles, out_scale_step, out_shift_step, bias_step,
                gl.constexpr(1), TOKENS, GROUPS, NEAR, STAGES, BUFFERS,
            )),
            (_copy, (
                x, words, levels, xs, ws, ls, full, empty, tokens, out_features, in_features, tiles,
                TOKENS, GROUPS, NEAR, STAGES, BYTES,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                xs, ws, ls, ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features,
                in_features, tiles, out_scale_step, out_shift_step, bias_step,
                gl.constexpr(0), TOKENS, GROUPS, NEAR, STAGES, BUFFERS,
            )),
            (_multiply, (
                xs, ws, ls, ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features,
                in_features, tiles, out_scale_step, out_shift_step, bias_step,
                gl.constexpr(1), TOKENS, GROUPS, NEAR, STAGES, BUFFERS,
            )),
            (_multiply, (
                xs, ws, ls, ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features,
                in_features, tiles, out_scale_step, out_shift_step, bias_step,
                gl.constexpr(2), TOKENS, GROUPS, NEAR, STAGES, BUFFERS,
            )),
            (_copy, (
                x, words, levels, xs, ws, ls, full, empty, tokens, out_features, in_features, tiles,
                TOKENS, GROUPS, NEAR, STAGES, BYTES,
            )),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(stage))
        mbarrier.invalidate(empty.index(stage))
