"""One token of SSD in one launch: step size, decay, state in place, output, skip and gate.

Legend: B batch, H heads, P head width, G groups, N state size.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bimamba_lit.kernels.configurations import configuration
from bimamba_lit.kernels.pointwise import LOG2_E, sigmoid, softplus
from bimamba_lit.kernels.ssd.naive import accumulator
from bimamba_lit.kernels.ssd.naive import ssd_step as naive_step


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """Compute what `naive.ssd_step` computes; while no gradients are recorded, in the state given."""
    if torch.is_grad_enabled():
        return naive_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)
    state = state.to(accumulator(x))
    return _step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *dt_limit), state


@triton.jit
def step_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, y, heads, width, per_group, low, high,
    state_b, state_h, state_p, state_n, x_b, x_h, x_p, dt_b, dt_h, A_h, B_b, B_g, B_n, C_b, C_g, C_n, D_h, D_p,
    z_b, z_h, z_p, bias_h,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write y (B, H, P) and move the state (B, H, P, N) on by a token, in place."""
    dtype = state.dtype.element_ty
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    real = p < width
    both = real[:, None] & (n < N)[None, :]
    at = state + b * state_b + h * state_h + p[:, None] * state_p + n[None, :] * state_n
    before = tl.load(at, mask=both, other=0.0)
    value = tl.load(x + b * x_b + h * x_h + p * x_p, mask=real, other=0.0).to(dtype)
    step = tl.load(dt + b * dt_b + h * dt_h).to(dtype)
    if dt_bias is not None:
        step += tl.load(dt_bias + h * bias_h).to(dtype)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.minimum(tl.maximum(step, low), high)
    decay = tl.exp2(step * (tl.load(A + h * A_h).to(dtype) * LOG2_E))
    group = h // per_group
    into = tl.load(B + b * B_b + group * B_g + n * B_n, mask=n < N, other=0.0).to(dtype)
    out = tl.load(C + b * C_b + group * C_g + n * C_n, mask=n < N, other=0.0).to(dtype)
    after = decay * before + (step * value)[:, None] * into[None, :]
    tl.store(at, after, mask=both)
    total = tl.sum(after * out[None, :], axis=1)
    if D is not None:
        total += tl.load(D + h * D_h + p * D_p, mask=real, other=0.0).to(dtype) * value
    if z is not None:
        gate = tl.load(z + b * z_b + h * z_h + p * z_p, mask=real, other=0.0).to(dtype)
        total *= gate * sigmoid(gate)
    tl.store(y + (b * heads + h) * width + p, total.to(y.dtype.element_ty), mask=real)


@torch.library.custom_op("bimamba_lit::ssd_step", mutates_args=("state",))
def _step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, softplus: bool, low: float, high: float,
) -> Tensor:  # fmt: skip
    return run_step(state, x, dt, A, B, C, D, z, dt_bias, softplus, low, high)


@_step.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, softplus, low, high):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def run_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, softplus: bool, low: float, high: float,
) -> Tensor:  # fmt: skip
    """Launch the kernel: y (B, H, P), and the state (B, H, P, N), of the accumulator's dtype, advanced in place."""
    batch, heads, width = x.shape
    groups, size = B.shape[1:]
    chosen = configuration("ssd/step", x.dtype, batch * heads, x.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    skip = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.ndim == 2 else 0)
    step_kernel[(triton.cdiv(width, chosen.blocks["BLOCK_P"]), heads, batch)](
        state, x, dt, A, B, C, D, z, dt_bias, y, heads, width, heads // groups, low, high,
        *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), *skip,
        *((0, 0, 0) if z is None else z.stride()), 0 if dt_bias is None else dt_bias.stride(0),
        SOFTPLUS=softplus, N=size, BLOCK_N=triton.next_power_of_2(size), **chosen.launch(),
    )  # fmt: skip
    return y


def compile_step(batch: int) -> Tensor:
    """Launch a step of the 2.7B model's shape without a GPU."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    heads, width, size = 80, 64, 128
    x, rates, maps = meta(batch, heads, width), meta(heads, dtype=torch.float32), meta(batch, 1, size)
    state = meta(batch, heads, width, size, dtype=torch.float32)
    return run_step(state, x, meta(batch, heads), rates, maps, maps, rates, x, rates, True, 0.0, math.inf)
