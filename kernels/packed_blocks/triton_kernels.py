"""The three launches of a block's step; see `binary_linear.triton_words` for how they follow one another.

`project`: norm, input projection, convolution and its activation, the convolution's state in place: every row of the
projection belongs to one channel, and every channel to one program. `scan`: a program has 32 rows of a head's state in
registers, moves them on in place, and leaves gated outputs as digits, the norm's gain and the next layer's scales
multiplied in. The norm's mean needs all heads, and is one factor of the whole product: `mix` applies it to sums, adds
the residual stream, and leaves the digits of its 32 rows for the next block's `project`, in the same way. `start` does
so for the first.

Products are counts of planes where SPLIT is given, and digits are planes then; see `binary_linear.triton_word_counts`.
Registers are few then, and a kernel lets the next begin only when its own wait has ended: a launch asks for its memory
while another works, and finds room on all processors alike, where several ahead would crowd some.

Legend: B batch, E inner width, H heads, P head width, N state size, W words of a row.
"""

import triton
import triton.language as tl

from bimamba_lit.kernels.binary_linear.triton_counts import ask, put
from bimamba_lit.kernels.binary_linear.triton_word_counts import multiply_planes, write_planes
from bimamba_lit.kernels.binary_linear.triton_words import (
    begin_next,
    load_terms,
    load_words,
    multiply,
    wait,
    wait_if,
    write_digits,
)
from bimamba_lit.kernels.pointwise import LOG2_E, sigmoid, softplus


@triton.jit
def _rows(ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """Return a program's rows as `_multiply` has them, and whether an element is the first of its row."""
    if SPLIT:
        each = tl.arange(0, 2 * ROWS * SPLIT)
    else:
        each = tl.arange(0, ROWS)
    return tl.program_id(0) * ROWS + each % ROWS, each < ROWS


@triton.jit
def _load(
    signs, rows, there, out_features, ROWS: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr
):
    if SPLIT:
        words = ask(signs, tl.program_id(0) * ROWS, out_features, ROWS, SPLIT, W)
        return put(words, tl.program_id(2), 2 * ROWS * SPLIT)
    else:
        return load_words(signs, rows, there, W, CHUNK)


@triton.jit
def _wait(SPLIT: tl.constexpr, PDL: tl.constexpr):
    if SPLIT:
        if PDL:
            wait_if(tl.program_id(2))  # what `put` has done stays above
        begin_next(PDL)
    else:
        wait(PDL)


@triton.jit
def _multiply(
    words, terms, rows, there, digits, scales, group_scale, in_shift, out_shift, groups, in_features, eps,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr, ALL: tl.constexpr, DIGITS: tl.constexpr,
    PTX: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    digits += token * (8 * DIGITS * W)
    scales += token * (5 * W)
    if SPLIT:
        return multiply_planes(
            words, terms, digits, scales, in_shift, out_shift, in_features, eps, ROWS, SPLIT, W, DIGITS, PTX
        )
    else:
        return multiply(
            words, terms, rows, there, digits, scales, group_scale, in_shift, out_shift, groups, in_features, eps,
            ROWS, CHUNK, W, ALL, DIGITS, True, PTX,
        )  # fmt: skip


@triton.jit
def project(
    signs, digits, scales, out_scale, group_scale, in_shift, out_shift, bias,
    out_scale_step, out_shift_step, bias_step, groups,
    conv_state, conv_weight, conv_bias, y, out_features, in_features, eps, inner, channels,
    state_b, state_c, state_t, weight_c, weight_t,
    TAPS: tl.constexpr, W: tl.constexpr, ALL: tl.constexpr, DIGITS: tl.constexpr, ROWS: tl.constexpr,
    PTX: tl.constexpr, PDL: tl.constexpr, CHUNK: tl.constexpr = 0, SPLIT: tl.constexpr = 0,
):  # fmt: skip
    """Write y (B, O) float32: z, the convolved and activated x, B and C, and dt."""
    if not SPLIT:
        begin_next(PDL)
    rows, one = _rows(ROWS, SPLIT)
    token = tl.program_id(1).to(tl.int64)
    there = rows < out_features
    words = _load(signs, rows, there, out_features, ROWS, W, CHUNK, SPLIT)
    terms = load_terms(
        rows, there, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, rows.shape[0]
    )
    channel = rows - inner
    convolved = (channel >= 0) & (channel < channels)
    past = conv_state + token * state_b + channel * state_c
    tap = conv_weight + channel * weight_c
    total = tl.zeros_like(rows).to(tl.float32)
    if conv_bias is not None:
        total += tl.load(conv_bias + channel, mask=convolved, other=0.0).to(tl.float32)
    before = ()
    for t in tl.static_range(TAPS - 1):
        before = before + (tl.load(past + t * state_t, mask=convolved, other=0.0),)
        total += before[t].to(tl.float32) * tl.load(tap + t * weight_t, mask=convolved, other=0.0).to(tl.float32)
    last_tap = tl.load(tap + (TAPS - 1) * weight_t, mask=convolved, other=0.0).to(tl.float32)
    _wait(SPLIT, PDL)
    result = _multiply(
        words, terms, rows, there, digits, scales, group_scale, in_shift, out_shift, groups, in_features, eps,
        ROWS, CHUNK, W, ALL, DIGITS, PTX, SPLIT,
    )  # fmt: skip
    new = result.to(conv_state.dtype.element_ty)
    total += new.to(tl.float32) * last_tap
    # Warps hold copies of the same rows: all have read the past before one writes.
    tl.debug_barrier()
    for t in tl.static_range(TAPS - 2):
        tl.store(past + t * state_t, before[t + 1], mask=convolved & one)
    tl.store(past + (TAPS - 2) * state_t, new, mask=convolved & one)
    result = tl.where(convolved, total * sigmoid(total), result)
    tl.store(y + token * out_features + rows, result, mask=there & one)


@triton.jit
def start(
    x, x_b, x_d, norm_weight, in_scale, in_shift, bitmap, digits, scales, norm_step, in_scale_step, in_shift_step,
    inputs, shifted_inputs, W: tl.constexpr, DIGITS: tl.constexpr, COPIES: tl.constexpr, PTX: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write the digits of 32 inputs x (B, D) of the first block's `project`."""
    wait(PDL)
    begin_next(PDL)
    word = tl.program_id(0)
    steps = (norm_step, in_scale_step, in_shift_step)
    targets = load_targets(norm_weight, in_scale, in_shift, bitmap, word, inputs, shifted_inputs, steps, W, COPIES)
    value = tl.load(x + tl.program_id(1).to(tl.int64) * x_b + (word * 32 + tl.arange(0, 32)) * x_d)
    write_word(_copied(value.to(tl.float32), COPIES), targets, digits, scales, W, DIGITS, COPIES, PTX)


@triton.jit
def scan(
    projected, state, dt_bias, A_log, D, out_features, state_b, state_h, state_p, state_n, dt_bias_h, A_h, D_h,
    gated_weight, in_scale, in_shift, bitmap, digits, scales, gated_step, in_scale_step, in_shift_step,
    inner, shifted_inputs, P: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr,
    DIGITS: tl.constexpr, COPIES: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Advance 32 rows of a head's state (B, H, P, N) in place, and write the digits and scales of their outputs."""
    if COPIES == 1:
        begin_next(PDL)
    word = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    head = word * 32 // P
    e = word * 32 + tl.arange(0, 32)
    # By columns, so that a thread has several of few rows, and sums of rows are short.
    COLUMNS: tl.constexpr = BLOCK_N if BLOCK_N < 32 else 32
    n = tl.arange(0, COLUMNS)
    at = state + token * state_b + head * state_h + (e - head * P)[:, None] * state_p
    before = ()
    for first in tl.static_range(0, BLOCK_N, COLUMNS):
        real = (first + n < N)[None, :]
        before = before + (tl.load(at + (first + n)[None, :] * state_n, mask=real, other=0.0),)
    rate = -tl.exp2(tl.load(A_log + head * A_h).to(tl.float32) * LOG2_E) * LOG2_E
    bias = tl.load(dt_bias + head * dt_bias_h).to(tl.float32)
    skip = tl.load(D + head * D_h).to(tl.float32)
    steps = (gated_step, in_scale_step, in_shift_step)
    targets = load_targets(gated_weight, in_scale, in_shift, bitmap, word, inner, shifted_inputs, steps, W, COPIES)
    wait(PDL)
    if COPIES > 1:
        begin_next(PDL)
    projected += token * out_features
    z = tl.load(projected + e)
    x = tl.load(projected + inner + e)
    maps = ()
    for first in tl.static_range(0, BLOCK_N, COLUMNS):
        at_map, real = projected + 2 * inner + first + n, first + n < N
        maps = maps + ((tl.load(at_map, mask=real, other=0.0), tl.load(at_map + N, mask=real, other=0.0)),)
    # The other loads are asked for before the one that all else waits for: the compiler keeps them above a barrier.
    tl.debug_barrier()
    step = softplus(tl.load(projected + 2 * inner + 2 * N + head) + bias)
    decay, added = tl.exp2(step * rate), step * x
    products = tl.zeros([32, COLUMNS], tl.float32)
    for part in tl.static_range(len(before)):
        into, out = maps[part]
        after = decay * before[part] + added[:, None] * into[None, :]
        column = part * COLUMNS + n
        tl.store(at + column[None, :] * state_n, after, mask=(column < N)[None, :])
        products += after * out[None, :]
    gated = (tl.sum(products, 1) + skip * x) * z * sigmoid(z)
    write_word(_copied(gated, COPIES), targets, digits, scales, W, DIGITS, COPIES, PTX)


@triton.jit
def _copied(x, COPIES: tl.constexpr):
    """Return 32 inputs again for each of COPIES."""
    return tl.reshape(tl.broadcast_to(x[None, :], [COPIES, 32]), [COPIES * 32])


@triton.jit
def load_targets(
    norm_weight, in_scale, in_shift, bitmap, word, inputs, shifted_inputs, steps, W: tl.constexpr, COPIES: tl.constexpr
):
    """Return where `write_word` is to write a word of 32 inputs: its place, whether, and its gains there.

    A word with a second sign, by `bitmap`, is written again behind all `inputs`, in the order of such words.
    """
    lane = tl.arange(0, 32 * COPIES) % 32
    i = word * 32 + lane
    targets = ((word, word < W, load_gains(norm_weight, in_scale, in_shift, i, i, inputs, steps)),)
    if bitmap is not None:
        w = tl.arange(0, triton.next_power_of_2(W))
        twice = (tl.load(bitmap + w // 8, mask=w <= word, other=0).to(tl.int32) >> (w % 8)) & 1
        place = inputs // 32 + tl.sum(tl.where(w < word, twice, 0), 0)
        again = tl.sum(tl.where(w == word, twice, 0), 0) == 1
        j = tl.where(again, place, word) * 32 + lane
        gains = load_gains(norm_weight, in_scale, in_shift, i, j, shifted_inputs, steps)
        targets = targets + ((place, again, gains),)
    return targets


@triton.jit
def load_gains(norm_weight, in_scale, in_shift, i, j, shifted_inputs, steps):
    """Return, of inputs i, a norm's gain, and that times `in_scale` and `in_shift` of inputs j, float32.

    Only the first inputs have a shift.
    """
    gain = tl.load(norm_weight + i * steps[0]).to(tl.float32)
    scaled, shift = gain, gain
    if in_scale is not None:
        scaled = gain * tl.load(in_scale + j * steps[1]).to(tl.float32)
    if in_shift is not None:
        shift = gain * tl.load(in_shift + j * steps[2], mask=j < shifted_inputs, other=0.0).to(tl.float32)
    return gain, scaled, shift


@triton.jit
def write_word(
    x, targets, digits, scales, W: tl.constexpr, DIGITS: tl.constexpr, COPIES: tl.constexpr, PTX: tl.constexpr
):
    """Write the digits and scales of a word's 32 inputs x; or the planes, where there are COPIES, one a warp.

    A warp of its own for each copy keeps sums over the inputs from waiting for other warps. What is written again is
    left out of the norm's mean, which takes every input once.
    """
    token = tl.program_id(1).to(tl.int64)
    digits += token * (8 * DIGITS * W)
    scales += token * (5 * W)
    for target in tl.static_range(len(targets)):
        word, there, gains = targets[target]
        gain, scaled, shift = gains
        value = x if target == 0 else tl.zeros_like(x)
        if COPIES > 1:
            write_planes(value, x * gain, x * scaled, x * shift, word, there, digits, scales, W, DIGITS, PTX)
        else:
            w = word + tl.arange(0, 1)
            # Reshaped, not broadcast: the layout, and with it where sums are taken, stays what it is.
            write_digits(
                tl.reshape(value, [1, 32]), tl.reshape(x * gain, [1, 32]), tl.reshape(x * scaled, [1, 32]),
                tl.reshape(x * shift, [1, 32]), w, there & (w < W), digits, scales, W, 1, DIGITS,
            )  # fmt: skip


@triton.jit
def mix(
    signs, digits, scales, out_scale, group_scale, in_shift, out_shift, bias,
    out_scale_step, out_shift_step, bias_step, groups, x, y, out_features, in_features, eps, x_b, x_d,
    next_norm, next_scale, next_shift, next_bitmap, next_digits, next_scales, norm_step, next_scale_step,
    next_shift_step, next_inputs, next_shifted_inputs,
    NEXT: tl.constexpr, W: tl.constexpr, ALL: tl.constexpr, DIGITS: tl.constexpr, COPIES: tl.constexpr,
    PTX: tl.constexpr, PDL: tl.constexpr, CHUNK: tl.constexpr = 0, SPLIT: tl.constexpr = 0,
):  # fmt: skip
    """Write y (B, O), x and the output projection of the normed digits; and, before a block, y's own digits."""
    if not SPLIT:
        begin_next(PDL)
    word = tl.program_id(0)
    rows, one = _rows(32, SPLIT)
    token = tl.program_id(1).to(tl.int64)
    there = rows < out_features
    words = _load(signs, rows, there, out_features, 32, W, CHUNK, SPLIT)
    terms = load_terms(
        rows, there, out_scale, out_shift, bias, out_scale_step, out_shift_step, bias_step, rows.shape[0]
    )
    if next_norm is not None:
        steps = (norm_step, next_scale_step, next_shift_step)
        targets = load_targets(
            next_norm, next_scale, next_shift, next_bitmap, word, next_inputs, next_shifted_inputs, steps, NEXT, COPIES
        )
    _wait(SPLIT, PDL)
    residual = tl.load(x + token * x_b + rows * x_d, mask=there, other=0.0).to(tl.float32)
    result = _multiply(
        words, terms, rows, there, digits, scales, group_scale, in_shift, out_shift, groups, in_features, eps,
        32, CHUNK, W, ALL, DIGITS, PTX, SPLIT,
    )  # fmt: skip
    new = (residual + result).to(y.dtype.element_ty)
    tl.store(y + token * out_features + rows, new, mask=there & one)
    if next_norm is not None:
        write_word(new.to(tl.float32), targets, next_digits, next_scales, NEXT, DIGITS, COPIES, PTX)
