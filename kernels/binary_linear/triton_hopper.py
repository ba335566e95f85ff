"""The packed linear layer for tens to hundreds of tokens on Hopper: signs become numbers in registers.

Its tensor cores take their left operand from registers, so y^T = W x^T needs no dense weight in memory: each warp reads
words of 32 signs and writes those of its rows as 0 and 1 in 8 bits, or as -1 and 1 in 16 bits. One launch before it
brings tokens to steps of their largest scaled input, so that the terms of the formula remain for the epilogue.

Legend: M tokens, O out features, I in features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bimamba_lit.kernels.binary_linear.triton_gemv import scaled_inputs, step_of, survey
from bimamba_lit.kernels.binary_linear.triton_rounding import PADDED, empty_scales, rounded
from bimamba_lit.kernels.binary_linear.triton_words import aligned_words, launch_early
from bimamba_lit.kernels.binary_weight.triton import Terms
from bimamba_lit.kernels.configurations import configuration, multiprocessors

MULTIPLE = 128  # of in_features
FEWEST_INPUTS = 512  # of a part of the inputs
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name in Triton 3.6


def binary_gemm_hopper(
    x: Tensor, signs: Tensor, in_features: int, terms: Terms, bias: Tensor | None, activation_bits: int | None
) -> Tensor:
    """Map x (M, I) to (M, O) in x's dtype; I a multiple of `MULTIPLE`, no group scales, 16 bits unless rounded to 8."""
    tokens, out_features = x.shape[0], signs.shape[0]
    _, out_scale, _, _, out_shift = terms
    numbers, scales = prepare(x, terms) if activation_bits is None else rounded(x, terms[0], terms[3], few=True)
    chosen = configuration("binary_linear/hopper", numbers.dtype, tokens, x.device)
    blocks = chosen.blocks
    tiles = triton.cdiv(tokens, blocks["TOKENS"]) * triton.cdiv(out_features, blocks["ROWS"])
    parts = _parts(tiles, in_features, x.device)
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    sums = y
    if parts > 1:
        dtype = torch.int32 if activation_bits == 8 else torch.float32
        sums = torch.empty(parts, tokens, out_features, dtype=dtype, device=x.device)
    block = [blocks["TOKENS"], 32 * blocks["WORDS"]]
    kind = gl.int8 if activation_bits == 8 else {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    epilogue = (scales, out_scale, out_shift, bias)
    steps = (step_of(out_scale), step_of(out_shift), step_of(bias))
    _gemm_kernel[(tiles, parts)](
        TensorDescriptor.from_tensor(numbers, block, layout), aligned_words(signs), *epilogue, sums, tokens,
        out_features, in_features, in_features // 32, parts, *steps, SPLIT=parts > 1, **chosen.launch(),
        **launch_early(x.device),
    )  # fmt: skip
    if parts > 1:
        adding = configuration("binary_linear/hopper_parts", x.dtype, out_features, x.device)
        tiles = triton.cdiv(tokens, adding.blocks["TOKENS"]) * triton.cdiv(out_features, adding.blocks["ROWS"])
        _add_parts_kernel[(tiles,)](
            sums, *epilogue, y, tokens, out_features, parts, *steps, **adding.launch(),
        )  # fmt: skip
    return y


def _parts(tiles: int, in_features: int, device: torch.device) -> int:
    """Return into how many parts the inputs are split: as few tiles as there are leave processors idle."""
    return max(1, min(multiprocessors(device) // tiles, in_features // FEWEST_INPUTS))


def prepare(x: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return numbers (M, I) in x's dtype; their steps, sums of x, and of `in_shift` times x; (4, M padded)."""
    in_scale, _, _, in_shift, _ = terms
    tokens, in_features = x.shape
    numbers = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scales = empty_scales(tokens, x.device)
    chosen = configuration("binary_linear/hopper_tokens", x.dtype, in_features, x.device)
    _prepare_kernel[(tokens,)](
        x, in_scale, in_shift, numbers, scales, scales.shape[1], in_features, x.stride(0), x.stride(1),
        step_of(in_scale), step_of(in_shift), SINGLE=in_features <= chosen.blocks["INPUTS"], **chosen.launch(),
    )  # fmt: skip
    return numbers, scales


@triton.jit
def _prepare_kernel(
    x, in_scale, in_shift, numbers, scales, padded, in_features, stride_m, stride_i, in_scale_step, in_shift_step,
    INPUTS: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Write a token, times the inputs' scales, in steps of a 127th of its largest and in an order that unpacks fast.

    Of the 32 inputs of a word input 16 j + k is at 2 k + j, so that a shift of the word by 15 - k has the signs of both
    at the ends of its halves. SINGLE says that INPUTS covers a token: it is read once.
    """
    token = tl.program_id(0)
    block = tl.arange(0, INPUTS)
    x += token.to(tl.int64) * stride_m
    scaled, inverse, step, finite = survey(
        x, in_scale, in_shift, scales, token, padded, in_features, stride_i, in_scale_step, in_shift_step,
        127, INPUTS, SINGLE,
    )  # fmt: skip
    numbers += token.to(tl.int64) * in_features
    for start in range(0, INPUTS if SINGLE else in_features, INPUTS):
        i = start + block
        inside = i < in_features
        if not SINGLE:
            _, scaled = scaled_inputs(x, in_scale, i, inside, stride_i, in_scale_step)
        number = (tl.where(finite, scaled, 0.0) * inverse).to(numbers.dtype.element_ty)
        by_bit = tl.permute(tl.reshape(number, [INPUTS // 32, 2, 16]), [0, 2, 1])
        tl.store(numbers + i, tl.reshape(by_bit, [INPUTS]), mask=inside)


@gluon.jit
def place_of(tile, tokens, row_tiles, TOKENS: gl.constexpr, NEAR: gl.constexpr):
    """Return a tile's first token and its row of tiles; of NEAR blocks of tokens they run side by side and share."""
    token_tiles = gl.cdiv(tokens, TOKENS)
    band = tile // (NEAR * row_tiles)
    near = gl.minimum(token_tiles - band * NEAR, NEAR)
    within = tile % (NEAR * row_tiles)
    return (band * NEAR + within % near) * TOKENS, within // near


@gluon.constexpr_function
def product_layout(kind, tokens, warps):
    """Return the layout of sums (rows, tokens)."""
    shape = [16, min(tokens, 128), 32] if kind == gl.int8 else [16, tokens, 16]
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], shape)


@gluon.constexpr_function
def left_layout(kind, tokens, warps):
    """Return the layout of the product's left operand (rows, inputs)."""
    return gl.DotOperandLayout(0, product_layout(kind, tokens, warps), 4 if kind == gl.int8 else 2)


@gluon.constexpr_function
def sign_layout(rows, words, eight, warps):
    """Return the layout of signs (rows, words, 32) that the product's left operand has, up to the order of inputs."""

    def powers(first, end):
        return [first << k for k in range(((end - 1) // first).bit_length())]

    registers = [[0, 0, bit] for bit in ([1, 2] if eight else [1])] + [[0, word, 0] for word in powers(1, words)]
    registers += [[8, 0, 0]] + [[0, 0, bit] for bit in ([16] if eight else [8, 16])]
    registers += [[row, 0, 0] for row in powers(16 * warps, rows)]
    lanes = [[0, 0, bit] for bit in ([4, 8] if eight else [2, 4])] + [[row, 0, 0] for row in (1, 2, 4)]
    of_warps = [[row, 0, 0] for row in powers(16, 16 * warps)]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [rows, words, 32])


@gluon.constexpr_function
def _sign_code(kind):
    """Return what writes two signs of a word, brought to the ends of its halves, as those of two ones."""
    ones = "0x3F803F80" if kind == gl.bfloat16 else "0x3C003C00"
    return f"{{ .reg .b32 t; shl.b32 t, $1, $3; lop3.b32 $0, t, 0x80008000, {ones}, 0xA6; }}"


@gluon.jit
def unpacked(word, LAYOUT: gl.constexpr, KIND: gl.constexpr):
    """Return signs of words (rows, words) as numbers (rows, 32 words): 0 and 1 of int8, or -1 and 1 of 16 bits."""
    place = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    shift = place // 4 if KIND == gl.int8 else 15 - place // 2
    wide, shift = gl.broadcast(gl.expand_dims(word, 2), gl.expand_dims(gl.expand_dims(shift, 0), 1))
    if KIND == gl.int8:
        number = gl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.b32 t, $1, $5; and.b32 $0, t, 0x01010101; }",
            "=r,r,r,r,r,r,r,r,r", [wide, shift], dtype=gl.int8, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        number = gl.inline_asm_elementwise(
            _sign_code(KIND), "=r,r,r,r,r", [wide, shift], dtype=gl.int16, is_pure=False, pack=2
        ).to(KIND, bitcast=True)
    return gl.reshape(number, [word.shape[0], 32 * word.shape[1]])


@gluon.jit
def _ask(x, bars, xs, slot, first_token, first_input, wanted):
    """Ask for a block of tokens' inputs; those beyond the last are zeros."""
    mbarrier.expect(bars.index(slot), x.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(x, [first_token, first_input], bars.index(slot), xs.index(slot), pred=wanted)


@gluon.jit
def _refill(x, bars, xs, first_token, first_input, step, steps, INPUTS: gl.constexpr, STAGES: gl.constexpr):
    """Ask for what comes STAGES steps after one whose product is over for this warp."""
    barrier()
    more = (step >= 0) & (step + STAGES < steps)
    _ask(x, bars, xs, (step + STAGES) % STAGES, first_token, first_input + (step + STAGES) * INPUTS, more)


@gluon.jit
def hold(left):
    """Keep registers that a product under way reads from being written before here."""
    PACK: gl.constexpr = 4 if left.dtype == gl.int8 else 2
    gl.inline_asm_elementwise("// $0 $1", "=r,0", [left], dtype=left.dtype, is_pure=False, pack=PACK)


@gluon.jit
def _gemm_kernel(
    x, words, scales, out_scale, out_shift, bias, sums, tokens, out_features, in_features, width, parts,
    out_scale_step, out_shift_step, bias_step,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, WORDS: gl.constexpr, NEAR: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """Multiply a tile and a part of the inputs; `sums` is y, or a sum for each part that `_add_parts_kernel` ends."""
    KIND: gl.constexpr = x.dtype
    EIGHT: gl.constexpr = KIND == gl.int8
    INPUTS: gl.constexpr = 32 * WORDS
    WARPS: gl.constexpr = gl.num_warps()
    LEFT: gl.constexpr = left_layout(KIND, TOKENS, WARPS)
    SIGNS: gl.constexpr = sign_layout(ROWS, WORDS, EIGHT, WARPS)
    OF_WORD: gl.constexpr = gl.SliceLayout(2, SIGNS)
    first_token, row_tile = place_of(gl.program_id(0), tokens, gl.cdiv(out_features, ROWS), TOKENS, NEAR)
    first_row = row_tile * ROWS

    xs = gl.allocate_shared_memory(KIND, [STAGES, TOKENS, INPUTS], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
    last = in_features // INPUTS - 1
    steps = gl.cdiv(last + 1, parts)
    begin = gl.program_id(1) * steps
    row = (first_row + gl.arange(0, ROWS, gl.SliceLayout(1, OF_WORD))) % out_features
    at = words + gl.expand_dims(row.to(gl.int64) * width, 1)
    at += gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, OF_WORD)), 0)
    acc = gl.zeros([ROWS, TOKENS], gl.int32 if EIGHT else gl.float32, product_layout(KIND, TOKENS, WARPS))
    word = gl.load(at + gl.minimum(begin, last) * WORDS)
    tl.extra.cuda.gdc_wait()
    for stage in gl.static_range(STAGES):
        _ask(x, bars, xs, stage, first_token, (begin + stage) * INPUTS, stage < steps)
    for step in range(steps):
        mbarrier.wait(bars.index(step % STAGES), (step // STAGES) & 1)
        left = gl.convert_layout(unpacked(word, SIGNS, KIND), LEFT)
        word = gl.load(at + gl.minimum(begin + step + 1, last) * WORDS)
        acc = warpgroup_mma(left, xs.index(step % STAGES).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        hold(left)
        _refill(x, bars, xs, first_token, begin * INPUTS, step, steps, INPUTS, STAGES)
    barrier()
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(stage))
    if SPLIT:
        sums += gl.program_id(1).to(gl.int64) * tokens * out_features
    _finish(
        acc, scales, out_scale, out_shift, bias, sums, first_token, first_row, tokens, out_features,
        out_scale_step, out_shift_step, bias_step, SPLIT, WARPS,
    )  # fmt: skip


@gluon.jit
def _finish(
    acc, scales, out_scale, out_shift, bias, sums, first_token, first_row, tokens, out_features,
    out_scale_step, out_shift_step, bias_step, SPLIT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Write a tile, 64 tokens at a time: few terms are in registers at once."""
    if acc.shape[1] > 64:
        ROWS: gl.constexpr = acc.shape[0]
        HALF: gl.constexpr = acc.shape[1] // 2
        first, second = gl.split(gl.permute(gl.reshape(acc, [ROWS, 2, HALF]), [0, 2, 1]))
        _finish(
            first, scales, out_scale, out_shift, bias, sums, first_token, first_row, tokens, out_features,
            out_scale_step, out_shift_step, bias_step, SPLIT, WARPS,
        )  # fmt: skip
        _finish(
            second, scales, out_scale, out_shift, bias, sums, first_token + HALF, first_row, tokens, out_features,
            out_scale_step, out_shift_step, bias_step, SPLIT, WARPS,
        )  # fmt: skip
    else:
        result = gl.convert_layout(acc, stored_layout(WARPS))
        if not SPLIT:
            result = with_terms(
                result, scales, out_scale, out_shift, bias, first_token, first_row, tokens, out_features,
                out_scale_step, out_shift_step, bias_step,
            )  # fmt: skip
        store(result, sums, first_token, first_row, tokens, out_features)


@gluon.jit
def _add_parts_kernel(
    sums, scales, out_scale, out_shift, bias, y, tokens, out_features, parts,
    out_scale_step, out_shift_step, bias_step, TOKENS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Add the parts' sums, always in the same order, and the terms."""
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = stored_layout(WARPS)
    row_tiles = gl.cdiv(out_features, ROWS)
    first_token, first_row = gl.program_id(0) // row_tiles * TOKENS, gl.program_id(0) % row_tiles * ROWS
    token = first_token + gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    there = gl.expand_dims(token < tokens, 0) & gl.expand_dims(row < out_features, 1)
    at = sums + gl.expand_dims(token.to(gl.int64) * out_features, 0) + gl.expand_dims(row, 1)
    total = gl.load(at, mask=there, other=0)
    for _ in range(1, parts):
        at += tokens.to(gl.int64) * out_features
        total += gl.load(at, mask=there, other=0)
    result = with_terms(
        total, scales, out_scale, out_shift, bias, first_token, first_row, tokens, out_features,
        out_scale_step, out_shift_step, bias_step,
    )  # fmt: skip
    store(result, y, first_token, first_row, tokens, out_features)


@gluon.jit
def with_terms(
    total, scales, out_scale, out_shift, bias, first_token, first_row, tokens, out_features,
    out_scale_step, out_shift_step, bias_step, STEPS: gl.constexpr = True,
):  # fmt: skip
    """Return y^T of a tile (rows, tokens) from its sums; those of whole numbers were of signs 0 and 1.

    Without `scales` there are no steps, and no shifts; with `STEPS` false, steps are 1.
    """
    LAYOUT: gl.constexpr = total.type.layout
    token = first_token + gl.arange(0, total.shape[1], gl.SliceLayout(0, LAYOUT))
    row = first_row + gl.arange(0, total.shape[0], gl.SliceLayout(1, LAYOUT))
    there = row < out_features
    y = total.to(gl.float32)
    if scales is not None:
        scales += token
        apart = gl.cdiv(tokens, PADDED) * PADDED
        if total.dtype == gl.int32:
            y = y * gl.expand_dims(2 * gl.load(scales), 0) + gl.expand_dims(gl.load(scales + 3 * apart), 0)
        elif STEPS:
            y *= gl.expand_dims(gl.load(scales), 0)
    if out_scale is not None:
        scale = gl.load(out_scale + row * out_scale_step, mask=there, other=0.0).to(gl.float32)
        y *= gl.expand_dims(scale, 1)
    if out_shift is not None:  # with scales
        shift = gl.load(out_shift + row * out_shift_step, mask=there, other=0.0).to(gl.float32)
        y += gl.expand_dims(shift, 1) * gl.expand_dims(gl.load(scales + apart), 0)
    if scales is not None:
        y += gl.expand_dims(gl.load(scales + 2 * apart), 0)
    if bias is not None:
        y += gl.expand_dims(gl.load(bias + row * bias_step, mask=there, other=0.0).to(gl.float32), 1)
    return y


@gluon.constexpr_function
def stored_layout(warps):
    """Return a layout (rows, tokens) whose threads have rows that lie side by side in memory."""
    return gl.BlockedLayout([8, 1], [8, 4], [1, warps], [0, 1])


@gluon.jit
def store(result, to, first_token, first_row, tokens, out_features):
    """Write a tile (rows, tokens) to its place in (M, O)."""
    LAYOUT: gl.constexpr = result.type.layout
    token = first_token + gl.arange(0, result.shape[1], gl.SliceLayout(0, LAYOUT))
    row = first_row + gl.arange(0, result.shape[0], gl.SliceLayout(1, LAYOUT))
    to += gl.expand_dims(token.to(gl.int64) * out_features, 0) + gl.expand_dims(row, 1)
    there = gl.expand_dims(token < tokens, 0) & gl.expand_dims(row < out_features, 1)
    gl.store(to, result.to(to.dtype.element_ty), mask=there)
