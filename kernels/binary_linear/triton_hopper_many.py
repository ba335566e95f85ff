"""The packed linear layer of 8 bits for hundreds of tokens and more on Hopper: warps that copy, and that multiply.

As in `triton_hopper` signs become numbers in registers, so there is no dense weight in memory. Here one warp asks for
what comes next all the time, and three groups of four warps multiply what has come by 64 rows each: while one unpacks
or writes y, the tensor cores work for the others. A program takes tile after tile, as many programs as the GPU has
processors; a tile may have rows for fewer groups than there are, so that the last tiles end at about the same time.
`triton_hopper_sparse` does the same for 16 bits.

Legend: M tokens, O out features, I in features.
"""

from functools import cache
from typing import NamedTuple

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
    store,
    stored_layout,
    with_terms,
)
from bimamba_lit.kernels.binary_linear.triton_rounding import rounded
from bimamba_lit.kernels.binary_linear.triton_words import aligned_words, launch_early
from bimamba_lit.kernels.binary_weight.triton import Terms
from bimamba_lit.kernels.configurations import Configuration, configuration, multiprocessors

INPUTS = 128  # of a step; a word has 32
ROWS = 64  # of a group of warps
COSTS = (0.32, 0.335, 0.48)  # us of a step, in tiles of 1, 2 and 3 blocks of rows (measured on an H200)
TILE = 1.0  # us of a tile, beside its steps
KINDS = {torch.int8: gl.int8, torch.int32: gl.int32, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def binary_gemm_hopper_many(x: Tensor, signs: Tensor, in_features: int, terms: Terms, bias: Tensor | None) -> Tensor:
    """Map x (M, I), rounded to 8 bits a token, to (M, O) in x's dtype; I a multiple of `INPUTS`, no group scales."""
    tokens, out_features = x.shape[0], signs.shape[0]
    in_scale, out_scale, _, in_shift, out_shift = terms
    numbers, scales = rounded(x, in_scale, in_shift, few=False)
    chosen, plan = chosen_for(tokens, out_features, in_features, x.device)
    blocks = chosen.blocks
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    _many_kernel[(min(plan.tiles, multiprocessors(x.device)),)](
        blocks_of(numbers, [blocks["TOKENS"], INPUTS]), blocks_of(aligned_words(signs), [ROWS, INPUTS // 32]),
        scales, out_scale, out_shift, bias,
        y, blocks_of(y, [blocks["PIECE"], ROWS]) if out_features % 8 == 0 else None,
        tokens, out_features, in_features, plan.row_tiles, plan.tiles, step_of(out_scale), step_of(out_shift),
        step_of(bias), **chosen.launch(), **launch_early(x.device),
    )  # fmt: skip
    return y


class Plan(NamedTuple):
    """How a product is cut into tiles.

    Attributes:
        row_tiles: Into how many the rows are cut.
        tiles: How many there are, of all tokens.
        time: What the product takes, about, in us.
        fill: The part of it that it would take if processors shared it evenly.
    """

    row_tiles: int
    tiles: int
    time: float
    fill: float


def chosen_for(tokens: int, out_features: int, in_features: int, device: torch.device) -> tuple[Configuration, Plan]:
    """Return the configuration that a product is launched with, and how it is cut."""
    chosen = configuration("binary_linear/hopper_many", torch.int8, tokens, device)
    where = chosen.blocks["TOKENS"], COSTS, multiprocessors(device)
    return chosen, planned(tokens, out_features, in_features, *where)


@cache
def planned(
    tokens: int, out_features: int, in_features: int, tokens_of_tile: int, costs: tuple[float, ...], processors: int
) -> Plan:
    """Return the cut that takes the least time: rows evenly, and tiles of one block of `ROWS` more first.

    So of the tiles that a processor takes, one a round, not all need be of the largest height. `costs` has what a step
    takes in tiles of 1, 2, ... blocks, in us.
    """

    def time(row_tiles: int) -> float:
        height, higher = divmod(blocks, row_tiles)
        of_higher = triton.cdiv(higher * token_tiles, processors)
        of_lower = triton.cdiv(row_tiles * token_tiles, processors) - of_higher
        rounds = ((of_higher, height + 1), (of_lower, height))
        return sum(count * (TILE + steps * costs[height - 1]) for count, height in rounds if count)

    blocks, token_tiles = triton.cdiv(out_features, ROWS), triton.cdiv(tokens, tokens_of_tile)
    steps = in_features // INPUTS
    row_tiles = min(range(triton.cdiv(blocks, len(costs)), blocks + 1), key=time)
    even = blocks * token_tiles / processors * steps * costs[-1] / len(costs)
    return Plan(row_tiles, row_tiles * token_tiles, time(row_tiles), even / time(row_tiles))


def blocks_of(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Return what blocks of a tensor are copied by."""
    return TensorDescriptor.from_tensor(tensor, block, _layout_of(*block, tensor.dtype))


@cache
def _layout_of(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], KINDS[dtype])


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """Return the place of the next step, and the phase of its barriers."""
    last = (slot == STAGES - 1).to(gl.int32)
    return (slot + 1) * (1 - last), phase ^ last


@gluon.jit
def span_of(tile, tokens, out_features, row_tiles, TOKENS: gl.constexpr, NEAR: gl.constexpr):
    """Return a tile's first token and row, and of how many groups it has rows; tiles of one more come first."""
    blocks = gl.cdiv(out_features, 64)
    height, higher = blocks // row_tiles, blocks % row_tiles
    of_higher = higher * gl.cdiv(tokens, TOKENS)
    lower = (tile >= of_higher).to(gl.int32)
    first_token, row_tile = place_of(
        tile - lower * of_higher, tokens, higher + lower * (row_tiles - 2 * higher), TOKENS, NEAR
    )
    row_tile += lower * higher
    first_block = row_tile * height + gl.minimum(row_tile, higher)
    return first_token, first_block * 64, height + 1 - lower


@gluon.jit
def pass_over(full, empty, slot, phase, in_features, STAGES: gl.constexpr):
    """Leave a tile's steps to the other groups."""
    for _ in range(in_features // 128):
        mbarrier.wait(full.index(slot), phase)
        barrier()
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = next_slot(slot, phase, STAGES)
    return slot, phase


@gluon.constexpr_function
def registers_of(groups):
    """Return what those have who work beside the first group: the other groups, and the warp that copies."""
    return [240, 24] if groups == 2 else [160, 160, 40]


@gluon.constexpr_function
def warps_of(groups):
    """Return the warps of those who work beside the first group."""
    return [4] * (groups - 1) + [1]


@gluon.jit
def _copy(
    copied, TOKENS: gl.constexpr, GROUPS: gl.constexpr, NEAR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Ask for the inputs and words of every step of this program's tiles, as room for them comes free."""
    x, words, xs, ws, full, empty, tokens, out_features, in_features, row_tiles, tiles = copied
    slot, phase = gl.to_tensor(0), gl.to_tensor(1)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_token, first_row, _ = span_of(tile, tokens, out_features, row_tiles, TOKENS, NEAR)
        for first_input in range(0, in_features, 128):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, 128 * TOKENS + 1024 * GROUPS)
            tma.async_copy_global_to_shared(x, [first_token, first_input], bar, xs.index(slot))
            for group in gl.static_range(GROUPS):
                to = ws.index(slot * GROUPS + group)
                tma.async_copy_global_to_shared(words, [first_row + group * 64, first_input // 32], bar, to)
            slot, phase = next_slot(slot, phase, STAGES)


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
def _begin(left, xs, slot, acc):
    return warpgroup_mma(left, xs.index(slot).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _end(left, acc, empty, slot):
    """Wait for a step's product and leave its place to another."""
    acc = warpgroup_mma_wait(0, deps=(acc,))
    hold(left)
    barrier()
    mbarrier.arrive(empty.index(slot), count=1)
    return acc


@gluon.jit
def _product(
    acc, xs, ws, full, empty, slot, phase, in_features, LEFT: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Add the steps of a tile; the words of the next are waited for and read while the tensor cores work."""
    mbarrier.wait(full.index(slot), phase)
    shifted = _shifted(ws.index(slot * GROUPS + GROUP))
    for _ in range(in_features // 128 - 1):
        left = _ends(shifted, LEFT)
        acc = _begin(left, xs, slot, acc)
        after, phase = next_slot(slot, phase, STAGES)
        mbarrier.wait(full.index(after), phase)
        shifted = _shifted(ws.index(after * GROUPS + GROUP))
        acc = _end(left, acc, empty, slot)
        slot = after
    left = _ends(shifted, LEFT)
    acc = _end(left, _begin(left, xs, slot, acc), empty, slot)
    slot, phase = next_slot(slot, phase, STAGES)
    return acc, slot, phase


@gluon.jit
def _multiply(
    multiplied, GROUP: gl.constexpr, TOKENS: gl.constexpr, GROUPS: gl.constexpr, NEAR: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Multiply and write 64 rows of every tile of this program."""
    (
        xs, ws, ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features,
        row_tiles, tiles, out_scale_step, out_shift_step, bias_step,
    ) = multiplied  # fmt: skip
    LEFT: gl.constexpr = left_layout(gl.int8, TOKENS, 4)
    # What is known of them, and y itself on its way to other threads, fit the registers.
    AT_ONCE: gl.constexpr = 64 if y_blocks is None else ys.shape[1]
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_token, first_row, height = span_of(tile, tokens, out_features, row_tiles, TOKENS, NEAR)
        if GROUP < height:
            acc = gl.zeros([64, TOKENS], gl.int32, product_layout(gl.int8, TOKENS, 4))
            acc, slot, phase = _product(acc, xs, ws, full, empty, slot, phase, in_features, LEFT, GROUP, GROUPS, STAGES)
            finish(
                acc, scales, out_scale, out_shift, bias, y, y_blocks, ys, first_token, first_row + GROUP * 64, tokens,
                out_features, out_scale_step, out_shift_step, bias_step, True, AT_ONCE, GROUP * BUFFERS, 0, BUFFERS,
            )  # fmt: skip
        else:
            slot, phase = pass_over(full, empty, slot, phase, in_features, STAGES)
    if y_blocks is not None:
        tma.store_wait(0)


@gluon.jit
def _work(
    multiplied, copied, GROUP: gl.constexpr, TOKENS: gl.constexpr, GROUPS: gl.constexpr, NEAR: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Do the work of a group of warps; after those that multiply comes the warp that copies."""
    if GROUP < GROUPS:
        _multiply(multiplied, GROUP, TOKENS, GROUPS, NEAR, STAGES, BUFFERS)
    else:
        _copy(copied, TOKENS, GROUPS, NEAR, STAGES)


@gluon.jit
def finish(
    acc, scales, out_scale, out_shift, bias, y, y_blocks, ys, first_token, first_row, tokens, out_features,
    out_scale_step, out_shift_step, bias_step, STEPS: gl.constexpr, AT_ONCE: gl.constexpr, BUFFER: gl.constexpr,
    PIECE: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Write a tile; the terms of AT_ONCE tokens are asked for at once."""
    if acc.shape[1] > AT_ONCE:
        HALF: gl.constexpr = acc.shape[1] // 2
        one, two = gl.split(gl.permute(gl.reshape(acc, [64, 2, HALF]), [0, 2, 1]))
        finish(
            one, scales, out_scale, out_shift, bias, y, y_blocks, ys, first_token, first_row, tokens,
            out_features, out_scale_step, out_shift_step, bias_step, STEPS, AT_ONCE, BUFFER, PIECE, BUFFERS,
        )  # fmt: skip
        finish(
            two, scales, out_scale, out_shift, bias, y, y_blocks, ys, first_token + HALF, first_row, tokens,
            out_features, out_scale_step, out_shift_step, bias_step, STEPS, AT_ONCE, BUFFER,
            PIECE + HALF // ys.shape[1], BUFFERS,
        )  # fmt: skip
    else:
        result = with_terms(
            acc, scales, out_scale, out_shift, bias, first_token, first_row, tokens, out_features,
            out_scale_step, out_shift_step, bias_step, STEPS,
        ).to(y.dtype.element_ty)  # fmt: skip
        if y_blocks is None:
            result = gl.convert_layout(result, stored_layout(4))
            store(result, y, first_token, first_row, tokens, out_features)
        else:
            _write(result, y_blocks, ys, first_token, first_row, BUFFER, PIECE, BUFFERS)


@gluon.jit
def _write(
    result, y_blocks, ys, first_token, first_row, BUFFER: gl.constexpr, PIECE: gl.constexpr, BUFFERS: gl.constexpr
):
    """Write y, piece by piece; pieces take turns in as many buffers as there are, and leave them on their own."""
    if result.shape[1] > ys.shape[1]:
        HALF: gl.constexpr = result.shape[1] // 2
        one, two = gl.split(gl.permute(gl.reshape(result, [64, 2, HALF]), [0, 2, 1]))
        _write(one, y_blocks, ys, first_token, first_row, BUFFER, PIECE, BUFFERS)
        _write(two, y_blocks, ys, first_token + HALF, first_row, BUFFER, PIECE + HALF // ys.shape[1], BUFFERS)
    else:
        buffer = ys.index(BUFFER + PIECE % BUFFERS)
        tma.store_wait(BUFFERS - 1)
        barrier()
        buffer.permute((1, 0)).store(result)
        fence_async_shared()
        barrier()
        tma.async_copy_shared_to_global(y_blocks, [first_token, first_row], buffer)


@gluon.jit
def _many_kernel(
    x, words, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features, row_tiles, tiles,
    out_scale_step, out_shift_step, bias_step, TOKENS: gl.constexpr, GROUPS: gl.constexpr, NEAR: gl.constexpr,
    STAGES: gl.constexpr, PIECE: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, TOKENS, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, 64, 4], words.layout)
    Y_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIECE, 64], y.dtype.element_ty)
    ys = gl.allocate_shared_memory(y.dtype.element_ty, [GROUPS * BUFFERS, PIECE, 64], Y_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    barrier()
    tl.extra.cuda.gdc_wait()
    multiplied = (
        xs, ws, ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features,
        row_tiles, tiles, out_scale_step, out_shift_step, bias_step,
    )  # fmt: skip
    copied = (x, words, xs, ws, full, empty, tokens, out_features, in_features, row_tiles, tiles)
    gl.warp_specialize(
        [
            (_work, (multiplied, copied, gl.constexpr(group), TOKENS, GROUPS, NEAR, STAGES, BUFFERS))
            for group in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        warps_of(GROUPS),
        registers_of(GROUPS),
    )
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(stage))
        mbarrier.invalidate(empty.index(stage))
