"""The packed product for a token or two of many inputs by counts: two programs share rows, each has half the inputs.

What bounds a chain of launches is what they do after their wait: signs are there by then. So a program makes the planes
of its own inputs alone, and nothing is traded between the two but sums of rows, at the end. A warp has 16 words of each
row, and its numbers a step of their own: 2^-15 of the largest of its inputs, or a 127th for activations of 8 bits.

Nothing is loaded or stored by Triton's own operations: its plan for pairs gives up on kernels of this size. So it has
one store to look at, which never is.

A thread makes its byte of two words of every plane. See `triton_counts_gemv`, and its legend; warps are counted through
both programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.binary_linear.triton_counts import counted, four
from bimamba_lit.kernels.binary_linear.triton_pair_trades import open_room, row_of_pair, sums_of_pair, trade_halves
from bimamba_lit.kernels.binary_linear.triton_planes import (
    add_bytes,
    aligned,
    bytes_of,
    fetch,
    larger,
    load_eight,
    sum_of_warp,
    transposed,
    turned,
)
from bimamba_lit.kernels.binary_linear.triton_trades import largest_of_warp
from bimamba_lit.kernels.binary_linear.triton_word_counts import sums_of_warp
from bimamba_lit.kernels.binary_linear.triton_words import (
    BITS,
    aligned_words,
    begin_next,
    launch_early,
    overlaps,
    stride_of,
    wait_if,
)
from bimamba_lit.kernels.binary_weight.triton import NO_TERMS, Terms
from bimamba_lit.kernels.configurations import INTERPRETER, architecture, configuration

FEWEST_PAIRED = 8192  # inputs: of 7,168, one program makes the planes in the same time or less
ALIGNED = 128  # inputs, whose signs a thread loads at once


def pairs_fit(in_features: int, device: torch.device) -> bool:
    """Say whether two programs are faster, of rows for which counts do."""
    # Where programs reach each other's shared memory, and tensor cores count.
    paired = architecture(device) in ("sm_90", INTERPRETER)
    return paired and in_features >= FEWEST_PAIRED and in_features % ALIGNED == 0


def pairs_gemv(x: Tensor, signs: Tensor, digits: int, terms: Terms = NO_TERMS, bias: Tensor | None = None) -> Tensor:
    """Map x (M, I) to (M, O) as `counts_gemv` does, with I a multiple of ALIGNED."""
    tokens, in_features = x.shape
    out_features, words = signs.shape[0], in_features // BITS
    in_scale, out_scale, _, in_shift, out_shift = terms
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    chosen = configuration("binary_linear/counts_pairs", x.dtype, words, x.device)
    interpreted = architecture(x.device) == INTERPRETER
    pairs_kernel[(triton.cdiv(out_features, chosen.blocks["ROWS"]), tokens)](
        aligned_words(signs), *(aligned(values, in_features) for values in (x, in_scale, in_shift)), out_scale,
        out_shift, bias, *map(stride_of, (out_scale, out_shift, bias)), y, out_features, W=words, DIGITS=digits,
        SPLIT=2 * chosen.num_warps, PTX=not interpreted, PDL=overlaps(x.device), **launch_early(x.device),
        **chosen.launch(), **({} if interpreted else {"num_ctas": 2}),
    )  # fmt: skip
    return y


@triton.jit
def _four_words(at, inside, PTX: tl.constexpr):
    """Ask for four words from an address of a thread's own, or zeros."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{.reg .pred wanted; setp.ne.b32 wanted, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
            "mov.b32 $3, 0; @wanted ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];}",
            "=&r,=&r,=&r,=&r,l,r", [at.to(tl.uint64), inside.to(tl.int32)], (tl.int32,) * 4, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return four(tl.load(at[:, None] + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0), at.shape[0])


@triton.jit
def _ask(
    signs, first_row, out_features, zero, ROWS: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr, PTX: tl.constexpr
):
    """Ask for all words of ROWS rows: a thread's four of a row and of that 8 below, for each 16 rows.

    A program begins when one of the launch before the last ends, which is when those of the last ask for their inputs,
    and a burst of signs would hold these up. So most are asked for once the first have come, and not all at once.
    """
    FIRST: tl.constexpr = ROWS // 32
    LATER: tl.constexpr = ROWS * 5 // 64
    thread = tl.arange(0, 32 * SPLIT)
    word = thread // 32 * 16 + thread % 4 * 4
    words = ()
    for half in tl.static_range(ROWS // 8):
        if half == FIRST:
            word += words[0][0] & zero
        if half >= LATER:
            word += words[half - LATER][0] & zero
        row = first_row + 8 * half + thread % 32 // 4
        inside = (word < W) & (row < out_features)
        words = words + (_four_words(signs + row.to(tl.int64) * W + word, inside, PTX),)
    return words


@triton.constexpr_function
def term_text(DTYPE):
    """Return the text of `_term`: operands are the term, its address, whether it is there, and the other."""
    text = "{.reg .pred wanted; .reg .b16 half; setp.ne.b32 wanted, $2, 0; mov.b32 $0, $3; "
    match str(DTYPE):
        case "fp32":
            return text + "@wanted ld.global.b32 $0, [$1];}"
        case "bf16":
            return text + "@wanted ld.global.b16 half, [$1]; @wanted mov.b32 $0, {0, half};}"
        case _:
            return text + "@wanted ld.global.b16 half, [$1]; @wanted cvt.f32.f16 $0, half;}"


@triton.jit
def _term(at, row, step, there, OTHER: tl.constexpr, PTX: tl.constexpr):
    """Return a term of rows, float32, where there is one, and `OTHER` where it changes nothing."""
    other = tl.full([row.shape[0]], OTHER, tl.float32)
    if at is None:
        return other
    elif PTX:
        return tl.inline_asm_elementwise(
            term_text(at.dtype.element_ty), "=&r,l,r,r", [(at + row * step).to(tl.uint64), there.to(tl.int32), other],
            tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.load(at + row * step, mask=there, other=OTHER).to(tl.float32)


@triton.constexpr_function
def store_text(DTYPE):
    """Return the text of `_store`: operands are nothing, the address, what is stored, and whether."""
    kind = {"bf16": "bf16", "fp16": "f16"}[str(DTYPE)]
    return (
        "{.reg .pred wanted; .reg .b16 half; setp.ne.b32 wanted, $3, 0; "
        f"cvt.rn.{kind}.f32 half, $2; @wanted st.global.b16 [$1], half; mov.b32 $0, 0;}}"
    )


@triton.jit
def _store(at, value, there, PTX: tl.constexpr):
    """Store float32 numbers in 16 bits."""
    if PTX:
        tl.inline_asm_elementwise(
            store_text(at.dtype.element_ty), "=r,l,r,r", [at.to(tl.uint64), value, there.to(tl.int32)],
            tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(at, value.to(at.dtype.element_ty), mask=there)


@triton.jit
def _quarter(at, thread, part: tl.constexpr, W: tl.constexpr, PTX: tl.constexpr):
    """Load the 8 numbers that are a thread's quarter of a word's."""
    word = thread // 4 * 2 + part
    return load_eight(at + word * 32 + thread % 4 * 8, word < W, PTX)


@triton.jit
def _scaled_inputs(x, in_scale, in_shift, SUMS: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr, PTX: tl.constexpr):
    """Return a thread's inputs times `in_scale`: a quarter of two words of its warp's, 8 and 8.

    And the largest of its own, the bits of an integer, which those of what is not finite exceed; with SUMS, of its own,
    the sums of x and of x times `in_shift`.
    """
    thread = tl.arange(0, 32 * SPLIT)
    # What most layers have is asked for before any is used.
    scaled = _quarter(x, thread, 0, W, PTX) + _quarter(x, thread, 1, W, PTX)
    if in_scale is not None:
        scales = _quarter(in_scale, thread, 0, W, PTX) + _quarter(in_scale, thread, 1, W, PTX)
    largest = tl.zeros([32 * SPLIT], tl.float32)
    total, shifted = largest, largest
    if SUMS:
        for n in tl.static_range(16):
            total += scaled[n]
    if in_shift is not None:
        for part in tl.static_range(2):
            shifts = _quarter(in_shift, thread, part, W, PTX)
            for n in tl.static_range(8):
                shifted += scaled[8 * part + n] * shifts[n]
    if in_scale is not None:
        products = ()
        for n in tl.static_range(16):
            products = products + (scaled[n] * scales[n],)
        scaled = products
    for n in tl.static_range(16):
        largest = larger(largest, tl.abs(scaled[n]))
    return scaled, largest.to(tl.int32, bitcast=True), total, shifted


@triton.jit
def _number(scaled, inverse):
    """Return an integer of whose bits the lower 16 count: a float of this size has a step of 1."""
    return (scaled * inverse + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _made(scaled, inverse, DIGITS: tl.constexpr, PTX: tl.constexpr):
    """Return a thread's bytes of 8 planes, of both words and of their second digits; and the sum of its numbers."""
    own = ()
    for n in tl.static_range(8):
        own = own + (bytes_of(_number(scaled[n], inverse), _number(scaled[8 + n], inverse), 0x5140, PTX),)
    total = tl.zeros_like(own[0])
    if DIGITS == 2:
        for n in tl.static_range(8):
            total = add_bytes(total, own[n], 0x01010000, True, PTX)
        total = total << 8
    for n in tl.static_range(8):
        total = add_bytes(total, own[n], 0x00000101, DIGITS == 1, PTX)
    return transposed(own[0], own[1], own[2], own[3], own[4], own[5], own[6], own[7], PTX), total


@triton.jit
def pairs_kernel(
    signs, x, in_scale, in_shift, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, y,
    out_features, W: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write ROWS rows of the layer for a token, 16 at a time by SPLIT warps of two programs."""
    THREADS: tl.constexpr = 32 * SPLIT
    SUMS: tl.constexpr = in_shift is not None or out_shift is not None
    tl.static_assert(W <= 16 * SPLIT and ROWS <= THREADS)
    begin_next(PDL)
    token = tl.program_id(1).to(tl.int64)
    x += token * (32 * W)
    zero = tl.program_id(2)  # of one: the compiler does not know that
    words = _ask(signs, tl.program_id(0) * ROWS, out_features, zero, ROWS, W, SPLIT, PTX)
    room = open_room(ROWS, SPLIT, SUMS, PTX)
    if PDL:
        fetch(x, 32 * W, SPLIT)
        if in_scale is not None:
            fetch(in_scale, 32 * W, SPLIT)
        if in_shift is not None:
            fetch(in_shift, 32 * W, SPLIT)
    if PDL:
        wait_if(zero)
    scaled, largest, total, shifted = _scaled_inputs(x, in_scale, in_shift, SUMS, W, SPLIT, PTX)
    thread = tl.arange(0, THREADS)
    row = tl.program_id(0) * ROWS + row_of_pair(ROWS, SPLIT)
    there = row < out_features
    scale = _term(out_scale, row, out_scale_step, there, 1.0, PTX)
    shift = _term(out_shift, row, out_shift_step, there, 0.0, PTX)
    added = _term(bias, row, bias_step, there, 0.0, PTX)
    bits = largest_of_warp(largest, PTX)
    largest = bits.to(tl.float32, bitcast=True)
    limit: tl.constexpr = 127 if DIGITS == 1 else 127 * 256
    inverse = tl.where(largest > 1e-30, limit / tl.maximum(largest, 1e-30), 0.0)
    made, own = _made(scaled, inverse, DIGITS, PTX)
    taken = trade_halves(made, SPLIT, PTX)
    low = turned(taken[0], taken[1], taken[2], taken[3], PTX)
    high = turned(taken[4], taken[5], taken[6], taken[7], PTX)
    planes = ()
    for digit in tl.static_range(DIGITS):
        planes = planes + ((low[2 * digit], low[2 * digit + 1], high[2 * digit], high[2 * digit + 1]),)
    # Once in a row's sum, in the first column.
    column = thread % 4
    own = tl.where(column == 0, sum_of_warp(own, SPLIT, PTX), 0)
    parts = ()
    for tile in tl.static_range(ROWS // 16):
        parts = parts + counted(words, planes, tile, own, column, 1, DIGITS, PTX)
    length = tl.where(bits < 0x7F800000, largest / limit, float("nan"))
    if SUMS:
        lane = thread % 32
        either = sums_of_warp(total, total, shifted, shifted, lane, PTX)
        total, shifted = either, either
    result, total, shifted = sums_of_pair(parts, length, total, shifted, room, ROWS, SPLIT, SUMS, PTX)
    result = result * scale + added
    if in_shift is not None:
        result += shifted
    if out_shift is not None:
        result += shift * total
    SHARE: tl.constexpr = THREADS // ROWS
    never = tl.zeros([2 * THREADS], tl.int32) < zero
    tl.store(y + tl.arange(0, 2 * THREADS), 0.0, mask=never)
    _store(y + token * out_features + row, result, there & (thread % SHARE == 0), PTX)
