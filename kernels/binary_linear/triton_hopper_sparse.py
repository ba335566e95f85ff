"""The packed linear layer for hundreds of tokens and more on Hopper, by its sparse tensor cores: twice the dense rate.

Of two inputs a and b a row of signs takes +-(a + b) where its two signs are equal, and +-(a - b) where they differ. So
where tokens are given as sums and differences of pairs, every row of weights has one number, 1 or -1, of every two:
what Hopper calls 2:4 sparse, exactly, whatever the signs are. One launch writes the pairs; tokens are rounded once.

As in `triton_hopper_many`, one warp copies and groups of four warps multiply 64 rows each. Triton has no sparse
product, so the product of a step is written here: signs become numbers, and their places, in registers.

Legend: M tokens, O out features, I in features.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from bimamba_lit.kernels.binary_linear.triton_gemv import step_of
from bimamba_lit.kernels.binary_linear.triton_hopper import barrier, product_layout
from bimamba_lit.kernels.binary_linear.triton_hopper_many import (
    INPUTS,
    ROWS,
    Plan,
    blocks_of,
    finish,
    next_slot,
    pass_over,
    planned,
    registers_of,
    span_of,
    warps_of,
)
from bimamba_lit.kernels.binary_linear.triton_hopper_pairs import in_steps, pairs
from bimamba_lit.kernels.binary_linear.triton_words import aligned_words, launch_early, overlaps, wait
from bimamba_lit.kernels.binary_weight.triton import Terms
from bimamba_lit.kernels.configurations import Configuration, configuration, multiprocessors

# us of a step, in tiles of 1, 2, ... blocks of rows (measured on an H200).
COSTS = {"sparse_long": (0.85, 0.86), "sparse_wide": (0.5, 0.53, 0.66)}


def binary_gemm_hopper_sparse(x: Tensor, signs: Tensor, in_features: int, terms: Terms, bias: Tensor | None) -> Tensor:
    """Map x (M, I) of 16 bits to (M, O) in x's dtype; I a multiple of `INPUTS`, no group scales.

    x may have fewer inputs, a multiple of 8: those that are missing count as zeros.
    """
    tokens, out_features = x.shape[0], signs.shape[0]
    _, out_scale, _, _, out_shift = terms
    numbers, scales = pairs(x, in_features, terms)
    chosen, plan = fastest(tokens, out_features, in_features, x.dtype, x.device)
    blocks = chosen.blocks
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    _sparse_kernel[(min(plan.tiles, multiprocessors(x.device)),)](
        blocks_of(numbers, [blocks["TOKENS"], INPUTS]), blocks_of(aligned_words(signs), [ROWS, INPUTS // 32]),
        scales, out_scale, out_shift, bias,
        y, blocks_of(y, [blocks["PIECE"], ROWS]) if out_features % 8 == 0 else None,
        tokens, out_features, in_features, plan.row_tiles, plan.tiles, step_of(out_scale), step_of(out_shift),
        step_of(bias), STEPS=in_steps(x), PDL=overlaps(x.device), **launch_early(x.device), **chosen.launch(),
    )  # fmt: skip
    return y


def fastest(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> tuple[Configuration, Plan]:
    """Return the configuration that takes the least time, and how a product is cut for it."""
    found = []
    for name, costs in COSTS.items():
        chosen = configuration(f"binary_linear/{name}", dtype, tokens, device)
        cut = planned(tokens, out_features, in_features, chosen.blocks["TOKENS"], costs, multiprocessors(device))
        found.append((chosen, cut))
    return min(found, key=lambda choice: choice[1].time)


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
    x, words, lines, full, empty, tokens, out_features, in_features, row_tiles, tiles = copied
    slot, phase = gl.to_tensor(0), gl.to_tensor(1)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_token, first_row, _ = span_of(tile, tokens, out_features, row_tiles, TOKENS, NEAR)
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
        ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features,
        row_tiles, tiles, out_scale_step, out_shift_step, bias_step,
    ) = multiplied  # fmt: skip
    KIND: gl.constexpr = ys.dtype
    AT_ONCE: gl.constexpr = 32 if STEPS else 128  # tokens: what is known of them fits the registers
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_token, first_row, height = span_of(tile, tokens, out_features, row_tiles, TOKENS, NEAR)
        if GROUP < height:
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
        else:
            slot, phase = pass_over(full, empty, slot, phase, in_features, STAGES)
    if y_blocks is not None:
        tma.store_wait(0)


@gluon.jit
def _work(
    multiplied, copied, STEPS: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, GROUPS: gl.constexpr,
    NEAR: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """Do the work of a group of warps; after those that multiply comes the warp that copies."""
    if GROUP < GROUPS:
        _multiply(multiplied, STEPS, GROUP, TOKENS, GROUPS, NEAR, STAGES, BUFFERS)
    else:
        _copy(copied, TOKENS, GROUPS, NEAR, STAGES)


@gluon.jit
def _sparse_kernel(
    x, words, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features, row_tiles, tiles,
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
        ys, full, empty, scales, out_scale, out_shift, bias, y, y_blocks, tokens, out_features, in_features,
        row_tiles, tiles, out_scale_step, out_shift_step, bias_step,
    )  # fmt: skip
    copied = (x, words, lines, full, empty, tokens, out_features, in_features, row_tiles, tiles)
    gl.warp_specialize(
        [
            (_work, (multiplied, copied, STEPS, gl.constexpr(group), TOKENS, GROUPS, NEAR, STAGES, BUFFERS))
            for group in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        warps_of(GROUPS),
        registers_of(GROUPS),
    )
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(stage))
        mbarrier.invalidate(empty.index(stage))
