"""One token of the selective scan in one launch: step size, decay, state in place, output, skip and gate.

Legend: B batch, D channels, G groups, N state size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.configurations import configuration
from bimamba_lit.kernels.pointwise import LOG2_E, sigmoid, softplus


@triton.jit
def scan_step(
    state, u, delta, A, B, C, D, z, delta_bias, y, channels, per_map_B, per_map_C,
    state_b, state_d, state_n, u_b, u_d, delta_b, delta_d, A_d, A_n, B_b, B_g, B_n, C_b, C_g, C_n, z_b, z_d,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write y (B, D) and move the state (B, D, N) on by a token, in place."""
    dtype = state.dtype.element_ty
    b = tl.program_id(1).to(tl.int64)
    d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[None, :]
    real = d < channels
    both = real[:, None] & (n < N)
    at = state + b * state_b + d[:, None] * state_d + n * state_n
    x = tl.load(u + b * u_b + d * u_d, mask=real, other=0.0).to(dtype)
    step = tl.load(delta + b * delta_b + d * delta_d, mask=real, other=0.0).to(dtype)
    if delta_bias is not None:
        step += tl.load(delta_bias + d, mask=real, other=0.0).to(dtype)
    if SOFTPLUS:
        step = softplus(step)
    rate = tl.load(A + d[:, None] * A_d + n * A_n, mask=both, other=0.0).to(dtype) * LOG2_E
    into = tl.load(B + b * B_b + (d // per_map_B)[:, None] * B_g + n * B_n, mask=both, other=0.0).to(dtype)
    out = tl.load(C + b * C_b + (d // per_map_C)[:, None] * C_g + n * C_n, mask=both, other=0.0).to(dtype)
    before = tl.load(at, mask=both, other=0.0)
    after = tl.exp2(step[:, None] * rate) * before + (step * x)[:, None] * into
    tl.store(at, after, mask=both)
    total = tl.sum(after * out, axis=1)
    if D is not None:
        total += tl.load(D + d, mask=real, other=0.0).to(dtype) * x
    if z is not None:
        gate = tl.load(z + b * z_b + d * z_d, mask=real, other=0.0).to(dtype)
        total *= gate * sigmoid(gate)
    tl.store(y + b * channels + d, total.to(y.dtype.element_ty), mask=real)


@torch.library.custom_op("bimamba_lit::selective_scan_step", mutates_args=("state",))
def step(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """Return y (B, D) of one token and advance the state (B, D, N), of the accumulator's dtype, in place."""
    return run_step(state, u, delta, A, B, C, D, z, delta_bias, softplus)


@step.register_fake
def _(state, u, delta, A, B, C, D, z, delta_bias, softplus):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def run_step(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """Launch the kernel of `step`."""
    batch, channels = u.shape
    size = A.shape[1]
    B, C = (maps[:, None] if maps.ndim == 2 else maps for maps in (B, C))
    chosen = configuration("selective_scan/step", u.dtype, channels, u.device)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    scan_step[(triton.cdiv(channels, chosen.blocks["BLOCK_D"]), batch)](
        state, u, delta, A, B, C, None if D is None else D.contiguous(), z,
        None if delta_bias is None else delta_bias.contiguous(), y, channels, channels // B.shape[1],
        channels // C.shape[1], *state.stride(), *u.stride(), *delta.stride(), *A.stride(), *B.stride(), *C.stride(),
        *((0, 0) if z is None else z.stride()), SOFTPLUS=softplus, N=size, BLOCK_N=triton.next_power_of_2(size),
        **chosen.launch(),
    )  # fmt: skip
    return y
