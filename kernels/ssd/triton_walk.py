"""The SSD forward pass in one walk over the chunks of every head: what is fast where sequences and heads fill a GPU.

The state never leaves the registers, so that beside the inputs and outputs, only decays and C B^T go through memory.
`triton_forward` has both, and the way for fewer heads, where programs a chunk are what fills a GPU.

Legend: B batch, L length, H heads, P head width, G groups, N state size, Q tokens of a chunk.
"""

import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.ssd.triton_forward import (
    DT,
    FROM_START,
    ORIGIN,
    PLANES,
    TO_END,
    TOTAL,
    Shape,
    bounded_exp2,
    load_tile,
    product,
)


@triton.jit
def walk_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, z_ptr, scores_ptr, decays_ptr, start_ptr, y_ptr, end_ptr,
    length, heads, per_group, chunks,
    x_b, x_l, x_h, x_p, B_b, B_l, B_g, B_n, C_b, C_l, C_g, C_n, z_b, z_l, z_h, z_p, D_h, D_p,
    HAS_START: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y (B, L, H, P) of one head, and its state after the last token."""
    whole = tl.program_id(0).to(tl.int64)
    b, h = whole // heads, whole % heads
    rows, p, n = tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    dtype = y_ptr.dtype.element_ty
    x_ptr += b * x_b + h * x_h
    B_ptr += b * B_b + h // per_group * B_g
    C_ptr += b * C_b + h // per_group * C_g
    if HAS_Z:
        z_ptr += b * z_b + h * z_h
    y_ptr += b * length * heads * P + h * P
    decays_ptr += whole * chunks * (PLANES * Q)
    groups = heads // per_group
    scores_ptr += (b * chunks * groups + h // per_group) * (Q * Q) + rows[:, None] * Q + rows[None, :]
    cells = p[None, :] * N + n[:, None]
    inside = (p[None, :] < P) & (n[:, None] < N)
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if HAS_START:
        state = tl.load(start_ptr + whole * (P * N) + cells, mask=inside, other=0.0).to(tl.float32)
    for chunk in tl.range(0, chunks, disable_licm=True):
        first = tl.cast(chunk, tl.int64) * Q
        left = length - chunk * Q
        decays = decays_ptr + first * PLANES
        x = load_tile(x_ptr + first * x_l, rows, p, x_l, x_p, left, P)
        C_qn = load_tile(C_ptr + first * C_l, rows, n, C_l, C_n, left, N).to(dtype)
        B_nq = load_tile(B_ptr + first * B_l, n, rows, B_n, B_l, N, left).to(dtype)
        weights = bounded_exp2(
            tl.load(decays + TOTAL * Q + rows)[:, None] - tl.load(decays + ORIGIN * Q + rows)[None, :]
        )
        weights *= tl.load(scores_ptr + first * groups * Q)
        y = product(C_qn, state.to(dtype), None, PRECISION)
        y *= tl.load(decays + FROM_START * Q + rows)[:, None]
        y = product(weights.to(dtype), x, y, PRECISION)
        if HAS_D:
            y += tl.load(D_ptr + h * D_h + p * D_p, mask=p < P, other=0.0)[None, :] * x.to(tl.float32)
        if HAS_Z:
            z = load_tile(z_ptr + first * z_l, rows, p, z_l, z_p, left, P).to(tl.float32)
            y *= z * tl.sigmoid(z)
        out = y_ptr + first * (heads * P) + rows[:, None] * (heads * P) + p[None, :]
        tl.store(out, y.to(dtype), mask=(rows[:, None] < left) & (p[None, :] < P))
        to_end = tl.load(decays + DT * Q + rows) * tl.load(decays + TO_END * Q + rows)
        state *= tl.load(decays + FROM_START * Q + Q - 1)
        state = product(B_nq, (x.to(tl.float32) * to_end[:, None]).to(dtype), state, PRECISION)
    tl.store(end_ptr + whole * (P * N) + cells, state, mask=inside)


def walk(
    shape: Shape, x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, scores: Tensor, decays: Tensor,
    start: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y (B, L, H, P) and the states after the last token in float32 (B, H, P, N)."""
    y = x.new_empty(x.shape)
    end = decays.new_empty(shape.batch, shape.heads, shape.width, shape.size)
    walk_kernel[(shape.batch * shape.heads,)](
        x, B, C, D, z, scores, decays, start, y, end, shape.length, shape.heads, shape.heads // shape.groups,
        shape.chunks, *x.stride(), *B.stride(), *C.stride(), *(x if z is None else z).stride(),
        *((0, 0) if D is None else D.stride()), HAS_START=start is not None, HAS_D=D is not None,
        HAS_Z=z is not None, **{**shape.constants, **shape.launch("walk", x)},
    )  # fmt: skip
    return y, end
