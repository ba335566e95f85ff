"""Triton kernels of the SSD backward pass, and their launches.

The states before every chunk and, walking from the end, their gradients are formed again by the forward pass's `carry`.
Then everything is local to a chunk: `input_gradients` gives those of x, of B through the states and of all decays,
`map_gradients` those of C through the states and of the products C B^T, each summed over the heads that a program
serves; `sum_map_gradients` adds the programs' sums and finishes B and C; `decay_gradients` goes from decays to dt, A and
the bias. Sums over heads and chunks are made in a fixed order, without atomics.

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
)


@triton.jit
def input_gradients_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, documents_ptr, decays_ptr, states_ptr, after_ptr,
    dx_ptr, dD_ptr, dscores_ptr, by_token_ptr, by_part_ptr,
    length, heads, per_group, chunks, splits, heads_each,
    x_b, x_l, x_h, x_p, dy_b, dy_l, dy_h, dy_p, B_b, B_l, B_g, B_n, C_b, C_l, C_g, C_n, D_h, D_p,
    HAS_D: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what `input_gradients` returns, of R tokens of a chunk for some heads of a group.

    Tiles have the tokens that are read, j, in rows, and those that read them, i, in columns: the same R tokens, and for
    the first half of a chunk the later half.
    """
    part, chunk, b, group, begin, end = place(heads, per_group, chunks, splits, heads_each, Q // R)
    rows, p, n = tl.arange(0, R), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    first = chunk.to(tl.int64) * Q
    mine = first + part * R
    left = length - chunk * Q - part * R
    # None are later than the second half.
    later_left = tl.where(part == 0, left - R, 0)
    dtype = dx_ptr.dtype.element_ty
    B_rn = load_tile(B_ptr + b * B_b + mine * B_l + group * B_g, rows, n, B_l, B_n, left, N).to(dtype)
    maps = C_ptr + b * C_b + group * C_g
    C_rn = load_tile(maps + mine * C_l, rows, n, C_l, C_n, left, N).to(dtype)
    allowed = rows[:, None] <= rows[None, :]
    if HAS_DOCUMENTS:
        documents = documents_ptr + b * length + rows
        here = tl.load(documents + mine, mask=rows < left, other=-1)
        allowed = allowed & (here[:, None] == tl.load(documents + mine, mask=rows < left, other=-1)[None, :])
    scores = tl.where(allowed, product(B_rn, tl.trans(C_rn), None, PRECISION), 0.0)
    dscores = tl.zeros((R, R), tl.float32)
    if Q > R:
        C_later = load_tile(maps + (first + R) * C_l, rows, n, C_l, C_n, later_left, N).to(dtype)
        later_scores = product(B_rn, tl.trans(C_later), None, PRECISION)
        later_dscores = tl.zeros((R, R), tl.float32)
        if HAS_DOCUMENTS:
            there = tl.load(documents + first + R, mask=rows < later_left, other=-1)
            later_scores = tl.where(here[:, None] == there[None, :], later_scores, 0.0)
    for head in range(begin, end):
        h = tl.cast(head, tl.int64)
        place_of_head = (b * heads + h) * chunks + chunk
        decays = decays_ptr + place_of_head * (PLANES * Q) + part * R + rows
        dt, total = tl.load(decays + DT * Q), tl.load(decays + TOTAL * Q)
        x = load_tile(x_ptr + b * x_b + mine * x_l + h * x_h, rows, p, x_l, x_p, left, P)
        gradients = dy_ptr + b * dy_b + h * dy_h
        dy = load_tile(gradients + mine * dy_l, rows, p, dy_l, dy_p, left, P)
        by_token = by_token_ptr + place_of_head * (3 * Q) + part * R + rows

        decay = bounded_exp2(tl.load(decays + TOTAL * Q)[None, :] - total[:, None])
        products = product(x, tl.trans(dy), None, PRECISION) * decay
        dscores += products * dt[:, None]
        flow = products * scores
        written, read = tl.sum(flow, 1), tl.sum(flow * dt[:, None], 0)
        dx = product((decay * scores).to(dtype), dy, None, PRECISION)
        if Q > R:
            if part == 0:
                dy_later = load_tile(gradients + (first + R) * dy_l, rows, p, dy_l, dy_p, later_left, P)
                decay = bounded_exp2(tl.load(decays + TOTAL * Q + R)[None, :] - total[:, None])
                products = product(x, tl.trans(dy_later), None, PRECISION) * decay
                later_dscores += products * dt[:, None]
                flow = products * later_scores
                written += tl.sum(flow, 1)
                tl.store(by_token + 2 * Q + R, tl.sum(flow * dt[:, None], 0))
                dx = product((decay * later_scores).to(dtype), dy_later, dx, PRECISION)

        x_wide, dy_wide = x.to(tl.float32), dy.to(tl.float32)
        cells = ((b * chunks + chunk) * heads + h) * (P * N)
        after = load_tile(after_ptr + cells, p, n, N, 1, P, N)
        back = product(B_rn, tl.trans(after), None, PRECISION) * tl.load(decays + TO_END * Q)[:, None]
        kept = tl.sum(back * x_wide, 1)
        dx = (dx + back) * dt[:, None]
        if HAS_D:
            dx += tl.load(D_ptr + h * D_h + p * D_p, mask=p < P, other=0.0)[None, :] * dy_wide
            dD = dD_ptr + (((b * chunks + chunk) * (Q // R) + part) * heads + h) * P + p
            tl.store(dD, tl.sum(x_wide * dy_wide, 0), mask=p < P)
        out = dx_ptr + ((b * length + mine) * heads + h) * P + rows[:, None] * (heads * P) + p[None, :]
        tl.store(out, dx.to(dtype), mask=(rows[:, None] < left) & (p[None, :] < P))

        state = load_tile(states_ptr + cells, p, n, N, 1, P, N)
        carried = product(C_rn, tl.trans(state), None, PRECISION)
        read += tl.sum(carried * dy_wide, 1) * tl.load(decays + FROM_START * Q)
        through = tl.sum(kept * dt)
        if part == 0:
            whole = tl.load(decays_ptr + place_of_head * (PLANES * Q) + FROM_START * Q + Q - 1)
            through += tl.sum(state.to(tl.float32) * after.to(tl.float32)) * whole
        tl.store(by_token, written + kept)
        tl.store(by_token + Q, read)
        tl.store(by_part_ptr + place_of_head * (Q // R) + part, through)
    # Of (programs / parts, Q, Q); what a half cannot reach is not written.
    dscores = tl.where(allowed, dscores, 0.0)
    square = dscores_ptr + (tl.program_id(0) // (Q // R)).to(tl.int64) * (Q * Q) + part * (R * Q)
    square += rows[:, None] * Q + rows[None, :]
    tl.store(square + part * R, dscores)
    if Q > R:
        if HAS_DOCUMENTS:
            later_dscores = tl.where(here[:, None] == there[None, :], later_dscores, 0.0)
        tl.store(square + R, later_dscores, mask=(rows[:, None] >= 0) & (part == 0))


@triton.jit
def map_gradients_kernel(
    value_ptr, map_ptr, decays_ptr, states_ptr, dscores_ptr, out_ptr,
    length, heads, per_group, chunks, splits, value_b, value_l, value_h, value_p, map_b, map_l, map_g, map_n,
    REVERSE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of B, or in reverse of C, of some tokens of a chunk and one group.

    Of B: values are x, states the gradients of those after the chunk, and maps C. In reverse, of C: values are
    gradients of y, states those before the chunk, and maps B.
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
    for head in range(group * per_group, (group + 1) * per_group):
        h = tl.cast(head, tl.int64)
        decays = decays_ptr + ((b * heads + h) * chunks + chunk) * (PLANES * Q) + rows
        if REVERSE:
            weight = tl.load(decays + FROM_START * Q)
        else:
            weight = tl.load(decays + DT * Q) * tl.load(decays + TO_END * Q)
        value = load_tile(value_ptr + b * value_b + first * value_l + h * value_h, rows, p, value_l, value_p, left, P)
        state = load_tile(states_ptr + ((b * chunks + chunk) * heads + h) * (P * N), p, n, N, 1, P, N)
        total = product((value.to(tl.float32) * weight[:, None]).to(dtype), state, total, PRECISION)
    # dscores are (programs, Q, Q), a token that is read in rows, and not written where it comes after its reader.
    if REVERSE:
        square, there = columns[None, :] * Q + rows[:, None], columns[None, :] <= rows[:, None]
    else:
        square, there = rows[:, None] * Q + columns[None, :], rows[:, None] <= columns[None, :]
    dscores = tl.zeros((BLOCK_Q, Q), tl.float32)
    for split in range(splits):
        dscores += tl.load(dscores_ptr + (program * splits + split) * (Q * Q) + square, mask=there, other=0.0)
    mapped = load_tile(map_ptr + b * map_b + first * map_l + group * map_g, columns, n, map_l, map_n, left, N)
    total = product(dscores.to(dtype), mapped.to(dtype), total, PRECISION)
    out = out_ptr + ((b * length + first + rows) * groups + group)[:, None] * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < left) & (n[None, :] < N))


@triton.jit
def decay_gradients_kernel(
    dt_ptr, A_ptr, bias_ptr, decays_ptr, by_token_ptr, by_part_ptr, ddt_ptr, dA_ptr, dbias_ptr,
    length, heads, chunks, low, high, dt_b, dt_l, dt_h,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr,
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
    passed = tl.load(by_part_ptr + place_of_head * (Q // R), mask=there, other=0.0)
    if Q > R:
        read += tl.load(by_token + 2 * Q, mask=inside & (rows[:, None] >= R), other=0.0)
        passed += tl.load(by_part_ptr + place_of_head * 2 + 1, mask=there, other=0.0)
    A = tl.load(A_ptr + h, mask=there, other=0.0)[None, :]
    crossing = tl.cumsum(read - dt * written, 0, reverse=True) + passed[None, :]
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
    out = ddt_ptr + ((b.to(tl.int64) * length + chunk * Q + rows)[:, None] * heads) + h[None, :]
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


class InputGradients(NamedTuple):
    """What `input_gradients` found, s being splits of a group's heads and 3 the kinds of sums by token.

    Attributes:
        dx: (B, L, H, P).
        dD: By part of a chunk, (B * c * Q / R, H, P), or None.
        dscores: Of B C^T by split (B, c, G, s, Q, Q), the later token in columns, where it is not the earlier one.
        by_token: Sums of F over the readers of a token, without its step size; over what it reads; and over what it
            reads in the first half of a chunk, where it is in the second (B, H, c, 3, Q).
        by_part: The share of all a chunk's log decays (B, H, c, Q / R).
    """

    dx: Tensor
    dD: Tensor | None
    dscores: Tensor
    by_token: Tensor
    by_part: Tensor


def input_gradients(
    shape: Shape, x: Tensor, dy: Tensor, B: Tensor, C: Tensor, D: Tensor | None, documents: Tensor | None,
    decays: Tensor, states: Tensor, after: Tensor,
) -> InputGradients:  # fmt: skip
    """Return the gradients of x, D and B C^T, and what those of dt, A and the bias need."""
    options = shape.launch("input_gradients", x)
    heads_each, splits = shape.split(options.pop("HEADS"), x.device)
    batch, heads, chunks, chunk = shape.batch, shape.heads, shape.chunks, shape.chunk
    parts = chunk // shape.part
    wide = {"dtype": torch.float32, "device": x.device}
    found = InputGradients(
        x.new_empty(x.shape),
        None if D is None else torch.empty(batch * chunks * parts, heads, shape.width, **wide),
        torch.empty(batch, chunks, shape.groups, splits, chunk, chunk, **wide),
        torch.empty(batch, heads, chunks, 3, chunk, **wide),
        torch.empty(batch, heads, chunks, parts, **wide),
    )
    input_gradients_kernel[(shape.programs(splits),)](
        x, dy, B, C, D, documents, decays, states, after, found.dx, found.dD, found.dscores, found.by_token,
        found.by_part, shape.length, heads, heads // shape.groups, chunks, splits, heads_each, *x.stride(),
        *dy.stride(), *B.stride(), *C.stride(), *((0, 0) if D is None else D.stride()), HAS_D=D is not None,
        HAS_DOCUMENTS=documents is not None, R=shape.part, **shape.constants, **options,
    )  # fmt: skip
    return found


def map_gradient(
    shape: Shape, values: Tensor, maps: Tensor, decays: Tensor, states: Tensor, dscores: Tensor, like: Tensor,
    reverse: bool = False,
) -> Tensor:  # fmt: skip
    """Return the gradient of B, or in reverse of C, (B, L, G, N)."""
    out = like.new_empty(like.shape)
    options = shape.launch("map_gradients", values)
    constants = {**shape.constants, **options}
    constants["BLOCK_N"] = min(options["BLOCK_N"], block(shape.size))
    constants["BLOCK_Q"] = min(options["BLOCK_Q"], shape.chunk)
    grid = (
        shape.batch * shape.chunks * shape.groups,
        shape.chunk // constants["BLOCK_Q"],
        triton.cdiv(shape.size, constants["BLOCK_N"]),
    )
    map_gradients_kernel[grid](
        values, maps, decays, states, dscores, out, shape.length, shape.heads, shape.heads // shape.groups,
        shape.chunks, dscores.shape[3], *values.stride(), *maps.stride(), REVERSE=reverse, **constants,
    )  # fmt: skip
    return out


def decay_gradients(
    shape: Shape, dt: Tensor, A: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float],
    decays: Tensor, found: InputGradients,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of dt (B, L, H), A (H,) and the bias (H,)."""
    options = shape.launch("decays", dt)
    ddt = dt.new_empty(dt.shape)
    dA = dt.new_empty(shape.batch * shape.chunks, shape.heads, dtype=torch.float32)
    dbias = None if dt_bias is None else torch.empty_like(dA)
    grid = (shape.batch * shape.chunks, triton.cdiv(shape.heads, options["BLOCK_H"]))
    decay_gradients_kernel[grid](
        dt, A, dt_bias, decays, found.by_token, found.by_part, ddt, dA, dbias, shape.length, shape.heads, shape.chunks,
        *limit, *dt.stride(), SOFTPLUS=softplus, HAS_BIAS=dt_bias is not None, Q=shape.chunk, R=shape.part, **options,
    )  # fmt: skip
    return ddt, dA.sum(0), None if dbias is None else dbias.sum(0)


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
