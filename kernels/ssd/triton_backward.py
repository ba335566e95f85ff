"""Triton kernels of the SSD backward pass, and their launches.

`carry_back` walks the gradients of the states from the end. Then everything is local to a chunk: `input_gradients`
gives those of x and of decays inside a chunk; `score_gradients` that of C B^T by the heads that a program serves;
`gradient_of_B` and `gradient_of_C` are products over all heads of a group, to which the share of C B^T is added, and
give what the state passes on of decays; `decay_gradients` goes from decays to dt, A and the bias. Sums over heads and
chunks have a fixed order, and there are no atomics.

With ``F_ij = dL/dM_ij * M_ij``, ``M_ij`` the weight of token j in the output of token i, a log decay gets the sum of F
over the pairs that it lies between. Row and column sums of one float32 F are added up within a chunk only, so that they
cancel exactly where they must.

Legend: as in `triton_forward`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.ssd.triton_forward import (
    DT,
    FROM_START,
    LOWEST,
    LOWEST_STEP,
    ORIGIN,
    PLANES,
    TO_END,
    TOTAL,
    Shape,
    block,
    bounded_exp2,
    load_tile,
    place,
    product,
    step_size,
    weight_of_input,
)
from bimamba_lit.kernels.sums import sum_parts


@triton.jit
def scores_of(
    B_rn, C_ptr, at, documents_ptr, C_l: tl.constexpr, C_n, left,
    MASKED: tl.constexpr, N: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return B C^T of R tokens and as many readers, that are `at` tokens later, zero where they must not read."""
    rows, columns = tl.arange(0, R), at + tl.arange(0, R)
    C_mn = load_tile(C_ptr, columns, tl.arange(0, BLOCK_N), C_l, C_n, left, N).to(B_rn.dtype)
    scores = product(B_rn, tl.trans(C_mn), None, PRECISION)
    scores = tl.where(rows[:, None] <= columns[None, :], scores, 0.0)
    if MASKED:
        here = tl.load(documents_ptr + rows, mask=rows < left, other=-1)
        there = tl.load(documents_ptr + columns, mask=columns < left, other=-1)
        scores = tl.where(here[:, None] == there[None, :], scores, 0.0)
    return scores


@triton.jit
def read_by(written, dx, x, origin, scores, dy, totals_ptr, read_ptr, R: tl.constexpr, PRECISION: tl.constexpr):
    """Add what R readers give to the tokens that they read, and write what they read."""
    columns = tl.arange(0, R)
    weights = bounded_exp2(tl.load(totals_ptr + columns)[None, :] - origin[:, None]) * scores
    flow = product(x, tl.trans(dy), None, PRECISION) * weights
    tl.store(read_ptr + columns, tl.sum(flow, 0))
    return written + tl.sum(flow, 1), product(weights.to(x.dtype), dy, dx, PRECISION)


@triton.jit
def gradients_by_head(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, decays_ptr, after_ptr, dx_ptr, dD_ptr, by_token_ptr,
    begin, end, left, decays_h,
    x_l: tl.constexpr, x_h, x_p, dy_l: tl.constexpr, dy_h, dy_p, B_l: tl.constexpr, B_n, C_l: tl.constexpr, C_n, D_h,
    D_p: tl.constexpr, dx_l: tl.constexpr,
    LATER: tl.constexpr, HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what `input_gradients` returns, of R tokens, which themselves read and, if LATER, the R tokens after them.

    Pointers are those of the first token and of head 0.
    """
    rows, p, n = tl.arange(0, R), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    dtype = x_ptr.dtype.element_ty
    # A program's heads share C B^T, in float32 registers.
    B_rn = load_tile(B_ptr, rows, n, B_l, B_n, left, N).to(dtype)
    scores = scores_of(B_rn, C_ptr, 0, documents_ptr, C_l, C_n, left, HAS_DOCUMENTS, N, R, BLOCK_N, PRECISION)
    if LATER:
        later_scores = scores_of(B_rn, C_ptr, R, documents_ptr, C_l, C_n, left, HAS_DOCUMENTS, N, R, BLOCK_N, PRECISION)
    for head in tl.range(begin, end, disable_licm=True):
        h = tl.cast(head, tl.int64)
        decays = decays_ptr + h * (decays_h * PLANES)
        by_token = by_token_ptr + h * (decays_h * 3)
        dt, to_end = tl.load(decays + DT * Q + rows), tl.load(decays + TO_END * Q + rows)
        origin = tl.load(decays + ORIGIN * Q + rows)
        x = load_tile(x_ptr + h * x_h, rows, p, x_l, x_p, left, P)
        after = load_tile(after_ptr + h * (P * N), n, p, 1, N, N, P)
        dy = load_tile(dy_ptr + h * dy_h, rows, p, dy_l, dy_p, left, P)
        dx = tl.zeros((R, BLOCK_P), tl.float32)
        if HAS_D:
            direct = dy.to(tl.float32)
            dx += weight_of_input(D_ptr + h * D_h, p, D_p, P) * direct
            tl.store(dD_ptr + h * P + p, tl.sum(x.to(tl.float32) * direct, 0), mask=p < P)
        written, dx = read_by(
            tl.zeros((R,), tl.float32), dx, x, origin, scores, dy, decays + TOTAL * Q, by_token + Q, R, PRECISION
        )
        if LATER:
            later_dy = load_tile(dy_ptr + h * dy_h, R + rows, p, dy_l, dy_p, left, P)
            written, dx = read_by(
                written, dx, x, origin, later_scores, later_dy, decays + TOTAL * Q + R, by_token + 2 * Q + R, R,
                PRECISION,
            )  # fmt: skip
        if dtype == tl.float32:  # whose products hold a left operand in registers: not over the whole loop
            B_rn = load_tile(B_ptr, rows, n, B_l, B_n, left, N)
        dx += product(B_rn, after, None, PRECISION) * (dt * to_end)[:, None]
        tl.store(by_token + rows, written / tl.maximum(dt, LOWEST_STEP))
        out = dx_ptr + h * P + rows[:, None] * dx_l + p[None, :]
        tl.store(out, dx.to(x.dtype), mask=(rows[:, None] < left) & (p[None, :] < P))


@triton.jit
def input_gradients_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, decays_ptr, after_ptr, dx_ptr, dD_ptr, by_token_ptr,
    length, heads, per_group, chunks, splits, heads_each,
    x_b, x_l: tl.constexpr, x_h, x_p, dy_b, dy_l: tl.constexpr, dy_h, dy_p, B_b, B_l: tl.constexpr, B_g, B_n,
    C_b, C_l: tl.constexpr, C_g, C_n, D_h, D_p: tl.constexpr, dx_b, dx_l: tl.constexpr,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what `input_gradients` returns, of R tokens of a chunk for some heads of a group.

    Tiles have the tokens that are read, j, in rows, and those that read them, i, in columns: the same R tokens,
    and for the first half of a chunk the later half, in a loop of its own that the pipeline can read ahead for. A
    token's step size is part of the exponent, so that what is written is divided by it at the end.
    """
    part, chunk, b, group, begin, end = place(heads, per_group, chunks, splits, heads_each, Q // R)
    mine = chunk.to(tl.int64) * Q + part * R
    left = length - chunk * Q - part * R
    B_ptr += b * B_b + mine * B_l + group * B_g
    C_ptr += b * C_b + mine * C_l + group * C_g
    if HAS_DOCUMENTS:
        documents_ptr += b * length + mine
    x_ptr += b * x_b + mine * x_l
    dy_ptr += b * dy_b + mine * dy_l
    dx_ptr += b * dx_b + mine * dx_l
    decays_ptr += (b * heads * chunks + chunk) * (PLANES * Q) + part * R
    by_token_ptr += (b * heads * chunks + chunk) * (3 * Q) + part * R
    after_ptr += (b * chunks + chunk) * heads * (P * N)
    if HAS_D:
        dD_ptr += ((b * chunks + chunk) * (Q // R) + part) * heads * P
    if Q > R:
        if part == 0:
            gradients_by_head(
                x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, decays_ptr, after_ptr, dx_ptr, dD_ptr, by_token_ptr,
                begin, end, left, chunks * Q, x_l, x_h, x_p, dy_l, dy_h, dy_p, B_l, B_n, C_l, C_n, D_h, D_p, dx_l,
                True, HAS_D, HAS_DOCUMENTS, P, N, Q, R, BLOCK_P, BLOCK_N, PRECISION,
            )  # fmt: skip
            return
    gradients_by_head(
        x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, decays_ptr, after_ptr, dx_ptr, dD_ptr, by_token_ptr,
        begin, end, left, chunks * Q, x_l, x_h, x_p, dy_l, dy_h, dy_p, B_l, B_n, C_l, C_n, D_h, D_p, dx_l,
        False, HAS_D, HAS_DOCUMENTS, P, N, Q, R, BLOCK_P, BLOCK_N, PRECISION,
    )  # fmt: skip


@triton.jit
def score_gradients_kernel(
    x_ptr, dy_ptr, decays_ptr, dscores_ptr,
    length, heads, per_group, chunks, splits, heads_each,
    x_b, x_l: tl.constexpr, x_h, x_p, dy_b, dy_l: tl.constexpr, dy_h, dy_p,
    P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of B C^T of a tile of a chunk, summed over some heads of a group.

    Tiles are R tokens that are read, in rows, by as many that read: the same, and for the first half the later half.
    """
    tile, chunk, b, group, begin, end = place(heads, per_group, chunks, splits, heads_each, 2 * (Q // R) - 1)
    read, reader = (tile == 2) * R, (tile > 0) * R
    rows, p = tl.arange(0, R), tl.arange(0, BLOCK_P)
    first = chunk.to(tl.int64) * Q
    left = length - chunk * Q
    total = tl.zeros((R, R), tl.float32)
    x_ptr += b * x_b + (first + read) * x_l
    dy_ptr += b * dy_b + (first + reader) * dy_l
    for head in tl.range(begin, end, disable_licm=True):
        h = tl.cast(head, tl.int64)
        decays = decays_ptr + ((b * heads + h) * chunks + chunk) * (PLANES * Q) + rows
        origin, there = tl.load(decays + ORIGIN * Q + read), tl.load(decays + TOTAL * Q + reader)
        x = load_tile(x_ptr + h * x_h, rows, p, x_l, x_p, left - read, P)
        dy = load_tile(dy_ptr + h * dy_h, p, rows, dy_p, dy_l, P, left - reader)
        total += product(x, dy, None, PRECISION) * bounded_exp2(there[None, :] - origin[:, None])
    groups = heads // per_group
    out = dscores_ptr + (
        ((b * chunks + chunk) * groups + group) * splits + (begin - group * per_group) // heads_each
    ) * (Q * Q)
    tl.store(out + (read + rows)[:, None] * Q + reader + rows[None, :], total)


@triton.jit
def shares_of_state(decays, REVERSE: tl.constexpr, Q: tl.constexpr):
    """Load by token the decay to the state after its chunk, or in reverse from that before it, and its step size."""
    if REVERSE:
        return tl.load(decays + FROM_START * Q), 1.0
    else:
        return tl.load(decays + TO_END * Q), tl.load(decays + DT * Q)


@triton.jit
def map_gradients_kernel(
    value_ptr, map_ptr, own_ptr, documents_ptr, decays_ptr, states_ptr, dscores_ptr, out_ptr, by_token_ptr,
    length, heads, per_group, chunks, splits,
    value_b, value_l: tl.constexpr, value_h, value_p, map_b, map_l, map_g, map_n,
    own_b, own_l, own_g, own_n, out_b, out_l,
    REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of B, or in reverse of C, of some tokens of a chunk and one group.

    Of B itself (own): values are x, states the gradients of those after the chunk, and maps C; and by token, its part
    in the state is written, without its step size. In reverse, of C: values are gradients of y, states those before
    the chunk, and maps B; and what a token reads from the state is written.
    """
    program = tl.program_id(0).to(tl.int64)
    groups = heads // per_group
    group, chunk, b = program % groups, program // groups % chunks, program // groups // chunks
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns, p = tl.arange(0, Q), tl.arange(0, BLOCK_P)
    first, left = chunk * Q, (length - chunk * Q).to(tl.int32)
    dtype = states_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    own = load_tile(own_ptr + b * own_b + first * own_l + group * own_g, rows, n, own_l, own_n, left, N)
    own = own.to(tl.float32)
    begin, end = group * per_group, (group + 1) * per_group
    decays_ptr += (b * heads * chunks + chunk) * (PLANES * Q) + rows
    each = chunks * (PLANES * Q)
    decay, step = shares_of_state(decays_ptr + begin * each, REVERSE, Q)
    for head in tl.range(begin, end, disable_licm=True):
        h = tl.cast(head, tl.int64)
        next_decay, next_step = shares_of_state(decays_ptr + tl.minimum(h + 1, end - 1) * each, REVERSE, Q)
        value = load_tile(value_ptr + b * value_b + first * value_l + h * value_h, rows, p, value_l, value_p, left, P)
        state = load_tile(states_ptr + ((b * chunks + chunk) * heads + h) * (P * N), p, n, N, 1, P, N)
        share = product(value, state, None, PRECISION)
        by_token = ((b * heads + h) * chunks + chunk) * tl.num_programs(2) + tl.program_id(2)
        tl.store(by_token_ptr + by_token * Q + rows, tl.sum(share * own, 1) * decay)
        total += share * (decay * step)[:, None]
        decay, step = next_decay, next_step
    # dscores are (programs, Q, Q), a token that is read in rows, and not written where it comes after its reader.
    if REVERSE:
        square, allowed = columns[None, :] * Q + rows[:, None], columns[None, :] <= rows[:, None]
    else:
        square, allowed = rows[:, None] * Q + columns[None, :], rows[:, None] <= columns[None, :]
    if HAS_DOCUMENTS:
        documents = documents_ptr + b * length + first
        here = tl.load(documents + rows, mask=rows < left, other=-1)
        there = tl.load(documents + columns, mask=columns < left, other=-1)
        allowed = allowed & (here[:, None] == there[None, :])
    dscores = tl.zeros((BLOCK_Q, Q), tl.float32)
    for split in range(splits):
        dscores += tl.load(dscores_ptr + (program * splits + split) * (Q * Q) + square, mask=allowed, other=0.0)
    mapped = load_tile(map_ptr + b * map_b + first * map_l + group * map_g, columns, n, map_l, map_n, left, N)
    total = product(dscores.to(dtype), mapped.to(dtype), total, PRECISION)
    out = out_ptr + b * out_b + first * out_l + group * N + rows[:, None] * out_l + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < left) & (n[None, :] < N))


@triton.jit
def decay_gradients_kernel(
    dt_ptr, A_ptr, bias_ptr, decays_ptr, by_token_ptr, lasting_ptr, read_ptr, passed_ptr, ddt_ptr, dA_ptr, dbias_ptr,
    length, heads, chunks, low, high, dt_b, dt_l, dt_h, ddt_b, ddt_l,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, STATE_BLOCKS: tl.constexpr,
    PASSED_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write the gradient of dt, and of A and the bias by chunk (B, c, H)."""
    b, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    rows, h = tl.arange(0, Q), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    left = length - chunk * Q
    there = h < heads
    inside = (rows[:, None] < left) & there[None, :]
    place_of_head = (b * heads + h).to(tl.int64) * chunks + chunk
    dt = tl.load(decays_ptr + (place_of_head * (PLANES * Q) + DT * Q)[None, :] + rows[:, None], mask=inside, other=0.0)
    by_token = by_token_ptr + (place_of_head * (3 * Q))[None, :] + rows[:, None]
    written = tl.load(by_token, mask=inside, other=0.0)
    read = tl.load(by_token + Q, mask=inside, other=0.0)
    if Q > R:
        read += tl.load(by_token + 2 * Q, mask=inside & (rows[:, None] >= R), other=0.0)
    through = tl.zeros((BLOCK_H,), tl.float32)
    for i in tl.static_range(STATE_BLOCKS):
        of_state = ((place_of_head * STATE_BLOCKS + i) * Q)[None, :] + rows[:, None]
        read += tl.load(read_ptr + of_state, mask=inside, other=0.0)
        lasting = tl.load(lasting_ptr + of_state, mask=inside, other=0.0)
        written += lasting
        through += tl.sum(dt * lasting, 0)
    for i in tl.static_range(PASSED_BLOCKS):
        through += tl.load(passed_ptr + place_of_head * PASSED_BLOCKS + i, mask=there, other=0.0)
    A = tl.load(A_ptr + h, mask=there, other=0.0)[None, :]
    crossing = tl.cumsum(read - dt * written, 0, reverse=True) + through[None, :]
    crossing = tl.where(dt * A >= LOWEST, crossing, 0.0)
    ddt = written + crossing * A

    source = dt_ptr + b.to(tl.int64) * dt_b + chunk.to(tl.int64) * Q * dt_l
    raw = load_tile(source, rows, h, dt_l, dt_h, left, heads).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + h, mask=there, other=0.0)[None, :]
    size = step_size(raw, float("-inf"), float("inf"), SOFTPLUS)
    ddt = tl.where(inside & (size >= low) & (size <= high), ddt, 0.0)
    if SOFTPLUS:
        ddt *= tl.sigmoid(tl.maximum(raw, -80.0))
    out = ddt_ptr + b.to(tl.int64) * ddt_b + chunk.to(tl.int64) * Q * ddt_l + rows[:, None] * ddt_l + h[None, :]
    tl.store(out, ddt.to(ddt_ptr.dtype.element_ty), mask=inside)
    sums = tl.program_id(0).to(tl.int64) * heads + h
    tl.store(dA_ptr + sums, tl.sum(tl.where(inside, crossing * dt, 0.0), 0), mask=there)
    if HAS_BIAS:
        tl.store(dbias_ptr + sums, tl.sum(ddt, 0), mask=there)


@triton.jit
def gate_gradients_kernel(
    dout_ptr, z_ptr, y_ptr, dy_ptr, dz_ptr, rows_in_all, length, heads,
    dout_b, dout_l, dout_h, dout_p, z_b, z_l, z_h, z_p, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write the gradients of y before its gate and of the gate z, from that of y silu(z)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    p = tl.arange(0, BLOCK_P)
    h, token = row % heads, row // heads
    t, b = token % length, token // length
    inside = (row < rows_in_all)[:, None] & (p < P)[None, :]
    dout = dout_ptr + (b * dout_b + t * dout_l + h * dout_h)[:, None] + p[None, :] * dout_p
    z = z_ptr + (b * z_b + t * z_l + h * z_h)[:, None] + p[None, :] * z_p
    out = row[:, None] * P + p[None, :]
    dout = tl.load(dout, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + out, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(z)
    tl.store(dy_ptr + out, (dout * z * sigmoid).to(dy_ptr.dtype.element_ty), mask=inside)
    dz = dout * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
    tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=inside)


class Destinations(NamedTuple):
    """Where the gradients of the inputs that have tokens go: shaped as these, all of a token side by side."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor

    @classmethod
    def of_their_own(cls, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> "Destinations":
        """Return new tensors for the gradients of those given."""
        return cls(*(t.new_empty(t.shape) for t in (x, dt, B, C)))


class InputGradients(NamedTuple):
    """What `input_gradients` found beside the gradient of x.

    Attributes:
        dD: By part of a chunk, (B * c * Q / R, H, P), or None.
        by_token: Sums of F over the readers of a token in its chunk, without its step size; over what it reads; and
            over what it reads in the first half of a chunk, where it is in the second (B, H, c, 3, Q).
    """

    dD: Tensor | None
    by_token: Tensor


def input_gradients(
    shape: Shape, x: Tensor, dy: Tensor, B: Tensor, C: Tensor, D: Tensor | None, documents: Tensor | None,
    decays: Tensor, after: Tensor, dx: Tensor,
) -> InputGradients:  # fmt: skip
    """Write the gradient of x; return that of D, and what those of dt, A and the bias need."""
    options = shape.launch("input_gradients", x)
    heads_each, splits = shape.split(options.pop("HEADS"), x.device)
    batch, heads, chunks, chunk = shape.batch, shape.heads, shape.chunks, shape.chunk
    parts = chunk // shape.part
    found = InputGradients(
        None if D is None else decays.new_empty(batch * chunks * parts, heads, shape.width),
        decays.new_empty(batch, heads, chunks, 3, chunk),
    )
    input_gradients_kernel[(shape.programs(splits),)](
        x, dy, B, C, D, documents, decays, after, dx, found.dD, found.by_token,
        shape.length, heads, heads // shape.groups, chunks, splits, heads_each, *x.stride(), *dy.stride(),
        *B.stride(), *C.stride(), *((0, 0) if D is None else D.stride()), *dx.stride()[:2], HAS_D=D is not None,
        HAS_DOCUMENTS=documents is not None, R=shape.part, **shape.constants, **options,
    )  # fmt: skip
    return found


def score_gradients(shape: Shape, x: Tensor, dy: Tensor, decays: Tensor) -> Tensor:
    """Return the gradient of B C^T by split of a group's heads (B, c, G, s, Q, Q), the later token in columns.

    Where it is not the later, there may be anything.
    """
    options = shape.launch("score_gradients", x)
    heads_each, splits = shape.split(options.pop("HEADS"), x.device)
    batch, chunks, chunk, groups = shape.batch, shape.chunks, shape.chunk, shape.groups
    out = decays.new_empty(batch, chunks, groups, splits, chunk, chunk)
    tiles = 2 * (chunk // shape.part) - 1
    score_gradients_kernel[(batch * chunks * groups * splits * tiles,)](
        x, dy, decays, out, shape.length, shape.heads, shape.heads // groups, chunks, splits, heads_each, *x.stride(),
        *dy.stride(), P=shape.width, Q=chunk, R=shape.part, BLOCK_P=block(shape.width), PRECISION=shape.precision,
        **options,
    )  # fmt: skip
    return out


def gradient_of_B(
    shape: Shape, x: Tensor, B: Tensor, C: Tensor, documents: Tensor | None, decays: Tensor, after: Tensor,
    dscores: Tensor, dB: Tensor,
) -> Tensor:  # fmt: skip
    """Write the gradient of B (B, L, G, N); return the sums of F over the state after the chunk as what C's returns.

    They are without the tokens' step sizes.
    """
    return _map_gradient(shape, x, C, B, documents, decays, after, dscores, dB, reverse=False)


def gradient_of_C(
    shape: Shape, dy: Tensor, B: Tensor, C: Tensor, documents: Tensor | None, decays: Tensor, before: Tensor,
    dscores: Tensor, dC: Tensor,
) -> Tensor:  # fmt: skip
    """Write the gradient of C (B, L, G, N); return what tokens read from the state, by block (B, H, c, blocks, Q)."""
    return _map_gradient(shape, dy, B, C, documents, decays, before, dscores, dC, reverse=True)


def _map_gradient(
    shape: Shape, values: Tensor, maps: Tensor, own: Tensor, documents: Tensor | None, decays: Tensor,
    states: Tensor, dscores: Tensor, out: Tensor, reverse: bool,
) -> Tensor:  # fmt: skip
    options = shape.launch("map_gradients", values)
    blocks = {"BLOCK_N": min(options["BLOCK_N"], block(shape.size)), "BLOCK_Q": min(options["BLOCK_Q"], shape.chunk)}
    constants = {**shape.constants, **options, **blocks}
    grid = (
        shape.batch * shape.chunks * shape.groups,
        shape.chunk // blocks["BLOCK_Q"],
        triton.cdiv(shape.size, blocks["BLOCK_N"]),
    )
    by_token = decays.new_empty(shape.batch, shape.heads, shape.chunks, grid[2], shape.chunk)
    map_gradients_kernel[grid](
        values, maps, own, documents, decays, states, dscores, out, by_token, shape.length, shape.heads,
        shape.heads // shape.groups, shape.chunks, dscores.shape[3], *values.stride(), *maps.stride(), *own.stride(),
        *out.stride()[:2], REVERSE=reverse, HAS_DOCUMENTS=documents is not None, **constants,
    )  # fmt: skip
    return by_token


def decay_gradients(
    shape: Shape, dt: Tensor, A: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float],
    decays: Tensor, found: InputGradients, lasting: Tensor, read: Tensor, passed: Tensor, ddt: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Write the gradient of dt (B, L, H); return those of A (H,) and the bias (H,)."""
    options = shape.launch("decays", dt)
    dA = dt.new_empty(shape.batch * shape.chunks, shape.heads, dtype=torch.float32)
    dbias = None if dt_bias is None else torch.empty_like(dA)
    grid = (shape.batch * shape.chunks, triton.cdiv(shape.heads, options["BLOCK_H"]))
    decay_gradients_kernel[grid](
        dt, A, dt_bias, decays, found.by_token, lasting, read, passed, ddt, dA, dbias, shape.length, shape.heads,
        shape.chunks, *limit, *dt.stride(), *ddt.stride()[:2], SOFTPLUS=softplus, HAS_BIAS=dt_bias is not None,
        Q=shape.chunk, R=shape.part, STATE_BLOCKS=read.shape[3], PASSED_BLOCKS=passed.shape[3], **options,
    )  # fmt: skip
    return sum_parts(dA), None if dbias is None else sum_parts(dbias)


def gate_gradients(shape: Shape, dout: Tensor, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y before its gate, in y's dtype, and of z, from that of ``y * silu(z)``."""
    dy, dz = torch.empty_like(y), z.new_empty(z.shape)
    options = shape.launch("gate", z)
    rows = shape.batch * shape.length * shape.heads
    gate_gradients_kernel[(triton.cdiv(rows, options["BLOCK_R"]),)](
        dout, z, y, dy, dz, rows, shape.length, shape.heads, *dout.stride(), *z.stride(), P=shape.width,
        BLOCK_P=block(shape.width), **options,
    )  # fmt: skip
    return dy, dz
