"""The SSD forward pass in one walk over the chunks of every head: what is fast where sequences and heads fill a GPU.

The state never leaves the registers, so that beside the inputs and outputs, only decays and C B^T go through memory.
`triton_forward` has both, and the way for fewer heads, where programs a chunk are what fills a GPU, and for a gate,
with which registers do not suffice.

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
    weight_of_input,
)


@triton.jit
def walk_kernel(
    x_ptr, B_ptr, C_ptr, D_ptr, scores_ptr, decays_ptr, start_ptr, y_ptr, end_ptr,
    length, heads, per_group, chunks,
    x_b, x_l: tl.constexpr, x_h, x_p, B_b, B_l: tl.constexpr, B_g, B_n, C_b, C_l: tl.constexpr, C_g, C_n,
    D_h, D_p: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, HAS_START: tl.constexpr, HAS_D: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y (B, L, H, P) of one head, and its state after the last token."""
    whole = tl.program_id(0).to(tl.int64)
    b, h = whole // heads, whole % heads
    rows, p, n = tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    dtype = y_ptr.dtype.element_ty
    x_ptr += b * x_b + h * x_h
    B_ptr += b * B_b + h // per_group * B_g
    C_ptr += b * C_b + h // per_group * C_g
    y_ptr += b * length * heads * P + h * P
    end_ptr += whole * (P * N)
    if HAS_D:
        D_ptr += h * D_h
    planes: tl.constexpr = PLANES if HAS_DOCUMENTS else 2
    decays_ptr += whole * chunks * (planes * Q)
    groups = heads // per_group
    scores_ptr += (b * chunks * groups + h // per_group) * (Q * Q) + rows[:, None] * Q + rows[None, :]
    cells = p[:, None] * N + n[None, :]
    inside = (p[:, None] < P) & (n[None, :] < N)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if HAS_START:
        state = tl.load(start_ptr + whole * (P * N) + cells, mask=inside, other=0.0).to(tl.float32)
    for chunk in tl.range(0, chunks, disable_licm=True):
        first = tl.cast(chunk, tl.int64) * Q
        left = length - chunk * Q
        decays = decays_ptr + first * planes + rows
        x = load_tile(x_ptr + first * x_l, rows, p, x_l, x_p, left, P)
        C_qn = load_tile(C_ptr + first * C_l, rows, n, C_l, C_n, left, N).to(dtype)
        B_qn = load_tile(B_ptr + first * B_l, rows, n, B_l, B_n, left, N).to(dtype)
        if HAS_DOCUMENTS:
            total, origin = tl.load(decays + TOTAL * Q), tl.load(decays + ORIGIN * Q)
            from_start = tl.load(decays + FROM_START * Q)
            to_end = tl.load(decays + DT * Q) * tl.load(decays + TO_END * Q)
            across = tl.load(decays_ptr + first * planes + FROM_START * Q + Q - 1)
        else:
            total, origin = tl.load(decays), tl.load(decays + Q)
            last = tl.load(decays_ptr + first * planes + Q - 1)
            from_start, to_end, across = tl.exp2(total), tl.exp2(last - origin), tl.exp2(last)
        weights = bounded_exp2(total[:, None] - origin[None, :])
        weights *= tl.load(scores_ptr + first * groups * Q)
        y = product(C_qn, tl.trans(state.to(dtype)), None, PRECISION)
        y *= from_start[:, None]
        y = product(weights.to(dtype), x, y, PRECISION)
        if HAS_D:
            y += weight_of_input(D_ptr, p, D_p, P) * x.to(tl.float32)
        out = y_ptr + first * (heads * P) + rows[:, None] * (heads * P) + p[None, :]
        tl.store(out, y.to(dtype), mask=(rows[:, None] < left) & (p[None, :] < P))
        state *= across
        state = product(tl.trans((x.to(tl.float32) * to_end[:, None]).to(dtype)), B_qn, state, PRECISION)
    tl.store(end_ptr + cells, state, mask=inside)


def walk(
    shape: Shape, x: Tensor, B: Tensor, C: Tensor, D: Tensor | None, scores: Tensor, decays: Tensor,
    documents: bool, start: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y (B, L, H, P) and the states after the last token in float32 (B, H, P, N).

    `decays` is of `triton_forward.decays` where there are documents, else of `triton_forward.totals`.
    """
    y = x.new_empty(x.shape)
    end = decays.new_empty(shape.batch, shape.heads, shape.width, shape.size)
    walk_kernel[(shape.batch * shape.heads,)](
        x, B, C, D, scores, decays, start, y, end, shape.length, shape.heads, shape.heads // shape.groups,
        shape.chunks, *x.stride(), *B.stride(), *C.stride(),
        *((0, 0) if D is None else D.stride()), HAS_DOCUMENTS=documents, HAS_START=start is not None,
        HAS_D=D is not None, **{**shape.constants, **shape.launch("walk", x)},
    )  # fmt: skip
    return y, end
