"""The packed linear layer for hundreds of tokens and more on Hopper, by its sparse tensor cores: twice the dense rate.

Of two inputs a and b a row of signs takes +-(a + b) where its two signs are equal, and +-(a - b) where they differ. So
where tokens are given as sums and differences of pairs, every row of weights has one number, 1 or -1, of every two:
what Hopper calls 2:4 sparse, exactly, whatever the signs are. One launch writes the pairs; tokens are rounded once.

As in `triton_hopper_many`, one warp copies and groups of four warps multiply 64 rows each. Triton has no sparse
product, so the product of a step is written here: signs become numbers, and their places, in registers.

Legend: M tokens, O out features, I in features.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from bimamba_lit.kernels.binary_linear.triton_gemv import step_of
from bimamba_lit.kernels.binary_linear.triton_hopper import barrier, place_of, product_layout
from bimamba_lit.kernels.binary_linear.triton_hopper_many import (
    INPUTS,
    ROWS,
    blocks_of,
    fastest,
    finish,
    next_slot,
    tiles_of,
)
from bimamba_lit.kernels.binary_linear.triton_rounding import empty_scales
from bimamba_lit.kernels.binary_linear.triton_words import aligned_words, begin_next, launch_early, overlaps, wait
from bimamba_lit.kernels.binary_weight.triton import Terms
from bimamba_lit.kernels.configurations import Configuration, configuration, multiprocessors

# Names of configurations, and what a tile takes next to a long one of as many numbers (measured on an H100).
COSTS = {"sparse_long": 1.0, "sparse_wide": 1.06}


def binary_gemm_hopper_sparse(x: Tensor, signs: Tensor, in_features: int, terms: Terms, bias: Tensor | None) -> Tensor:
    """Map x (M, I) of 16 bits to (M, O) in x's dtype; I a multiple of `INPUTS`, no group scales."""
    tokens, out_features = x.shape[0], signs.shape[0]
    _, out_scale, _, _, out_shift = terms
    numbers, scales = pairs(x, terms)
    chosen = chosen_for(tokens, out_features, x.dtype, x.device)
    blocks = chosen.blocks
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    tiles = tiles_of(tokens, out_features, chosen)
    _sparse_kernel[(min(tiles, multiprocessors(x.device)),)](
        blocks_of(numbers, [blocks["TOKENS"], INPUTS]), blocks_of(aligned_words(signs), [ROWS, INPUTS // 32]),
        scales, out_scale, out_shift, bias,
        y, blocks_of(y, [blocks["PIECE"], ROWS]) if out_features % 8 == 0 else None,
        tokens, out_features, in_features, tiles, step_of(out_scale), step_of(out_shift), step_of(bias),
        STEPS=_steps(x), PDL=overlaps(x.device), **launch_early(x.device), **chosen.launch(),
    )  # fmt: skip
    return y


def fill(tokens: int, out_features: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the share of processors that have a tile, over the rounds that tiles take."""
    return fastest(COSTS, tokens, out_features, dtype, device)[1]


def chosen_for(tokens: int, out_features: int, dtype: torch.dtype, device: torch.device) -> Configuration:
    """Return the configuration that a product is launched with."""
    return fastest(COSTS, tokens, out_features, dtype, device)[0]


def _steps(x: Tensor) -> bool:
    """Return whether pairs are in steps of their token's largest: float16 could not hold their sums."""
    return x.dtype == torch.float16


def pairs(x: Tensor, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """Return sums and differences of pairs (M, I); steps, sums of x and of `in_shift` times x (4, M padded) if any."""
    in_scale, _, _, in_shift, out_shift = terms
    tokens, in_features = x.shape
    x = x.contiguous() if x.storage_offset() % 8 == 0 else x.clone(memory_format=torch.contiguous_format)
    numbers = torch.empty_like(x)
    scales: Tensor | None = None
    if _steps(x) or in_shift is not None or out_shift is not None:
        scales = empty_scales(tokens, x.device)
    chosen = configuration("binary_linear/sparse_pairs", x.dtype, in_features, x.device)
    _pairs_kernel[(triton.cdiv(tokens, chosen.blocks["TOKENS"]),)](
        x, in_scale, in_shift, numbers, scales, tokens, 0 if scales is None else scales.shape[1], step_of(in_scale),
        step_of(in_shift), INPUTS=in_features, STEPS=_steps(x), TOTALS=out_shift is not None, PDL=overlaps(x.device),
        **chosen.launch(),
    )  # fmt: skip
    return numbers, scales


@gluon.constexpr_function
def _pairs_layout(tokens, warps):
    """Return a layout (tokens, chunks, 4, 16) of which a thread has the same 8 of each 16: whole pairs."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 2, 0]]
    registers += [[1 << k, 0, 0, 0] for k in range(tokens.bit_length() - 1)]
    chunks = [[0, 1 << k, 0, 0] for k in range((16 * warps).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        registers, [[0, 0, 0, 8], *chunks[:4]], chunks[4:], [], [tokens, 16 * warps, 4, 16]
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
def _pairs_kernel(
    x, in_scale, in_shift, numbers, scales, tokens, padded, in_scale_step, in_shift_step, INPUTS: gl.constexpr,
    STEPS: gl.constexpr, TOTALS: gl.constexpr, PDL: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Write the pairs of TOKENS tokens, in the order in which signs unpack fast, and what is known of the tokens.

    Of 64 inputs, two words of signs, input p and input p + 32 are a pair; with p = 16 h + 4 c + k its sum is at
    16 k + 4 c + 2 h, and its difference after that. STEPS brings inputs to steps of a 127th of their token's largest.
    All of a token is asked for at once, and stays in registers.
    """
    begin_next(PDL)
    CHUNKS: gl.constexpr = 16 * gl.num_warps()
    STRETCHES: gl.constexpr = (INPUTS + 64 * CHUNKS - 1) // (64 * CHUNKS)
    LAYOUT: gl.constexpr = _pairs_layout(TOKENS, gl.num_warps())
    OF_TOKEN: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT)))
    token = gl.program_id(0) * TOKENS + gl.arange(0, TOKENS, OF_TOKEN)
    there = token < tokens
    at = gl.minimum(token, tokens - 1).to(gl.int64)[:, None, None, None] * INPUTS
    place = _places(CHUNKS, LAYOUT)
    read = ()
    for stretch in gl.static_range(STRETCHES):
        i = stretch * 64 * CHUNKS + place
        tile = gl.load(x + at + i, mask=i < INPUTS, other=0.0, eviction_policy="evict_first")
        read += (tile,)  # type: ignore[assignment]

    total = _own(gl.zeros([TOKENS, CHUNKS, 4, 16], gl.float32, LAYOUT))
    shift = total
    largest = total
    for stretch in gl.static_range(STRETCHES):
        i = stretch * 64 * CHUNKS + place
        value = read[stretch].to(gl.float32)  # type: ignore[var-annotated]
        if STEPS or TOTALS:
            total += _own(value)
        if in_shift is not None:
            shift += _own(value * _of_inputs(in_shift, i, in_shift_step, INPUTS))
        if STEPS:
            if in_scale is not None:
                value *= _of_inputs(in_scale, i, in_scale_step, INPUTS)
            largest = gl.maximum(largest, _own(gl.abs(value), True))
    if scales is not None:
        total = _of_token(total, OF_TOKEN)
        gl.store(scales + padded + token, total, mask=there)
        gl.store(scales + 2 * padded + token, _of_token(shift, OF_TOKEN), mask=there)
    if STEPS:
        largest = _of_token(largest, OF_TOKEN, True)
        step = gl.where(gl.abs(total) < float("inf"), largest / 127, float("nan"))
        gl.store(scales + token, step, mask=there)
        inverse = gl.where(largest > 1e-30, 127 / gl.maximum(largest, 1e-30), 0.0)[:, None, None, None]

    for stretch in gl.static_range(STRETCHES):
        i = stretch * 64 * CHUNKS + place
        value = read[stretch].to(gl.float32)
        if in_scale is not None:
            value *= _of_inputs(in_scale, i, in_scale_step, INPUTS)
        if STEPS:
            value *= inverse
        first, second = gl.split(gl.permute(gl.reshape(value, [TOKENS, CHUNKS, 2, 2, 4, 4]), [0, 1, 5, 4, 3, 2]))
        both = gl.reshape(gl.join(first + second, first - second), [TOKENS, CHUNKS, 4, 16])
        both = gl.convert_layout(both.to(numbers.dtype.element_ty), LAYOUT, assert_trivial=True)
        gl.store(numbers + at + i, both, mask=there[:, None, None, None] & (i < INPUTS))


@gluon.jit
def _of_inputs(term, i, step, INPUTS: gl.constexpr):
    return gl.load(term + i * step, mask=i < INPUTS, other=0.0).to(gl.float32)


@gluon.constexpr_function
def _product_text(kind, tokens, group):
    """Return the text of a step's product: operands are sums, the same again, and where the step begins.

    Threads of a quad have rows r and r + 8 in common. A thread t makes, of two words of each, four times two pairs'
    numbers, of bits 4 t + k and 4 t + k + 16 of the first: k = 0, 1 for 32 inputs and k = 2, 3 for 32 more. Which of a
    pair's sum and difference they belong to, it makes for four groups at bits 4 c + t: those of the first 32 inputs
    are asked of threads 0 and 1, those of the others of threads 2 and 3.
    """
    name, ones = ("bf16", "0x3F803F80") if kind == gl.bfloat16 else ("f16", "0x3C003C00")
    sums = tokens // 2
    operands = ", ".join(f"${n}" for n in range(sums))
    words_at = 256 * tokens + 1024 * group
    text = f"""{{
    .reg .b32 at, thread, lane, up, down, place, rest, wa0, wa1, wa2, wa3, wb0, wb1, wb2, wb3;
    .reg .b32 differs, other, low, high; .reg .b32 left<16>; .reg .b32 chosen<2>; .reg .b64 right<4>;
    mov.u32 at, global_smem; add.u32 at, at, ${2 * sums};
    mov.u32 thread, %tid.x; and.b32 lane, thread, 3;
    shl.b32 up, lane, 2; sub.u32 up, 12, up; sub.u32 down, 2, lane;
    and.b32 place, thread, 96; shl.b32 place, place, 3; add.u32 place, place, at;
    and.b32 rest, thread, 28; shl.b32 rest, rest, 2; add.u32 place, place, rest;
    ld.shared.v4.b32 {{wa0, wa1, wa2, wa3}}, [place + {words_at}];
    ld.shared.v4.b32 {{wb0, wb1, wb2, wb3}}, [place + {words_at + 128}];
    shr.u32 at, at, 4; or.b32 at, at, 0x10000;
    """
    for half in range(2):
        a, b = f"wa{2 * half}", f"wb{2 * half}"
        text += f"""
        xor.b32 differs, {a}, wa{2 * half + 1}; xor.b32 other, {b}, wb{2 * half + 1};
        prmt.b32 low, differs, other, 0x5410; prmt.b32 high, differs, other, 0x7632;
        shr.u32 low, low, lane; shf.l.wrap.b32 high, high, high, down;
        lop3.b32 low, low, high, 0x33333333, 0xE4; and.b32 low, low, 0x55555555; or.b32 chosen{half}, low, 0x88888888;
        shl.b32 {a}, {a}, up; shl.b32 {b}, {b}, up;
        """
        for k in range(4):
            for row, word in enumerate((a, b)):
                to = f"left{8 * half + 2 * k + row}"
                text += f"shl.b32 rest, {word}, {3 - k}; lop3.b32 {to}, rest, 0x80008000, {ones}, 0xA6;\n"
        for part in range(2):
            text += f"add.u32 rest, at, {(half * tokens * 128 + part * 64) // 16}; "
            text += f"mov.b64 right{2 * half + part}, {{rest, 0x40000040}};\n"
    text += "wgmma.fence.sync.aligned;\n"
    for part in range(4):
        left = ", ".join(f"left{4 * part + n}" for n in range(4))
        text += f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{name}.{name} {{{operands}}}, {{{left}}}, "
        text += f"right{part}, chosen{part // 2}, {part % 2}, 1, 1, 1, 0;\n"
    return text + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n}"


@gluon.constexpr_function
def _product_operands(tokens):
    sums = tokens // 2
    return ",".join(["=f"] * sums + [str(n) for n in range(sums)] + ["r"] * sums)


@gluon.jit
def _product(acc, at, KIND: gl.constexpr, GROUP: gl.constexpr):
    """Add the product of a step's tokens and the words of 64 of its rows; the step is `at` bytes into the memory."""
    TOKENS: gl.constexpr = acc.shape[1]
    TEXT: gl.constexpr = _product_text(KIND, TOKENS, GROUP)
    at = gl.full([64, TOKENS], at, gl.int32, acc.type.layout)
    return gl.inline_asm_elementwise(
        TEXT, _product_operands(TOKENS), [acc, at], dtype=gl.float32, is_pure=False, pack=TOKENS // 2
    )


@gluon.jit
def _check_place(line):
    """Stop unless a line of memory is where all shared memory begins, as `_product` takes it to be."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    place = gl.arange(0, 256, LAYOUT)
    line.store(place)
    barrier()
    gl.inline_asm_elementwise(
        """{
        .reg .b32 at, found; .reg .pred wrong;
        mov.u32 at, global_smem; mad.lo.u32 at, $1, 4, at; ld.shared.b32 found, [at];
        setp.ne.b32 wrong, found, $1; @wrong trap; mov.b32 $0, found;
        }""", "=r,r", [place], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    fence_async_shared()
    barrier()


@gluon.jit
def _copy(copied, TOKENS: gl.constexpr, GROUPS: gl.constexpr, NEAR: gl.constexpr, STAGES: gl.constexpr):
    """Ask for the tokens and words of every step of this program's tiles, as room for them comes free."""
    x, words, lines, full, empty, tokens, out_features, in_features, tiles = copied
    slot, phase = gl.to_tensor(0), gl.to_tensor(1)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_token, first_row = place_of(tile, tokens, out_features, TOKENS, 64 * GROUPS, NEAR)
        for first_input in range(0, in_features, 128):
            mbarrier.wait(empty.index(slot), phase)
            bar = full.index(slot)
            mbarrier.expect(bar, 256 * TOKENS + 1024 * GROUPS)
            line = slot * (TOKENS // 4 + GROUPS)
            to = lines.index(line)._reinterpret(x.dtype, [TOKENS, 128], x.layout)
            tma.async_copy_global_to_shared(x, [first_token, first_input], bar, to)
            for group in gl.static_range(GROUPS):
                to = lines.index(line + TOKENS // 4 + group)._reinterpret(gl.int32, [64, 4], words.layout)
                tma.async_copy_global_to_shared(words, [first_row + group * 64, first_input // 32], bar, to)
            slot, phase = next_slot(slot, phase, STAGES)


@gluon.jit
def _multiply(
    multiplied, STEPS: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr,
    GROUPS: gl.constexpr, NEAR: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Multiply and write 64 rows of every tile of this program."""
    (
        ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features, tiles,
        out_scale_step, out_shift_step, bias_step,
    ) = multiplied  # fmt: skip
    KIND: gl.constexpr = ys.dtype
    AT_ONCE: gl.constexpr = 64 if STEPS and TOKENS > 128 else 128  # tokens: what is known of them fits the registers
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_token, first_row = place_of(tile, tokens, out_features, TOKENS, 64 * GROUPS, NEAR)
        acc = gl.zeros([64, TOKENS], gl.float32, product_layout(KIND, TOKENS, 4))
        for _ in range(in_features // 128):
            mbarrier.wait(full.index(slot), phase)
            acc = _product(acc, slot * (256 * TOKENS + 1024 * GROUPS), KIND, GROUP)
            barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = next_slot(slot, phase, STAGES)
        finish(
            acc, scales, out_scale, out_shift, bias, y, y_blocks, ys, first_token, first_row + GROUP * 64, tokens,
            out_features, out_scale_step, out_shift_step, bias_step, STEPS, AT_ONCE, GROUP * BUFFERS, 0, BUFFERS,
        )  # fmt: skip
    if y_blocks is not None:
        tma.store_wait(0)


@gluon.jit
def _sparse_kernel(
    x, words, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features, tiles,
    out_scale_step, out_shift_step, bias_step, STEPS: gl.constexpr, TOKENS: gl.constexpr, GROUPS: gl.constexpr,
    NEAR: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, BUFFERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    # A step's tokens and after those its words, in lines of 1,024 bytes; the largest memory comes first.
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lines = gl.allocate_shared_memory(gl.int32, [STAGES * (TOKENS // 4 + GROUPS), 256], LINES)
    Y_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PIECE, 64], y.dtype.element_ty)
    ys = gl.allocate_shared_memory(y.dtype.element_ty, [GROUPS * BUFFERS, PIECE, 64], Y_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    _check_place(lines.index(0))
    wait(PDL)
    multiplied = (
        ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features, tiles,
        out_scale_step, out_shift_step, bias_step,
    )  # fmt: skip
    copied = (x, words, lines, full, empty, tokens, out_features, in_features, tiles)
    if GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (multiplied, STEPS, gl.constexpr(0), TOKENS, GROUPS, NEAR, STAGES, BUFFERS)),
            (_multiply, (multiplied, STEPS, gl.constexpr(1), TOKENS, GROUPS, NEAR, STAGES, BUFFERS)),
            (_copy, (copied, TOKENS, GROUPS, NEAR, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (multiplied, STEPS, gl.constexpr(0), TOKENS, GROUPS, NEAR, STAGES, BUFFERS)),
            (_multiply, (multiplied, STEPS, gl.constexpr(1), TOKENS, GROUPS, NEAR, STAGES, BUFFERS)),
            (_multiply, (multiplied, STEPS, gl.constexpr(2), TOKENS, GROUPS, NEAR, STAGES, BUFFERS)),
            (_copy, (copied, TOKENS, GROUPS, NEAR, STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(stage))
        mbarrier.invalidate(empty.index(stage))
